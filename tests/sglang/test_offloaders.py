"""benchmarks/offloaders.py: SGLang's own offloaders are driven as its engine drives them.

Those of 0.5.17 refuse to do anything without a GPU. So a first parameter says that the layers are elsewhere, and CUDA's
streams, events and pinned memory are stand-ins; what is moved, when, and read by whom is theirs. The paged experts of
0.5.23 run as they are.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from vmm_dwdp.integrations.sglang import contract

OF_0_5_17 = pytest.mark.skipif(contract.version() != "0.5.17", reason="the benchmark drives its offloaders")
OF_0_5_23 = pytest.mark.skipif(contract.version() != "0.5.23", reason="it has paged experts")

LAYERS, EXPERTS, SIZE = 5, 4, 6


@pytest.fixture
def offloaders(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import offloaders

    return offloaders


def gemm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, scales: None) -> torch.Tensor:
    begins = [0, *ends.tolist()[:-1]]
    parts = [x[begin:end] @ weight[e].T for e, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True))]
    return torch.cat(parts)


@OF_0_5_17
def test_it_is_left_out_where_there_is_no_gpu(offloaders: Any) -> None:
    found, left_out = offloaders.available(["sglang"], torch.device("cpu"))

    assert found == []
    assert list(left_out.values()) == ["needs a GPU"] * 2
    assert all(name.startswith("SGLang 0.5.17, OffloaderV") for name in left_out)


@OF_0_5_17
def test_layers_are_brought_ahead_and_read_as_they_were(offloaders: Any) -> None:
    (_, ahead), _ = offloaders.available(["sglang"], torch.device("cuda"))
    theirs = sys.modules["sglang.srt.utils.offloader"]
    weights = [
        {"w13": torch.randn(EXPERTS, 2 * SIZE, SIZE), "w2": torch.randn(EXPERTS, SIZE, SIZE)} for _ in range(LAYERS)
    ]
    layers = [offloaders.DecoderLayer({name: weight.clone() for name, weight in each.items()}) for each in weights]
    x, rows = torch.randn(3, SIZE), torch.tensor([[0, 2], [1, 3], [2, 3]])
    expected = x
    for each in weights:
        expected = offloaders.routed(expected, rows, each, gemm)
    for layer in layers:
        elsewhere = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        own = dict(layer.experts._parameters)
        layer.experts._parameters.clear()
        layer.experts._parameters.update({"elsewhere": elsewhere, **own})
    brought: list[int] = []

    def bring(self: Any) -> torch.Tensor:
        brought.append([layer.experts for layer in layers].index(self._module))
        return self._param.clone()

    streams = {name: Mock() for name in ("Stream", "Event", "current_stream")}
    with (
        patch.multiple(torch.cuda, stream=lambda stream: nullcontext(), **streams),
        patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        patch.object(theirs, "_create_cpu_data", lambda data, pin_memory: data.clone()),
        patch.object(theirs._CpuParamOffloader, "create_device_tensor", bring),
    ):
        done = ahead.offload(list(layers))
        assert brought == [0, 0, 1, 1], "both weights of two layers"
        for _ in range(2):
            y = x
            for layer in done.layers:
                y = layer(y, rows, gemm)
            assert torch.equal(y, expected)
    assert brought[4:] == [layer for number in range(2, 2 + 2 * LAYERS) for layer in [number % LAYERS] * 2]


@OF_0_5_23
def test_paged_experts_keep_those_that_were_used_last(offloaders: Any) -> None:
    (paged,), _ = offloaders.available(["paged"], torch.device("cpu"))
    count = 8  # of which two are kept
    weights = [{"w13": torch.randn(count, 2 * SIZE, SIZE), "w2": torch.randn(count, SIZE, SIZE)} for _ in range(LAYERS)]
    done = paged.offload([offloaders.DecoderLayer(dict(each)) for each in weights])
    held, missed = [1, 0], 0  # the latest first; both are there at first
    for chosen in ([0, 1], [1, 5], [5, 1], [7, 2], [2, 5]):
        rows, x = torch.tensor([chosen]), torch.randn(1, SIZE)
        missed += LAYERS * len(set(chosen) - set(held))
        used = sorted(chosen, key=lambda expert: (expert not in held, expert))  # in which they become the latest
        held = [*reversed(used), *(expert for expert in held if expert not in chosen)][:2]
        y = expected = x
        for layer, each in zip(done.layers, weights, strict=True):
            y = layer(y, rows, gemm)
            expected = offloaders.routed(expected, rows, each, gemm)
        assert torch.equal(y, expected)
        assert done.missed() == missed

    several, x = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.randn(3, SIZE)
    torch.testing.assert_close(
        done.layers[0](x, several, gemm), offloaders.routed(x, several, weights[0], gemm), msg="in three waves"
    )

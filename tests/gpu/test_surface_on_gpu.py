"""What a model runner names besides layers: streams of any kind, operators in compiled graphs, tensors of an update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import add_layers, fill_shards, same_bytes
from torch.profiler import ProfilerActivity, profile

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError, operators

pytestmark = pytest.mark.gpu

EXPERTS, SIZE, LAYERS = 8, 1024, 5


@pytest.fixture
def whole() -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        number: {"w": torch.randn(EXPERTS, SIZE, SIZE, generator=generator).mul(SIZE**-0.5).to(torch.bfloat16)}
        for number in range(LAYERS)
    }


@pytest.fixture
def runtime(whole: dict[int, dict[str, torch.Tensor]], tmp_path: Path) -> Iterator[DWDPRuntime]:
    config = DWDPConfig(group_size=1, host_experts=EXPERTS - 3, mode="in_place", resident_cache=LAYERS << 21)
    runtime = DWDPRuntime(config, 0, "cuda", tmp_path / "rendezvous")
    add_layers(runtime, whole)
    fill_shards(runtime, whole)
    runtime.publish()
    yield runtime
    torch._dynamo.reset()
    assert runtime.close().open() == []


class Others:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@pytest.mark.parametrize("named", [lambda s: s, lambda s: s.cuda_stream, Others], ids=["torch", "number", "another"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_stream_by_any_name(
    runtime: DWDPRuntime, whole: dict[int, dict[str, torch.Tensor]], named: Any, mode: Any
) -> None:
    side = torch.cuda.Stream()
    for _ in range(3):
        for number, weights in whole.items():
            found: Any = runtime.acquire(number, mode=mode, stream=named(side))["w"]
            with torch.cuda.stream(side):
                copied = found.clone()
            runtime.release(number, stream=named(side))
            side.synchronize()
            assert same_bytes(copied, weights["w"])


def test_what_was_chosen_on_another_stream_is_waited_for(runtime: DWDPRuntime) -> None:
    """The chosen experts are written late on the current stream, and counted on another: the cache goes by them."""
    side = torch.cuda.Stream()
    chosen = torch.zeros(64, 1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for number in range(LAYERS):
        torch.cuda._sleep(20_000_000)
        chosen.fill_(EXPERTS - 1)
        runtime.acquire(number, chosen=chosen, stream=side)
        runtime.release(number, stream=side)
        torch.cuda.synchronize()
        chosen.zero_()
    torch.cuda.synchronize()
    runtime.refresh_cache()
    for number in range(LAYERS):
        runtime.acquire(number, chosen=torch.full((64, 1), EXPERTS - 1, device="cuda"))
        runtime.release(number)
    runtime.refresh_cache()
    cache = runtime.stats().cache
    assert cache is not None
    assert cache.served == 1.0, "all that was chosen since is in the cache, if what was counted first was right"


class Layer(torch.nn.Module):
    def __init__(self, runtime: DWDPRuntime, layer: int) -> None:
        super().__init__()
        with runtime.layer(layer, mode="staged") as weights:
            self.w: Any = weights["w"]
        self.number, self.layer = operators.number(runtime), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch.ops.vmm_dwdp.acquire(x, self.number, self.layer)
        alone = self.w.sum(0)  # reads the weight and nothing else
        y = torch.tanh(torch.einsum("th,ehi->ti", x, self.w)) + x @ alone
        torch.ops.vmm_dwdp.release(y, self.number, self.layer)
        return y.sin()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_graph_of_a_whole_model_by_inductor(
    whole: dict[int, dict[str, torch.Tensor]], tmp_path: Path, mode: str
) -> None:
    """Compiled once with slots and once with tensors that stay: the same kernels, so the same bits."""
    config = DWDPConfig(group_size=1, host_experts=EXPERTS - 3)
    runtime = DWDPRuntime(config, 0, "cuda", tmp_path / "staged")
    add_layers(runtime, whole)
    fill_shards(runtime, whole)
    runtime.publish()
    model = torch.nn.Sequential(*(Layer(runtime, number) for number in whole))
    runtime.reset()
    x = torch.randn(32, SIZE, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = x
        for weights in whole.values():
            w = weights["w"].cuda()
            expected = expected * 2
            expected = (torch.tanh(torch.einsum("th,ehi->ti", expected, w)) + expected @ w.sum(0)).sin()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        before = runtime.stats()
        for _ in range(5):
            with runtime.forward_pass(tokens=32):
                torch.testing.assert_close(compiled(x), expected, rtol=3e-2, atol=3e-2)
    stats = runtime.stats()
    assert (stats.hits - before.hits, stats.misses - before.misses) == (5 * LAYERS, 0)
    del model, compiled
    torch._dynamo.reset()
    assert runtime.close().open() == []


def test_new_experts_from_the_device_one_after_another(
    runtime: DWDPRuntime, whole: dict[int, dict[str, torch.Tensor]]
) -> None:
    with runtime.updating() as update:
        for number, weights in whole.items():
            for owner in runtime.held_owners:
                for expert in runtime.local_experts(number, owner):
                    update.write(number, "w", weights["w"][expert].cuda().neg_(), experts=expert, owner=owner)
        with pytest.raises(StateError, match="an update is under way"):
            runtime.acquire(0)
    for mode in ("staged", "in_place"):
        with runtime.forward_pass(mode=mode):  # type: ignore[arg-type]
            for number, weights in whole.items():
                with runtime.layer(number) as found:
                    assert same_bytes(found["w"], weights["w"].neg())
    del found


def test_a_layer_is_a_span_around_its_kernels(runtime: DWDPRuntime) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with runtime.forward_pass(mode="staged"):
            for number in range(LAYERS):
                with runtime.layer(number) as weights:
                    torch.relu(weights["w"])
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() or ()]
    assert all(names.count(f"vmm-dwdp layer {number}") >= 1 for number in range(LAYERS))
    del weights

"""Real `FusedMoE` layers that look up what they read in a bank: the bits of ordinary layers, in passes of few tokens.

On a GPU these are the kernels of SGLang's runners; elsewhere its plain PyTorch path, for bf16, and for Marlin what
stands for its kernels.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import engine_process
import experts
import marlin
import numpy as np
import pytest
import test_forward
import test_loading
import torch
from ports import free_port

from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.timeout(900)  # on a GPU kernels are compiled first
MARLIN = {kind: runner for kind, runner in test_loading.KINDS.items() if runner in ("marlin", "auto")}
ON_A_GPU = {
    "bf16": "triton",
    "fp8 block": "triton",
    "bf16 for triton_kernel": "triton_kernel",
    "mxfp4": "triton_kernel",
    "mxfp4 for marlin": "marlin",
    "nvfp4 for marlin": "marlin",
    **MARLIN,
}
ON_THE_CPU = ("bf16", "wna16", "awq", "gptq in order of activation")
HERE = list(ON_A_GPU) if torch.cuda.is_available() else ON_THE_CPU
NUM_EXPERTS, TOP_K = 16, 4
NUM_TOKENS = (1, 2, 1, 3, 1, 1, 2, 1, 40, 1, 2, 1, 300, 1)
REPLAYED, REPLAYS = (1, 3, 40), 20  # the tokens of each graph, and for how many other routings
ROWS, PAGE = 5, 2 << 20  # of a layer's bank at least; at most ten, where experts are small

Inputs = list[tuple[torch.Tensor, torch.Tensor]]  # hidden states, and each layer's logits
Passes = list[np.ndarray]
Found = dict[str, tuple[Passes, Passes] | str]  # ordinary layers' and with a bank; or a sentence where kernels failed


def outputs(rank: int, *, port: int, folder: Path, kinds: Sequence[str]) -> Found:
    """By kind of weights."""
    marlin.before_plugins()
    engine_process.start(rank, 1, port)
    if engine_process.DEVICE == "cuda":
        test_forward.add_in_one_order()
    return {kind: outputs_or_why_not(kind, rank, folder / "dwdp.yaml") for kind in kinds}


def outputs_or_why_not(kind: str, rank: int, config: Path) -> tuple[Passes, Passes] | str:
    """So that kernels that cannot be had here fail the test of their kind alone."""

    os.environ.pop("VMM_DWDP_CONFIG", None)
    whose = "without this library, too"
    try:
        model = loaded(kind, rank)
        ordinary = eager(model, kind) + [forward(model, kind, *each) for given in replayed(kind) for each in given]
        whose = "with a bank"
        config.write_text(
            f"group_size: 1\nhost_experts: 14\nmode: in_place\nchecksums: true\nexpert_bank: {room_for_rows(model)}\n"
        )
        os.environ["VMM_DWDP_CONFIG"] = str(config)
        return as_numpy(ordinary), as_numpy(with_a_bank(loaded(kind, rank), kind))
    except Exception:
        return f"{whose}: {traceback.format_exc()}"
    finally:
        engine_process.end_of_model()


def room_for_rows(model: Any) -> int:
    """Bytes of the pages of such banks, by what an ordinary model has of an expert."""
    tensors = [each for layer in model.layers for each in experts.tensors(layer, test_loading.tensors_of(layer))]
    return sum(-(-ROWS * each[0].nbytes // PAGE) * PAGE for each in tensors)


def loaded(kind: str, rank: int) -> Any:
    engine_process.use_runner(ON_A_GPU[kind], rank, 1)
    with nullcontext() if torch.cuda.is_available() else experts.without_a_gpu():
        model: Any = experts.model(kind, NUM_EXPERTS, TOP_K)
        experts.load(model)
    return model


def with_a_bank(model: Any, kind: str) -> list[torch.Tensor]:
    """The same passes as of an ordinary model: eager ones, and then those whose graphs are replayed."""
    runtime = engine_process.init_dwdp(model).runtime
    found = eager(model, kind) + [each for given in replayed(kind) for each in replays(model, kind, given)]
    for number, counts in runtime.bank_counts().items():
        assert 0 < counts.hits < counts.uses
        assert counts.copied > runtime.stats().bank.rows[number]
    runtime.check_integrity(verify=True)
    return found


def replayed(kind: str) -> list[Inputs]:
    """What graphs are replayed for, if there can be any."""
    return [inputs(kind, [count] * REPLAYS, count) for count in REPLAYED] if torch.cuda.is_available() else []


def inputs(kind: str, num_tokens: Sequence[int], seed: int) -> Inputs:
    dtype = torch.float16 if kind.startswith("gptq") else torch.bfloat16  # that of its scales
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(engine_process.DEVICE)

    return [
        (random(count, experts.HIDDEN).to(dtype), random(experts.NUM_LAYERS, count, NUM_EXPERTS))
        for count in num_tokens
    ]


def eager(model: Any, kind: str) -> list[torch.Tensor]:
    short = kind in MARLIN and not torch.cuda.is_available()  # what stands for its kernels is slow
    return [forward(model, kind, *each) for each in inputs(kind, NUM_TOKENS[:9] if short else NUM_TOKENS, 0)]


def replays(model: Any, kind: str, given: Inputs) -> list[torch.Tensor]:
    hidden, logits = (each.clone() for each in given[0])
    forward(model, kind, hidden, logits)  # kernels are compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(model, kind, hidden, logits)
    found = []
    for each in given:
        hidden.copy_(each[0])
        logits.copy_(each[1])
        graph.replay()
        found.append(output.clone())
    return found


def forward(model: Any, kind: str, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    for layer, of_layer in zip(model.layers, logits, strict=True):
        routed = test_forward.route(ON_A_GPU[kind], of_layer)
        scale = hidden.float().square().mean(dim=1, keepdim=True).rsqrt()
        with marlin.kernels():
            hidden = hidden + layer.forward_impl((hidden * scale).to(hidden.dtype), routed)
    return hidden


def as_numpy(tensors: list[torch.Tensor]) -> Passes:
    return [each.float().cpu().numpy() for each in tensors]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Passes, Passes] | str]:
    """Of a kind of weights. On a GPU each has a process of its own, which a fault would end; else one has all."""
    kept: Found = {}

    def of(kind: str) -> tuple[Passes, Passes] | str:
        if kind not in kept:
            kinds = [kind] if torch.cuda.is_available() else HERE
            folder = tmp_path_factory.mktemp("config")
            run = partial(outputs, port=free_port(), folder=folder, kinds=kinds)
            kept.update(run_group(run, 1, engine_process.DEVICE)[0])
        return kept[kind]

    return of


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.gpu] if torch.cuda.is_available() or kind not in HERE else [])
        for kind in ON_A_GPU
    ],
)
def test_layers_with_a_bank_have_the_bits_of_ordinary_ones(
    kind: str, found: Callable[[str], tuple[Passes, Passes] | str]
) -> None:
    """In eager passes, and on a GPU in replays of graphs for changing routing."""
    of_kind = found(kind)
    assert not isinstance(of_kind, str), of_kind
    ordinary, with_a_bank = of_kind
    assert all(output.std() > 0.1 for output in ordinary)
    assert len(ordinary) >= 9 + torch.cuda.is_available() * len(REPLAYED) * REPLAYS
    wrong = [place for place, both in enumerate(zip(ordinary, with_a_bank, strict=True)) if not np.array_equal(*both)]
    assert wrong == []


TOLD_ROWS = ("triton", "triton_kernel", "marlin", "auto")
SERVED = {kind: by for kind, by in test_loading.KINDS.items() if by in TOLD_ROWS and "fp8 tensor" not in kind}


def load_with_a_bank(rank: int, *, port: int, folder: Path) -> dict[str, str]:
    """By kind of weights, what is wrong with what its kernels read."""
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import manager

    manager.open_driver = lambda device: HostDriver(test_loading.PAGE_NBYTES)
    engine_process.start(rank, 1, port)
    config = folder / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 6\nmode: in_place\nchecksums: true\nexpert_bank: 12 MB\n")
    found = {}
    for kind, runner in SERVED.items():
        models: list[Any] = []
        for environment in ({}, {"VMM_DWDP_CONFIG": str(config)}):
            os.environ.pop("VMM_DWDP_CONFIG", None)
            os.environ.update(environment)
            engine_process.use_runner(runner, rank, 1)
            with experts.without_a_gpu():
                models.append(experts.model(kind))
                experts.load(models[-1])
        runtime = engine_process.init_dwdp(models[1]).runtime
        found[kind] = ", ".join(sorted(different(*models, runtime, as_experts=kind in MARLIN)))
        runtime.check_integrity(verify=True)
        engine_process.shut_down()
    return found


def first(tensor: torch.Tensor, row: int) -> int:
    """Where a kernel reads it, whatever length the tensor says it has."""
    return int(tensor.storage_offset() + row * tensor.stride(0))


def same_bytes(read: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (read, expected)))


def different(whole: Any, model: Any, runtime: Any, *, as_experts: bool) -> set[str]:
    """Tensors in which rows that were looked up have other bytes than their experts in a whole model, or which are not
    as long as rows are many: ``as_experts``, as experts are."""
    wrong = set()
    for layer, ordinary in zip(model.layers, whole.layers, strict=True):
        names = test_loading.tensors_of(ordinary)
        for chosen in ((0, 5), (5, 7), (2, 3), (7, 1), (6, 5)):
            with runtime.layer(layer.layer_id, tokens=1):
                rows = runtime.look_up(layer.layer_id, torch.tensor([chosen], dtype=torch.int32)).rows.flatten().long()
                found, expected = (experts.tensors(each, names) for each in (layer, ordinary))
                for name, tensor, one in zip(names, found, expected, strict=True):
                    read = [tensor.as_strided(one.shape[1:], one.stride()[1:], first(tensor, row)) for row in rows]
                    if not same_bytes(torch.stack(read), one[list(chosen)]):
                        wrong.add(f"{name} has other bytes")
                    if one.numel() and (len(tensor) == len(one)) != as_experts:
                        wrong.add(f"{name} is {len(tensor)} long")
                del found, tensor, read
    return wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels stand for a GPU's")
def test_every_tensor_of_every_kind_of_weights_is_in_the_bank(tmp_path: Path) -> None:
    [found] = run_group(partial(load_with_a_bank, port=free_port(), folder=tmp_path), 1)
    assert found == dict.fromkeys(SERVED, "")


def test_a_kernel_has_the_tiles_that_it_has_without_a_bank(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 14\n")
    run_group(partial(require_same_tiles, port=free_port(), config=str(config)), 1)


def require_same_tiles(rank: int, *, port: int, config: str) -> None:
    """By SGLang's own rule, which compares the number of tokens with that of experts."""
    os.environ["VMM_DWDP_CONFIG"] = config
    engine_process.start(rank, 1, port)
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config

    from vmm_dwdp.integrations.sglang import hooks
    from vmm_dwdp.integrations.sglang.manager import ExpertManager

    def tiles(count: int, num_tokens: int) -> Any:
        shapes = (count, 96, 64), (count, 64, 48)
        return fused_moe.try_get_optimal_moe_config(*shapes, 2, None, num_tokens, return_down_config=True)

    manager = mock.Mock(closed=False, _layers={0: mock.Mock(num_experts=NUM_EXPERTS)})
    manager.of_experts = partial(ExpertManager.of_experts, manager)
    with mock.patch.object(fused_moe_triton_config, "get_device_name", return_value="a GPU"):
        rows = 6
        for num_tokens in (1, NUM_EXPERTS + 1, NUM_EXPERTS + rows, 100):
            ordinary = tiles(NUM_EXPERTS, num_tokens)
            others = tiles(NUM_EXPERTS + rows, num_tokens)
            assert (others != ordinary) == (num_tokens in (NUM_EXPERTS + 1, NUM_EXPERTS + rows))
            with mock.patch.object(hooks, "_manager", manager):
                assert tiles(NUM_EXPERTS + rows, num_tokens) == ordinary

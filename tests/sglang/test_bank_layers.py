"""Real `FusedMoE` layers that look up what they read in a bank: the bits of ordinary layers, in passes of few tokens.

On a GPU these are SGLang's Triton kernels; elsewhere its plain PyTorch path, for bf16.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import engine_process
import experts
import numpy as np
import pytest
import test_loading
import torch
from ports import free_port

from vmm_dwdp.testing import run_group

KINDS = ("bf16", "fp8 block") if torch.cuda.is_available() else ("bf16",)
NUM_EXPERTS, TOP_K = 16, 4
NUM_TOKENS = (1, 2, 1, 3, 1, 1, 2, 1, 40, 1, 2, 1, 300, 1)
ROOM = 4 * (2 << 20)  # of a layer, for five to seven experts

Passes = list[np.ndarray]


def outputs(rank: int, *, port: int, folder: Path) -> dict[str, tuple[Passes, Passes]]:
    """By kind of weights, of layers that are ordinary, and of the same with a bank."""
    engine_process.start(rank, 1, port)
    config = folder / "dwdp.yaml"
    room = experts.NUM_LAYERS * ROOM
    config.write_text(f"group_size: 1\nhost_experts: 14\nmode: in_place\nchecksums: true\nexpert_bank: {room}\n")
    found = {}
    for kind in KINDS:
        os.environ.pop("VMM_DWDP_CONFIG", None)
        ordinary = passes(kind, rank)
        os.environ["VMM_DWDP_CONFIG"] = str(config)
        found[kind] = ordinary, passes(kind, rank)
    return found


def passes(kind: str, rank: int) -> Passes:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    engine_process.use_runner("triton", rank, 1)
    model: Any = experts.model(kind, NUM_EXPERTS, TOP_K)
    experts.load(model)
    manager = engine_process.init_dwdp(model)
    generator = torch.Generator(device="cpu").manual_seed(1)
    found = []
    for num_tokens in NUM_TOKENS:
        hidden = torch.randn(num_tokens, experts.HIDDEN, generator=generator, device="cpu")
        hidden = hidden.to(engine_process.DEVICE, torch.bfloat16)
        for layer in model.layers:
            logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator, device="cpu")
            weights, chosen = logits.to(engine_process.DEVICE).softmax(dim=-1).topk(TOP_K)
            routed = StandardTopKOutput(weights.float(), chosen.to(torch.int32), logits)
            hidden = hidden + layer.forward_impl(hidden.clone(), routed)
        found.append(hidden.float().cpu().numpy())
    if manager is not None:
        runtime = manager.runtime
        for number, counts in runtime.bank_counts().items():
            assert 0 < counts.hits < counts.uses
            assert counts.copied > runtime.stats().bank.rows[number]
        runtime.check_integrity(verify=True)
        engine_process.shut_down()
    return found


def test_layers_with_a_bank_have_the_bits_of_ordinary_ones(tmp_path: Path) -> None:
    [found] = run_group(partial(outputs, port=free_port(), folder=tmp_path), 1, engine_process.DEVICE)
    assert found.keys() == set(KINDS)
    for kind, (ordinary, with_a_bank) in found.items():
        assert all(output.std() > 0.1 for output in ordinary)
        assert all(map(np.array_equal, with_a_bank, ordinary)), kind


SERVED = [kind for kind, runner in test_loading.KINDS.items() if runner == "triton" and "fp8 tensor" not in kind]


def load_with_a_bank(rank: int, *, port: int, folder: Path) -> dict[str, str]:
    """By kind of weights, what is wrong with what its kernels read."""
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import manager

    manager.open_driver = lambda device: HostDriver(test_loading.PAGE_NBYTES)
    engine_process.start(rank, 1, port)
    config = folder / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 6\nmode: in_place\nchecksums: true\nexpert_bank: 12 MB\n")
    found = {}
    for kind in SERVED:
        models: list[Any] = []
        for environment in ({}, {"VMM_DWDP_CONFIG": str(config)}):
            os.environ.pop("VMM_DWDP_CONFIG", None)
            os.environ.update(environment)
            engine_process.use_runner("triton", rank, 1)
            with experts.without_a_gpu():
                models.append(experts.model(kind))
                experts.load(models[-1])
        runtime = engine_process.init_dwdp(models[1]).runtime
        found[kind] = ", ".join(sorted(different(*models, runtime)))
        runtime.check_integrity(verify=True)
        engine_process.shut_down()
    return found


def same_bytes(read: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (read, expected)))


def different(whole: Any, model: Any, runtime: Any) -> set[str]:
    """Tensors in which rows that were looked up have other bytes than their experts in a whole model."""
    wrong = set()
    for layer, ordinary in zip(model.layers, whole.layers, strict=True):
        names = test_loading.tensors_of(ordinary)
        for chosen in ((0, 5), (5, 7), (2, 3), (7, 1), (6, 5)):
            with runtime.layer(layer.layer_id, tokens=1):
                rows = runtime.look_up(layer.layer_id, torch.tensor([chosen], dtype=torch.int32)).rows.flatten().long()
                found, expected = (experts.tensors(each, names) for each in (layer, ordinary))
                for name, tensor, one in zip(names, found, expected, strict=True):
                    if not same_bytes(tensor[rows], one[list(chosen)]) or len(tensor) <= len(one):
                        wrong.add(name)
                del found, tensor
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

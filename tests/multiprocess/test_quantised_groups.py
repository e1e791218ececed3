"""Quantised checkpoints over real processes: every bit of the logits that transformers itself computes from them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import PAGE, same_bytes
from support.moe_models import NUM_EXPERTS, logits
from support.mxfp4_kernels import TiledLayout, keeping_mxfp4
from support.quantised_models import CHECKPOINTS, COMPRESSED, keeping_fp8, save, tensors_of, whole_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import from_pretrained
from vmm_dwdp.testing import run_group

try:
    import compressed_tensors  # noqa: F401
except ImportError:
    NAMES = [*CHECKPOINTS]
else:
    NAMES = [*CHECKPOINTS, *COMPRESSED]
GROUPS = {
    "alone, host memory, staged": DWDPConfig(group_size=1, host_experts=3),
    "alone, host memory, in place": DWDPConfig(group_size=1, host_experts=3, mode="in_place", prefetch_depth=0),
    "2 ranks, in place": DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0),
    "3 ranks, overlap, host memory, staged": DWDPConfig(group_size=3, num_local_experts=3, host_experts=2),
    "2 ranks, lists": DWDPConfig(group_size=2, assembly="tensor_list"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each checkpoint, with the logits of the model that transformers loads from it."""
    root = tmp_path_factory.mktemp("quantised")
    torch.set_num_threads(1)
    for name in NAMES:
        torch.save(logits(whole_model(save(name, root / name))), root / f"{name}.logits")
    return root


def run_checkpoints(rank: int, root: Path, config: DWDPConfig, case: str) -> list[str]:
    """What went wrong, by checkpoint."""
    wrong = []
    for name in NAMES:
        meeting = root / f"{NAMES.index(name)}-{[*GROUPS].index(case)}"
        model = from_pretrained(
            root / name, config, rank=rank, device="cpu", rendezvous=meeting, driver=HostDriver(PAGE), dtype="auto"
        )
        reference = torch.load(root / f"{name}.logits")
        if not all(torch.equal(logits(model), reference) for _ in range(2)):
            wrong.append(f"rank {rank}: {name}: logits differ")
        stats = model.dwdp.stats()
        if not (stats.in_place if config.mode == "in_place" else stats.fetched_bytes):
            wrong.append(f"rank {rank}: {name}: nothing of others was read")
        if left := model.dwdp.close().open():
            wrong.append(f"rank {rank}: {name}: left {left}")
    return wrong


@pytest.mark.parametrize("case", GROUPS)
def test_every_checkpoint_gives_the_logits_of_transformers_own_model(saved: Path, case: str) -> None:
    config = GROUPS[case]
    wrong = run_group(functools.partial(run_checkpoints, root=saved, config=config, case=case), config.group_size)
    assert wrong == [[]] * config.group_size


# -- where transformers keeps experts quantised: weights and scales are both spread -----------------------------------

GROUPS_OF_KEPT = [
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2, num_local_experts=5, prefetch_depth=1),
    DWDPConfig(group_size=3, host_experts=2, mode="in_place", prefetch_depth=0),
    DWDPConfig(group_size=2, assembly="tensor_list"),
]


def look_at_fp8(weights: Any, stored: dict[str, torch.Tensor]) -> None:
    for expert in range(NUM_EXPERTS):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert same_bytes(weights["down_proj"][expert], stored[name])
        assert same_bytes(weights["down_proj_scale_inv"][expert], stored[f"{name}_scale_inv"])


def look_at_mxfp4(weights: Any, stored: dict[str, torch.Tensor]) -> None:
    """In the kernels' layout, which is undone here."""
    name = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    layout = TiledLayout((NUM_EXPERTS, blocks[0, 0].numel(), blocks.shape[1]))
    columns = layout.swizzle_data(torch.empty(layout.initial_shape)).shape[1]
    tiled = weights["down_proj_blocks"].view(NUM_EXPERTS, -1, columns).mT
    assert same_bytes(layout.unswizzle_data(tiled).mT.contiguous(), blocks.flatten(2))
    assert same_bytes(weights["down_proj_scales"].view(scales.shape), scales)


KEPT = {
    "qwen3_moe fp8": (keeping_fp8, look_at_fp8, ("eager", "grouped_mm"), 1),
    "gpt_oss mxfp4": (keeping_mxfp4, look_at_mxfp4, ("eager",), 2),
}
"""How transformers is made to keep it, what the weights are to be, experts implementations, and numbers in a byte."""


def run_kept(rank: int, root: Path, meeting: Path, config: DWDPConfig) -> dict[str, int]:
    """Bytes of this rank's experts by checkpoint, once all bytes and bits are as they should be."""
    torch.set_num_threads(1)
    resident = {}
    for number, (name, (keeping, look, implementations, _)) in enumerate(KEPT.items()):
        for experts in implementations:
            place = {"rendezvous": meeting / f"{number}-{experts}", "device": "cpu", "driver": HostDriver(PAGE)}
            with keeping():
                wanted = logits(whole_model(root / name, experts_implementation=experts))
                stated = {"experts_implementation": experts, "dtype": "auto", **place}
                model = from_pretrained(root / name, config, rank=rank, **stated)
                assert all(torch.equal(logits(model), wanted) for _ in range(2)), (name, experts)
            with model.dwdp as runtime:
                if config.assembly == "vmm":
                    with runtime.layer(1) as weights:
                        look(weights, tensors_of(root / name))
                    del weights
        resident[name] = runtime.stats().resident_bytes
    return resident


@pytest.mark.parametrize("config", GROUPS_OF_KEPT, ids=lambda c: f"{c.group_size}-{c.mode}-{c.assembly}")
def test_weights_and_scales_that_transformers_keeps_are_spread(saved: Path, config: DWDPConfig, tmp_path: Path) -> None:
    run = functools.partial(run_kept, root=saved, meeting=tmp_path, config=config)
    resident = run_group(run, config.group_size)
    if config.group_size == 1:
        for name, (*_, numbers) in KEPT.items():
            experts = [tensor for key, tensor in tensors_of(saved / name).items() if ".experts." in key]
            in_bf16 = sum(2 * numbers * tensor.numel() for tensor in experts if tensor.element_size() == 1)
            assert resident[0][name] < 0.6 / numbers * in_bf16, f"{name}: a {2 * numbers}th of what bf16 would take"

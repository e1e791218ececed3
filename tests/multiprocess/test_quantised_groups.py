"""Quantised checkpoints over real processes: every bit of the logits that transformers itself computes from them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, same_bytes
from support.moe_models import NUM_EXPERTS, logits
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


# -- where transformers keeps FP8: weights and scales are both spread ------------------------------------------------

FP8 = "qwen3_moe fp8"
KEPT = [
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2, num_local_experts=5, prefetch_depth=1),
    DWDPConfig(group_size=3, mode="in_place", prefetch_depth=0),
    DWDPConfig(group_size=2, assembly="tensor_list"),
]


def run_kept(rank: int, folder: Path, meeting: Path, config: DWDPConfig) -> int:
    """Bytes of this rank's experts, once all bytes and bits are as they should be."""
    torch.set_num_threads(1)
    stored = tensors_of(folder)
    for experts in ("eager", "grouped_mm"):
        with keeping_fp8():
            wanted = logits(whole_model(folder, experts_implementation=experts))
            place = {"rendezvous": meeting / experts, "device": "cpu", "driver": HostDriver(PAGE), "dtype": "auto"}
            model = from_pretrained(folder, config, rank=rank, experts_implementation=experts, **place)
            assert torch.equal(logits(model), wanted), experts
            with model.dwdp as runtime:
                for expert in range(NUM_EXPERTS) if config.assembly == "vmm" else ():
                    name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
                    with runtime.layer(1) as weights:
                        assert same_bytes(weights["down_proj"][expert], stored[name])
                        assert same_bytes(weights["down_proj_scale_inv"][expert], stored[f"{name}_scale_inv"])
                    del weights
    return runtime.stats().resident_bytes


@pytest.mark.parametrize("config", KEPT, ids=lambda config: f"{config.group_size}-{config.mode}-{config.assembly}")
def test_weights_and_scales_that_transformers_keeps_are_spread(saved: Path, config: DWDPConfig, tmp_path: Path) -> None:
    run = functools.partial(run_kept, folder=saved / FP8, meeting=tmp_path, config=config)
    resident = run_group(run, config.group_size)
    stored = tensors_of(saved / FP8)
    in_bf16 = sum(2 * tensor.numel() for name, tensor in stored.items() if ".experts." in name)
    if config.group_size == 1:
        assert resident[0] < 0.6 * in_bf16, "it takes half of what dequantised experts would"

"""Quantised checkpoints on a GPU: FP8 stays FP8 there, and what is dequantised gives transformers' own bits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.groups import same_bytes
from support.moe_models import NUM_EXPERTS, logits
from support.quantised_models import keeping_fp8, save, tensors_of, whole_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.integrations.transformers import from_pretrained
from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.gpu

FP8, MXFP4 = "qwen3_moe fp8", "gpt_oss mxfp4"
GROUPS = [
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2, num_local_experts=5, prefetch_depth=1),
    DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0),
]


def load(folder: Path, config: DWDPConfig, rank: int, meeting: Path, **kwargs: Any) -> transformers.PreTrainedModel:
    return from_pretrained(folder, config, rank=rank, device="cuda", rendezvous=meeting, dtype="auto", **kwargs)


def run_fp8(rank: int, folder: Path, meeting: Path, config: DWDPConfig) -> None:
    """With kernels of torch's operations, for the whole model and for the one that is spread."""
    stored = tensors_of(folder)
    with keeping_fp8():
        implementation = {"experts_implementation": "grouped_mm"}
        wanted = logits(whole_model(folder, device_map={"": "cuda"}, **implementation))
        model = load(folder, config, rank, meeting, **implementation)
        assert torch.equal(logits(model), wanted)
        with model.dwdp as runtime:
            for expert in range(NUM_EXPERTS):
                name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
                with runtime.layer(1) as weights:
                    assert same_bytes(weights["down_proj"][expert], stored[name])
                    assert same_bytes(weights["down_proj_scale_inv"][expert], stored[f"{name}_scale_inv"])
                del weights


def run_dequantised(rank: int, folder: Path, meeting: Path, config: DWDPConfig) -> None:
    stated = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    wanted = logits(whole_model(folder, device_map={"": "cuda"}, **stated))
    model = load(folder, config, rank, meeting, **stated)
    with model.dwdp:
        assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(("name", "run"), [(FP8, run_fp8), (MXFP4, run_dequantised)], ids=["fp8", "mxfp4"])
@pytest.mark.parametrize("config", GROUPS, ids=lambda config: f"{config.group_size}-{config.mode}")
def test_a_group_gives_the_bits_of_the_whole_model(name: str, run: Any, config: DWDPConfig, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    run_group(functools.partial(run, folder=folder, meeting=tmp_path / "group", config=config), config.group_size)

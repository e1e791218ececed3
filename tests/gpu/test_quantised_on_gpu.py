"""Quantised checkpoints on a GPU: FP8 and MXFP4 stay so there, and what is dequantised gives transformers' own bits.

transformers downloads its kernels. Here FP8 has kernels of torch's operations, and MXFP4 both such ones and those that
transformers downloads, if their package ``gpt_oss_triton_kernels`` can be imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.groups import same_bytes
from support.moe_models import NUM_EXPERTS, logits
from support.mxfp4_kernels import keeping_mxfp4
from support.quantised_models import keeping_fp8, save, tensors_of, whole_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.integrations.transformers import from_pretrained
from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.gpu

FP8, MXFP4 = "qwen3_moe fp8", "gpt_oss mxfp4"
HUB = "gpt_oss_triton_kernels"
GROUPS = [
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2, num_local_experts=5, prefetch_depth=1),
    DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0),
]
Keeping = Callable[[], AbstractContextManager[None]]
Look = Callable[[Any, dict[str, torch.Tensor]], None]


def look_at_fp8(model: Any, stored: dict[str, torch.Tensor]) -> None:
    for expert in range(NUM_EXPERTS):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        with model.dwdp.layer(1) as weights:
            assert same_bytes(weights["down_proj"][expert], stored[name])
            assert same_bytes(weights["down_proj_scale_inv"][expert], stored[f"{name}_scale_inv"])
        del weights


def look_at_mxfp4(model: Any, stored: dict[str, torch.Tensor]) -> None:
    """Scales are in the order of the checkpoint; blocks are not, but are as many."""
    name = "model.layers.1.mlp.experts.down_proj"
    with model.dwdp.layer(1) as weights:
        scales = stored[f"{name}_scales"]
        assert same_bytes(weights["down_proj_scales"].view(scales.shape), scales)
        assert weights["down_proj_blocks"].numel() >= stored[f"{name}_blocks"].numel()
    del weights


def keeping_with_hub() -> AbstractContextManager[None]:
    return keeping_mxfp4(importlib.import_module(HUB))


CASES: dict[str, tuple[str, Keeping, dict[str, Any], Look | None]] = {
    "fp8": (FP8, keeping_fp8, {"experts_implementation": "grouped_mm"}, look_at_fp8),
    "mxfp4": (MXFP4, keeping_mxfp4, {}, look_at_mxfp4),
    "mxfp4-hub": (MXFP4, keeping_with_hub, {}, look_at_mxfp4),
    "dequantised": (
        MXFP4,
        contextlib.nullcontext,
        {"quantization_config": transformers.Mxfp4Config(dequantize=True)},
        None,
    ),
}
"""The checkpoint, how transformers is made to keep it quantised, what it is told, and what the weights are to be."""


def run_case(rank: int, case: str, folder: Path, meeting: Path, config: DWDPConfig) -> None:
    _, keeping, stated, look = CASES[case]
    with keeping():
        wanted = logits(whole_model(folder, device_map={"": "cuda"}, **stated))
        place = {"device": "cuda", "rendezvous": meeting, "dtype": "auto"}
        model = from_pretrained(folder, config, rank=rank, **place, **stated)
        with model.dwdp:
            for _ in range(3):
                assert torch.equal(logits(model), wanted)
            if look is not None:
                look(model, tensors_of(folder))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", GROUPS, ids=lambda config: f"{config.group_size}-{config.mode}")
def test_a_group_gives_the_bits_of_the_whole_model(case: str, config: DWDPConfig, tmp_path: Path) -> None:
    if case == "mxfp4-hub":
        pytest.importorskip(HUB)
    folder = save(CASES[case][0], tmp_path / "model")
    run = functools.partial(run_case, case=case, folder=folder, meeting=tmp_path / "group", config=config)
    run_group(run, config.group_size)


def test_kernels_that_transformers_downloads_compute_what_the_numbers_say(tmp_path: Path) -> None:
    """So that the bits above are those of a model, and not of a kernel that does nothing."""
    hub = pytest.importorskip(HUB)
    folder = save(MXFP4, tmp_path / "model")
    on_gpu: dict[str, Any] = {"device_map": {"": "cuda"}}
    dequantised = logits(whole_model(folder, quantization_config=transformers.Mxfp4Config(dequantize=True), **on_gpu))
    with keeping_mxfp4(hub):
        model = whole_model(folder, **on_gpu)
        assert model.model.layers[0].mlp.experts.gate_up_proj_precision_config is not None, "it is kept in MXFP4"
        torch.testing.assert_close(logits(model), dequantised, rtol=0.05, atol=0.05)

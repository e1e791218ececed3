"""Models with spread experts on a GPU: several processes share it, and give every bit of the whole model's logits."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.moe_models import logits, prompt, tiny_model
from transformers import AutoModelForCausalLM

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.integrations.transformers import attach, from_pretrained, tensor_list
from vmm_dwdp.kernels import tensor_list_grouped_gemm
from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.gpu

# Experts of 1.5 and 0.75 MiB in bf16: several pages a weight, and no expert a multiple of a page.
SIZES: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 768, "intermediate_size": 768, "head_dim": 128}
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
GROUPS = [
    DWDPConfig(group_size=3, num_local_experts=3, host_experts=2),
    DWDPConfig(group_size=2, assembly="tensor_list"),
]
"""Overlapping shards and a pool of host memory; and lists of tensors, multiplied by torch as the whole model's are."""

BY_TORCH = functools.partial(tensor_list_grouped_gemm, provider="torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each family, with the logits and a continuation of the whole model on this GPU beside it."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        sizes = {key: value for key, value in SIZES.items() if family != "deepseek_v3" or key != "head_dim"}
        tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(root / family)
        whole = AutoModelForCausalLM.from_pretrained(root / family, device_map={"": "cuda"})
        tokens = whole.generate(prompt("cuda")[:1], max_new_tokens=6, do_sample=False)
        torch.save((logits(whole).cpu(), tokens.cpu()), root / f"{family}.expected")
    return root


def run_families(rank: int, root: Path, config: DWDPConfig) -> list[str]:
    """What went wrong, by family and way of loading."""
    wrong = []
    for family, how in itertools.product(FAMILIES, ("from_pretrained", "attach")):
        case = f"rank {rank} of {config.group_size}, {family}, {how}"
        rendezvous = root / f"{family}-{how}-{config.group_size}"
        if how == "from_pretrained":
            model = from_pretrained(root / family, config, rank=rank, device="cuda", rendezvous=rendezvous)
        else:
            model = AutoModelForCausalLM.from_pretrained(root / family)
            attach(model, DWDPRuntime(config, rank, "cuda", rendezvous))
            model.to("cuda")
        expected_logits, expected_tokens = torch.load(root / f"{family}.expected")
        if not all(torch.equal(logits(model).cpu(), expected_logits) for _ in range(3)):
            wrong.append(f"{case}: logits differ")
        tokens = model.generate(prompt("cuda")[:1], max_new_tokens=6, do_sample=False)
        if not torch.equal(tokens.cpu(), expected_tokens):
            wrong.append(f"{case}: text differs")
        if not model.dwdp.stats().fetched_bytes:
            wrong.append(f"{case}: nothing was fetched")
        if left := model.dwdp.close().open():
            wrong.append(f"{case}: left {left}")
    return wrong


def run_families_by_torch(rank: int, root: Path, config: DWDPConfig) -> list[str]:
    """With lists, "auto" may choose a kernel that adds in another order than torch's."""
    with mock.patch.object(tensor_list, "tensor_list_grouped_gemm", BY_TORCH):
        return run_families(rank, root, config)


@pytest.mark.parametrize("config", GROUPS, ids=lambda config: f"{config.group_size}-ranks")
def test_every_family_gives_the_logits_and_the_text_of_the_whole_model(saved: Path, config: DWDPConfig) -> None:
    wrong = run_group(functools.partial(run_families_by_torch, root=saved, config=config), config.group_size, "cuda")
    assert wrong == [[]] * config.group_size

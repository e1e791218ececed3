"""Models of many families with their experts spread over real processes: every bit of the whole model's logits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from support.groups import PAGE
from support.moe_models import FAMILIES, logits, tiny_model

from vmm_dwdp import DWDPConfig, DWDPRuntime, ExchangeError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach, from_pretrained
from vmm_dwdp.integrations.transformers.experts import align_experts
from vmm_dwdp.testing import run_group

GROUPS = [
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2, prefetch_depth=1),
    DWDPConfig(group_size=3, num_local_experts=4, prefetch_depth=2),
]
"""Alone with experts in host memory; a group that does not divide the experts; one with overlap."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each family, as save_pretrained writes it, with the whole model's logits beside it."""
    root = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    for family in FAMILIES:
        model = tiny_model(family)
        model.save_pretrained(root / family)
        whole = type(model).from_pretrained(root / family)
        align_experts(whole)
        torch.save(logits(whole), root / f"{family}.logits")
    return root


def load(how: str, directory: Path, config: DWDPConfig, rank: int, rendezvous: Path) -> transformers.PreTrainedModel:
    if how == "from_pretrained":
        return from_pretrained(
            directory, config, rank=rank, device="cpu", rendezvous=rendezvous, driver=HostDriver(PAGE), timeout=60
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    attach(model, DWDPRuntime(config, rank, "cpu", rendezvous, driver=HostDriver(PAGE)))
    return model


def run_families(rank: int, root: Path, config: DWDPConfig) -> list[str]:
    """What went wrong, by family, way of loading and assembly."""
    wrong = []
    for family, how, assembly in itertools.product(FAMILIES, ("from_pretrained", "attach"), ("vmm", "tensor_list")):
        case = f"{family}, {how}, {assembly}, group of {config.group_size}"
        host_experts = config.host_experts if assembly == "vmm" else 0
        config_of_case = dataclasses.replace(config, assembly=assembly, host_experts=host_experts)
        rendezvous = (
            root / f"{list(FAMILIES).index(family)}{how[0]}{assembly[0]}{config.group_size}"
        )  # short, for a socket
        model = load(how, root / family, config_of_case, rank, rendezvous)
        reference = torch.load(root / f"{family}.logits")
        if not all(torch.equal(logits(model), reference) for _ in range(2)):
            wrong.append(f"rank {rank}: {case}: logits differ")
        if (config.group_size > 1 or host_experts) and not model.dwdp.stats().fetched_bytes:
            wrong.append(f"rank {rank}: {case}: nothing was fetched")
        if left := model.dwdp.close().open():
            wrong.append(f"rank {rank}: {case}: left {left}")
    return wrong


@pytest.mark.parametrize("config", GROUPS, ids=lambda config: f"{config.group_size}-ranks")
def test_every_family_gives_the_logits_of_the_whole_model(saved: Path, config: DWDPConfig) -> None:
    """With lists of tensors too: torch's grouped GEMM gives each expert the same bits in a list as in one tensor."""
    wrong = run_group(functools.partial(run_families, root=saved, config=config), config.group_size)
    assert wrong == [[]] * config.group_size


def refusal(rank: int, root: Path) -> str:
    config = DWDPConfig(group_size=2)
    with pytest.raises(ExchangeError) as refused:
        load("from_pretrained", root / str(rank), config, rank, root / "rendezvous")
    return str(refused.value)


def test_ranks_that_were_given_different_revisions_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "1")
    assert all("differ" in told for told in run_group(functools.partial(refusal, root=tmp_path), 2))

"""Models whose experts move from rank to rank: their logits stay, as each module maps what its router chose.

But for rounding: a kernel may round in another way where an expert begins at another address.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.groups import PAGE, in_threads
from support.moe_models import FAMILIES, logits, tiny_model
from transformers import PreTrainedModel

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach
from vmm_dwdp.integrations.transformers.experts import align_experts

CONFIG = DWDPConfig(group_size=2, mode="in_place", movable_experts=True)
REFUSED = {"llama4_text", "jetmoe"}  # whose modules choose experts themselves, or are told in another way


def attached(family: str, place: Path) -> list[PreTrainedModel]:
    """By each rank."""
    models = [tiny_model(family) for _ in range(2)]
    for rank in range(2):
        align_experts(models[rank])
    drivers = [HostDriver(PAGE) for _ in range(2)]

    def attach_rank(rank: int) -> PreTrainedModel:
        attach(models[rank], DWDPRuntime(CONFIG, rank, "cpu", place, driver=drivers[rank]), timeout=30)
        return models[rank]

    return in_threads(attach_rank, 2)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED))
def test_logits_stay_whoever_holds_an_expert(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family)
    align_experts(whole)
    expected = logits(whole)
    models = attached(family, tmp_path)
    moved = 0
    for _ in range(3):
        for model in models:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        (now,) = set(in_threads(lambda rank: models[rank].dwdp.rebalance(most=4, timeout=20), 2))
        moved += now
    for model in models:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert moved, "experts have moved"
    assert [model.dwdp.close().open() for model in models] == [[], []]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_module_whose_choice_cannot_be_mapped_is_refused(family: str, tmp_path: Path) -> None:
    models = attached(family, tmp_path)
    with pytest.raises(ConfigError, match="the config must not have movable_experts"):
        logits(models[0])
    for model in models:
        model.dwdp.close()

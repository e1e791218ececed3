"""What cannot be spread over nodes is told before anything is loaded; passes that nobody joins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.banked_models import with_rows
from support.groups import PAGE
from support.moe_models import logits, tiny_model

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach, from_pretrained, join_pass
from vmm_dwdp.nodes.rail import NOT_HERE, Dispatched


class NobodyElse:
    """The rail of a node whose rank is alone: others send nothing, and what goes to them is lost."""

    node = 0

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.sent = 0

    def dispatch(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> Dispatched:
        own = num_experts // self.num_nodes
        here = (chosen >= 0) & (chosen < own)
        self.sent += int(here.sum())
        experts = torch.where(here, chosen, NOT_HERE)
        return Dispatched(hidden, experts, weights * here, torch.arange(len(hidden)), [], [], len(hidden))

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return partial


def runtime(tmp_path: Path) -> DWDPRuntime:
    return DWDPRuntime(DWDPConfig(group_size=1), 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE))


@pytest.mark.parametrize(
    ("family", "nodes", "sentence"),
    [
        ("llama4_text", 2, "is not given each token's experts and their weights"),
        ("jetmoe", 2, "is not given each token's experts and their weights"),
        ("qwen3_moe", 8, r"has fewer experts than there are nodes: NodeShare\(num_experts=7, num_nodes=8\)"),
    ],
)
@pytest.mark.parametrize("how", ["from_pretrained", "attach"])
def test_what_cannot_be_spread(how: str, family: str, nodes: int, sentence: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    where = {"rank": 0, "device": "cpu", "rendezvous": tmp_path / "group", "driver": HostDriver(PAGE)}
    ways = {
        "attach": lambda: attach(model, runtime(tmp_path), rail=NobodyElse(nodes)),
        "from_pretrained": lambda: from_pretrained(
            tmp_path,
            DWDPConfig(group_size=1),
            rail=NobodyElse(nodes),
            **where,  # type: ignore[arg-type]
        ),
    }
    with pytest.raises(ConfigError, match=sentence):
        ways[how]()
    assert torch.equal(logits(model), expected), "as it was"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_of_one_node_the_module_computes_all(implementation: str, tmp_path: Path) -> None:
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    for each in whole, model:
        each.set_experts_implementation(implementation)
    with runtime(tmp_path) as opened:
        attach(model, opened, rail=NobodyElse(1))
        torch.testing.assert_close(logits(model), logits(whole))


def test_a_pass_that_is_joined_sends_nothing(tmp_path: Path) -> None:
    model, rail = tiny_model("qwen3_moe"), NobodyElse(2)
    with runtime(tmp_path) as opened:
        attach(model, opened, rail=rail)
        join_pass(model)
        assert rail.sent == 0
        logits(model)
        assert rail.sent > 0
        assert opened.stats().hits == 2 * len(opened.stats().layers)
        with pytest.raises(ValueError, match="exactly one of input_ids"):  # nothing of it is left over
            join_pass(model, nonsense=1)
        before = rail.sent
        logits(model)
        assert rail.sent == 2 * before


def test_nobody_joins_a_model_of_one_node() -> None:
    with pytest.raises(ConfigError, match="the model is not spread over nodes"):
        join_pass(tiny_model("qwen3_moe"))


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_nodes_experts_are_looked_up_in_a_bank(nodes: int, tmp_path: Path) -> None:
    """Pairs of a token and an expert of this node are; and what a rank computes is as without a bank."""
    in_place = DWDPConfig(group_size=1, host_experts=3, mode="in_place", prefetch_depth=0)
    found = []
    for number, config in enumerate((in_place, with_rows(in_place, tiny_model("qwen3_moe"), 2, PAGE))):
        place = tmp_path / str(number)
        with DWDPRuntime(config, 0, "cpu", place, driver=HostDriver(PAGE)) as opened, torch.no_grad():
            model = tiny_model("qwen3_moe")
            attach(model, opened, rail=NobodyElse(nodes))
            found.append([model(torch.tensor([[token, token + 1]])).logits for token in range(3, 20)])
            if config.expert_bank:
                assert all(0 < counts.hits < counts.uses for counts in opened.bank_counts().values())
                opened.check_integrity(verify=True)
    assert all(map(torch.equal, *found))

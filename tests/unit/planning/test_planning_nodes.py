"""Experts over nodes on paper: bytes against counting, rails that meet against sums, and crossovers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.nodes import NodeShare
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.nodes import Network, Nodes
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate

LAYERS, PASSES = 3, 4


def estimate(nodes: int = 2, size: int = 2, tokens: int = 8192, rate: float = 43e9) -> Estimate:
    return Estimate(
        load_model("qwen3-235b-a22b"),
        load_gpu("h200"),
        DWDPConfig(group_size=size),
        Batch.of(tokens),
        nodes=Nodes(nodes, Network("as stated", rate)),
    )


@pytest.mark.parametrize(("nodes", "size", "times"), [(2, 2, 3.0), (2, 4, 7 / 3), (4, 2, 7.0), (2, 8, 15 / 7)])
def test_bytes_fall_by_what_counting_experts_says(nodes: int, size: int, times: float) -> None:
    """Experts that one rank does not hold, in one group of all and in its node's."""
    example = estimate(nodes, size)
    experts = example.model.num_experts
    elsewhere = experts - experts // (nodes * size)
    elsewhere_in_node = experts // nodes - experts // nodes // size
    assert elsewhere / elsewhere_in_node == pytest.approx(times)
    each = example.model.layer_expert_bytes // experts
    assert example.one_group_bytes == elsewhere * each
    assert example.plan.fetched_bytes == pytest.approx(elsewhere_in_node * each, rel=0.01), "but for shared pages"


@pytest.mark.parametrize(("experts", "nodes", "top_k"), [(6, 2, 2), (7, 2, 3), (5, 4, 2), (6, 3, 1)])
def test_nodes_that_a_token_goes_to_against_every_choice(experts: int, nodes: int, top_k: int) -> None:
    model = dataclasses.replace(load_model("qwen3-30b-a3b"), num_experts=experts, top_k=top_k)
    share = NodeShare(experts, nodes)
    choices = list(itertools.combinations(range(experts), top_k))
    visited = sum(len({share.locate(expert)[0] for expert in choice}) for choice in choices) / len(choices)
    assert Nodes(nodes).visits(model) == pytest.approx(visited)
    elsewhere = sum(
        len({share.locate(expert)[0] for expert in choice} - {home}) for choice in choices for home in range(nodes)
    ) / (len(choices) * nodes)
    assert Nodes(nodes).sent_bytes(model, 100) == pytest.approx(100 * elsewhere * model.hidden * 2)


def test_a_node_less_is_the_plan_as_before() -> None:
    example = estimate(nodes=1, size=4)
    before = Estimate(example.model, example.gpu, example.config, example.batch)
    for figure in ("dwdp_seconds", "expert_parallel_seconds", "pays_from", "memory", "world_size"):
        assert getattr(example, figure) == getattr(before, figure), figure


def test_a_slow_network_is_in_the_time_and_a_fast_one_is_not() -> None:
    fast, slow = estimate(rate=1e15), estimate(rate=1e9)
    sent = slow.nodes.sent_bytes(slow.model, 8192)
    layers = len(slow.model.moe_layers)
    assert slow.dwdp_seconds - fast.dwdp_seconds == pytest.approx(layers * 2 * sent / 1e9, rel=0.05)
    assert slow.layer_seconds > slow.copying_seconds


def test_copies_are_hidden_with_as_many_fewer_tokens_as_bytes() -> None:
    """The tokens from which compute takes as long as the copies: by the bytes, and by ranks that meet less often."""

    def hidden_from(example: Estimate) -> float:
        low, high = 1, 1 << 20
        while high - low > max(1, high // 200):
            middle = (low + high) // 2
            other = example.with_tokens(middle)
            low, high = (middle, high) if other.work.seconds < copying(other) else (low, middle)
        return high

    def copying(example: Estimate) -> float:
        return example.prefetch_seconds

    one, two = estimate(nodes=1, size=4, rate=1e15), estimate(nodes=2, size=2, rate=1e15)
    assert copying(one) / copying(two) == pytest.approx(3.0, rel=0.01)
    assert 2.0 < hidden_from(one) / hidden_from(two) < 4.0


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="more than 0 bytes a second, not 0"):
        Network("none", 0)
    with pytest.raises(ConfigError, match="qwen3-235b-a22b has 128 experts, fewer than 129 nodes"):
        _ = estimate(nodes=129).share


# -- rails in the simulator --------------------------------------------------------------------------------------------


def group(nodes: int, size: int, nbytes: int = 10) -> Group:
    return Group(
        config=DWDPConfig(group_size=size),
        weights={"w": WeightSpec((size, nbytes), torch.uint8)},
        num_layers=LAYERS,
        granularity=1,
        rates=Rates(reader=1e3, owner=1e3, host_reader=1.0, host=1.0),
        nodes=nodes,
    )


def layer(before: float, experts: float, exchange: float) -> LayerWork:
    meeting = Phase(exchange, meets=True)
    return LayerWork((meeting, Phase(before), meeting), (Phase(experts),))


def test_a_rail_takes_as_long_as_its_slowest_rank_and_others_do_not_wait() -> None:
    before = [[1.0, 2.0], [4.0, 3.0], [2.0, 9.0]]  # by node and rank
    work = [[layer(before[node][rank], 0.5, 0.25)] * PASSES for node in range(3) for rank in range(2)]
    found = simulate(group(3, 2), work)
    for rail, slowest in ((0, 4.0), (1, 9.0)):
        per_layer = slowest + 0.5 + 2 * 0.25
        for place in range(rail, 6, 2):
            ends = found.pass_end[place]
            assert ends == pytest.approx([LAYERS * per_layer * number for number in range(1, PASSES + 1)])
            waited = LAYERS * PASSES * (slowest - before[place // 2][rail])
            assert found.meeting[place] == pytest.approx(waited)


def test_nodes_do_not_share_links() -> None:
    work = [[LayerWork((Phase(0.01),), (Phase(0.01),))] * PASSES]
    alone = simulate(group(1, 3, 10_000), work * 3)
    beside = simulate(group(2, 3, 10_000), work * 6)
    assert alone.exposed.sum() > 0
    assert beside.pass_end[:3] == pytest.approx(alone.pass_end)
    assert beside.pass_end[3:] == pytest.approx(alone.pass_end)


def test_ranks_that_would_wait_for_ever_are_refused() -> None:
    work = [[layer(1.0, 1.0, 0.1)] * PASSES] * 3
    with pytest.raises(ConfigError, match="the ranks of number 1 do not meet equally often on all nodes"):
        simulate(group(2, 2), [*work, [layer(1.0, 1.0, 0.1)]])
    with pytest.raises(ConfigError, match="there is work for 3 ranks, but the group has 4"):
        simulate(group(2, 2), work)

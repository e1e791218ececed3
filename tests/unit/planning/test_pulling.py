"""Owners chosen as copies go, in the simulator: who claims what, and what is left of the links."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, Segment
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.placement import HOST
from vmm_dwdp.layout.turns import Line, pullers
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.contention import reached_share
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.pulling import ENGINE_TURN, Chosen, Page, Turns, planned_flows
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate
from vmm_dwdp.planning.work import link_rates

MIB = 1 << 20
BUSY = LayerWork((Phase(1e-9),), (Phase(1e-9),))


def group(size: int, turns: Turns | None, **more: object) -> Group:
    """An owner's shard, 8 MiB, takes a second alone."""
    return Group(
        config=DWDPConfig(group_size=size),
        weights={"w": WeightSpec((size, 8 * MIB), torch.uint8)},
        num_layers=4,
        granularity=1,
        rates=Rates(reader=8.0 * MIB, owner=8.0 * MIB, host_reader=1.0, host=1.0),
        turns=turns,
        **more,  # type: ignore[arg-type]
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.sampled_from([None, 2, 3]))
def test_a_page_counts_what_pullers_counts(claims: list[tuple[int, int]], sees: int | None) -> None:
    page = Page(6, sees)
    claimed = dict(claims)  # by rank, one owner
    for rank, owner in claimed.items():
        page.claim(rank, owner, 1)
    lines = [Line(1, [int(claimed.get(rank) == owner) for owner in range(6)]) for rank in range(6)]
    for rank in set(range(6)) - claimed.keys():
        alive = [other // (sees or 6) == rank // (sees or 6) for other in range(6)]
        assert page.pulled(rank) == pullers(rank, lines, alive)


def test_a_claim_ends_with_its_run_and_all_runs_are_taken() -> None:
    page = Page(4, None)
    config, weights = DWDPConfig(group_size=4), {"w": WeightSpec((4, 8 * MIB), torch.uint8)}
    pulls = Chosen(describe_layer(0, weights, config, 1, 1).plan, 1, 4, Turns(run_bytes=4 * MIB), page)
    pulls.begin()
    taken = []
    while (flow := pulls.take(0)) is not None:
        taken.append(flow)
        assert sum(page.pulled(0)) == 1
        last = pulls.end(0)
        assert sum(page.pulled(0)) == 0
        assert last == (len(taken) == 6)

    assert [flow.nbytes for flow in taken] == [4 * MIB] * 6
    assert [next(iter(flow.shares)) for flow in taken] == [2, 3, 0, 2, 3, 0], "most bytes left, then the next higher"


def test_one_rank_alone_has_no_gaps_and_two_lose_them() -> None:
    turns = Turns(run_bytes=2 * MIB, gap=0.05)
    late = [0.0, 1e6, 2e6, 3e6]

    alone = simulate(group(4, turns, start=late), [[BUSY] * 2] * 4)
    assert (alone.pass_end[:, -1] - late) == pytest.approx(np.full(4, 2 * 4 * 3.0), rel=1e-6)

    together = simulate(group(4, turns), [[BUSY] * 2] * 4)
    spent = together.pass_end[:, 1] - together.pass_end[:, 0]
    if_nobody_met = 4 * (3.0 + 12 * 0.05)  # 12 runs a layer, each with its gap
    assert (spent >= if_nobody_met * (1 - 1e-6)).all()
    assert (spent <= if_nobody_met * 1.07).all()


def test_two_ranks_have_nothing_to_choose_and_lose_nothing() -> None:
    outcome = simulate(group(2, Turns(run_bytes=2 * MIB, gap=0.5)), [[BUSY] * 2] * 2)

    assert outcome.pass_end[:, -1] == pytest.approx(np.full(2, 2 * 4 * 1.0), rel=1e-6)


def test_copies_from_host_memory_go_beside_the_runs() -> None:
    """Three ranks with a third of six experts in host memory: six seconds of either, at once."""
    weights = {"w": WeightSpec((9, 8 * MIB), torch.uint8)}
    of_host = dataclasses.replace(
        group(3, Turns(run_bytes=4 * MIB)),
        config=DWDPConfig(group_size=3, host_experts=3),
        weights=weights,
        rates=Rates(reader=8.0 * MIB, owner=80.0 * MIB, host_reader=4.0 * MIB, host=80.0 * MIB),
    )

    outcome = simulate(of_host, [[BUSY] * 2] * 3)

    assert outcome.pass_end[:, -1] == pytest.approx(np.full(3, 2 * 4 * 6.0), rel=1e-6)


def test_streams_take_turns_through_a_switch_and_run_side_by_side_elsewhere() -> None:
    def piece(owner: object, nbytes: int) -> Segment:
        return Segment("w", owner, range(nbytes))  # type: ignore[arg-type]

    plan = LayerPlan((), ((piece(1, 2 * ENGINE_TURN),), (piece(2, ENGINE_TURN + 5),), (piece(HOST, 7),)))
    by_owner = [[(next(iter(flow.shares)), flow.nbytes) for flow in lane] for lane in planned_flows(plan, True)]

    assert by_owner == [[(1, ENGINE_TURN), (2, ENGINE_TURN), (1, ENGINE_TURN), (2, 5)], [(HOST, 7)]]
    assert [len(lane) for lane in planned_flows(plan, False)] == [1, 1, 1]


@pytest.mark.parametrize(("alone", "compute"), [(1.0, 0.1), (1.0, 1.0), (1.0, 2.0), (1.0, 100.0)])
def test_what_is_reached_agrees_with_how_much_is_copied(alone: float, compute: float) -> None:
    share = reached_share(alone, 0.6, lambda reached: max(compute, alone / reached))

    copying = alone / share
    assert share == pytest.approx(1 - 0.4 * copying / max(compute, copying), abs=1e-3)


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
@pytest.mark.parametrize("turns", [None, Turns(gap=25e-6)])
def test_an_estimate_is_near_the_simulator_where_ranks_are_out_of_step(tokens: int, turns: Turns | None) -> None:
    model, gpu = load_model("qwen3-235b-a22b"), load_gpu("h200")
    estimate = Estimate(model, gpu, DWDPConfig(group_size=4), Batch.of(tokens, 4096), turns=turns)

    chance = np.random.default_rng(0)
    simulated = Group(
        config=estimate.config,
        weights=model.expert_weights,
        num_layers=8,
        granularity=gpu.granularity,
        rates=link_rates(gpu),
        turns=turns,
        start=(estimate.prefetch_seconds * chance.random(4)).tolist(),
    )
    outcome = simulate(simulated, [[estimate.work] * 4] * 4)

    assert estimate.layer_seconds == pytest.approx(outcome.seconds_per_pass / 8, rel=0.08)


def test_owners_are_chosen_only_copy_by_copy() -> None:
    with pytest.raises(ConfigError, match="needs the resolution of copies"):
        simulate(group(2, Turns(), resolution="fetches"), [[BUSY]] * 2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"run_bytes": 4095}, "at least 4096 bytes, not 4095"),
        ({"gap": -1.0}, "at least 0, not -1.0 s"),
        ({"sees": 0}, "at least itself, not 0 ranks"),
    ],
)
def test_turns_that_cannot_be(wrong: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Turns(**wrong)  # type: ignore[arg-type]

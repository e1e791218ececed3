"""Owners chosen as copies go, in the simulator: who claims what, and what is left of the links."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

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
from vmm_dwdp.planning.pulling import ENGINE_TURN, LEAD, Chosen, Given, Page, Turns, planned_flows
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate
from vmm_dwdp.planning.work import link_rates

MIB = 1 << 20
BUSY = LayerWork((Phase(1e-9),), (Phase(1e-9),))


def group(size: int, turns: Turns, **more: object) -> Group:
    """An owner's shard, 8 MiB, takes a second alone."""
    return Group(
        config=DWDPConfig(group_size=size, slice_bytes="auto"),
        weights={"w": WeightSpec((size, 8 * MIB), torch.uint8)},
        num_layers=4,
        granularity=1,
        rates=Rates(reader=8.0 * MIB, owner=8.0 * MIB, host_reader=1.0, host=1.0),
        turns=turns,
        **more,  # type: ignore[arg-type]
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=24), st.sampled_from([None, 2, 3])
)
def test_a_page_counts_what_pullers_counts(changes: list[tuple[int, int, bool]], sees: int | None) -> None:
    page = Page(6, sees)
    lines = [Line(1, [0] * 6) for _ in range(6)]
    for rank, owner, more in changes:
        if more or lines[rank].under_way[owner]:
            page.claim(rank, owner, 1 if more else -1)
            lines[rank].under_way[owner] += 1 if more else -1  # type: ignore[index]
    for rank in range(6):
        alive = [other // (sees or 6) == rank // (sees or 6) for other in range(6)]
        assert page.pulled(rank) == pullers(rank, lines, alive)


def pulls(turns: Turns, page: Page, **config: int) -> Chosen:
    """Of rank 1 of four, whose run of 4 MiB takes half a second alone."""
    stated, weights = DWDPConfig(group_size=4, **config), {"w": WeightSpec((8, 4 * MIB), torch.uint8)}
    plan = describe_layer(0, weights, stated, 1, 1).plan
    return Chosen(plan, 1, 4, dataclasses.replace(turns, run_bytes=4 * MIB), page, 8.0 * MIB)


def owner_of(given: Given) -> int:
    (owner,) = given.flow.shares
    return int(owner)


@pytest.mark.parametrize("native", [True, False])
def test_a_claim_ends_with_its_run_and_all_runs_are_taken(native: bool) -> None:
    page = Page(4, None)
    page.pull(2, True)
    rank = pulls(Turns(gap=0.0, native=native), page)
    rank.begin()
    taken, complete = [], 0
    while under_way := rank.give(float(len(taken))):
        (given,) = under_way
        taken.append(owner_of(given))
        assert (given.flow.nbytes, given.begins) == (4 * MIB, len(taken) - 1.0)
        assert sum(page.pulled(0)) == 1
        complete += rank.end(given.lane, float(len(taken)))
        assert sum(page.pulled(0)) == 0
        assert complete == (len(taken) == 6)

    assert taken == [2, 3, 0, 2, 3, 0], "most bytes left, then the next higher"
    assert page.is_alone(2)


def test_the_next_run_is_given_shortly_before_the_one_under_way_can_end_and_beside_one_that_is_late() -> None:
    page = Page(4, None)
    page.pull(2, True)
    rank = pulls(Turns(gap=0.1), page)
    rank.begin()
    (first,) = rank.give(0.0)
    assert first.begins == 0.1, "a gap, and then half a second"
    assert rank.look == pytest.approx(0.6 - LEAD)
    assert rank.give(0.5) == []
    (second,) = rank.give(rank.look)
    assert (second.lane, second.begins) == (1 - first.lane, pytest.approx(0.7))
    assert rank.look == math.inf, "two are the most"
    rank.end(first.lane, 1.0)  # somebody slowed it
    assert rank.look == math.inf
    assert rank.give(1.0) == []
    assert rank.look == pytest.approx(1.6 - LEAD), "as if the second had not moved beside the first"


def test_a_thread_of_pythons_gives_the_next_run_when_one_has_ended_and_a_gap_later() -> None:
    page = Page(4, None)
    page.pull(2, True)
    rank = pulls(Turns(gap=0.1, native=False), page)
    rank.begin()
    (first,) = rank.give(0.0)
    assert rank.look == math.inf
    rank.end(first.lane, 1.0)
    assert rank.give(1.0) == []
    (second,) = rank.give(rank.look)
    assert (first.begins, second.begins) == (0.0, 1.1)


@pytest.mark.parametrize(("native", "ahead"), [(True, True), (False, False)])
def test_where_every_owner_is_pulled_from_a_run_of_the_next_layer_is_taken(native: bool, ahead: bool) -> None:
    page = Page(4, None)
    page.pull(2, True)
    rank = pulls(Turns(gap=0.0, native=native), page)
    rank.begin()
    for now in range(4):  # of 2, 3, 0 and 2
        (given,) = rank.give(float(now))
        assert rank.end(given.lane, now + 1.0) == 0
    rank.begin()  # the slot of the next layer is free
    page.claim(2, 3, 1)
    page.claim(3, 0, 1)
    (given,) = rank.give(4.0)  # 2 has nothing left of the first layer

    assert owner_of(given) == (2 if ahead else 3)
    assert rank.end(given.lane, 5.0) == 0
    left = []
    while under_way := rank.give(5.0):
        left.append(rank.end(under_way[0].lane, 5.0))
    assert sorted(left) == [0] * 5 + [1, 1], "one layer after the other is complete"


def test_a_layer_is_not_complete_before_the_one_before_it() -> None:
    """All of the second layer has come while one run of the first is late."""
    page = Page(4, None)
    rank = pulls(Turns(gap=0.0), page)
    rank.begin()
    (late, other) = rank.give(0.0)  # nobody else pulls
    for _ in range(5):
        assert rank.end(other.lane, 1.0) == 0
        (other,) = rank.give(1.0) or (other,)
    rank.begin()
    for _ in range(6):
        (other,) = rank.give(2.0)
        assert rank.end(other.lane, 2.0) == 0
    assert rank.end(late.lane, 3.0) == 2


def test_one_rank_alone_has_no_gaps_and_two_lose_them() -> None:
    turns = Turns(run_bytes=2 * MIB, gap=0.05)
    late = [0.0, 1e6, 2e6, 3e6]

    alone = simulate(group(4, turns, start=late), [[BUSY] * 2] * 4)
    assert (alone.pass_end[:, -1] - late) == pytest.approx(np.full(4, 2 * 4 * 3.0), rel=1e-6)

    together = simulate(group(4, turns), [[BUSY] * 3] * 4)
    spent = together.pass_end[:, 1] - together.pass_end[:, 0]  # the last pass has no layer to look ahead to
    if_nobody_met = 4 * (3.0 + 12 * 0.05)  # 12 runs a layer, each with its gap
    assert spent.mean() == pytest.approx(if_nobody_met, rel=0.05)
    assert (spent <= if_nobody_met * 1.1).all()


def test_two_ranks_have_nothing_to_choose_and_lose_nothing() -> None:
    outcome = simulate(group(2, Turns(run_bytes=2 * MIB, gap=0.5)), [[BUSY] * 2] * 2)

    assert outcome.pass_end[:, -1] == pytest.approx(np.full(2, 2 * 4 * 1.0), rel=1e-6)


def test_copies_from_host_memory_go_beside_the_runs() -> None:
    """Three ranks with a third of six experts in host memory: six seconds of either, at once."""
    weights = {"w": WeightSpec((9, 8 * MIB), torch.uint8)}
    of_host = dataclasses.replace(
        group(3, Turns(run_bytes=4 * MIB, gap=0.0)),
        config=DWDPConfig(group_size=3, host_experts=3, slice_bytes="auto"),
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
@pytest.mark.parametrize("slice_bytes", ["streams", "auto"])
@pytest.mark.parametrize("resolution", ["copies", "fetches"])
def test_an_estimate_is_near_the_simulator_where_ranks_are_out_of_step(
    tokens: int, slice_bytes: Literal["streams", "auto"], resolution: Literal["copies", "fetches"]
) -> None:
    model, gpu = load_model("qwen3-235b-a22b"), load_gpu("h200")
    config = DWDPConfig(group_size=4, slice_bytes=slice_bytes)
    estimate = Estimate(model, gpu, config, Batch.of(tokens, 4096))

    chance = np.random.default_rng(0)
    simulated = Group(
        config=estimate.config,
        weights=model.expert_weights,
        num_layers=8,
        granularity=gpu.granularity,
        rates=link_rates(gpu),
        resolution=resolution,
        start=(estimate.prefetch_seconds * chance.random(4)).tolist(),
    )
    outcome = simulate(simulated, [[estimate.work] * 4] * 4)

    assert estimate.layer_seconds == pytest.approx(outcome.seconds_per_pass / 8, rel=0.08)


def test_runs_are_those_of_the_runtime() -> None:
    """Three layers: long enough for runs of 128 MiB, for eight of each owner, and for few of 32 MiB."""
    for shard, length in ((3 << 30, 128 * MIB), (512 * MIB, 64 * MIB), (40 * MIB, 20 * MIB)):
        config = DWDPConfig(group_size=4, slice_bytes="auto")
        plan = describe_layer(0, {"w": WeightSpec((4, shard), torch.uint8)}, config, 0, 1).plan
        rank = Chosen(plan, 0, 4, Turns(), Page(4, None), 1.0)
        rank.begin()
        assert rank.give(0.0)[0].flow.nbytes == length


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

"""Links shared by copies, against the definition of max-min fairness; a group, against sums written out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.contention import contended_share
from vmm_dwdp.planning.links import CopyLinks, FetchLinks, Flow, Rates
from vmm_dwdp.planning.simulator import Group, LayerWork, Outcome, Phase, simulate

READERS, LANES = 4, 3


def rates_of(links: CopyLinks, flows: dict[int, int], nbytes: float = 1.0) -> dict[int, float]:
    """Start the flows, (lane: owner), and say at what rate each runs: bytes over time of the first to end."""
    for lane, owner in flows.items():
        links.start(lane, Flow({owner: 1.0}, nbytes), 0.0)
    links.next_end()
    return {lane: float(links._rate[lane]) for lane in flows}


@given(
    st.dictionaries(st.integers(0, READERS * LANES - 1), st.integers(0, READERS - 1), min_size=1),
    st.floats(1, 10),
    st.floats(1, 10),
    st.floats(0.5, 10),
)
def test_rates_are_max_min_fair(flows: dict[int, int], reader: float, owner: float, pair: float) -> None:
    """No link carries too much, and every flow is at the pair's limit or on a full link on which none is faster."""
    rates = Rates(reader=reader, owner=owner, pair=pair, host_reader=1.0, host=1.0)
    got = rates_of(CopyLinks(READERS, LANES, rates), flows)

    links = {("to", r): [lane for lane in flows if lane // LANES == r] for r in range(READERS)}
    links |= {("from", o): [lane for lane in flows if flows[lane] == o] for o in range(READERS)}
    capacity = {link: reader if link[0] == "to" else owner for link in links}
    for link, lanes in links.items():
        assert sum(got[lane] for lane in lanes) <= capacity[link] * (1 + 1e-9)
    for lane, rate in got.items():
        mine = [lanes for lanes in links.values() if lane in lanes]
        full = [
            lanes
            for link, lanes in links.items()
            if lanes in mine and math.isclose(sum(got[other] for other in lanes), capacity[link], rel_tol=1e-6)
        ]
        assert math.isclose(rate, pair, rel_tol=1e-6) or any(
            rate >= max(got[other] for other in lanes) * (1 - 1e-6) for lanes in full
        )


@given(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
def test_one_owner_is_shared_evenly_by_its_readers(readers: list[int]) -> None:
    links = FetchLinks(4, Rates(reader=6.0, owner=6.0, host_reader=1.0, host=1.0))
    for reader in readers:
        links.start(reader, Flow({3: 1.0}, 12.0), 0.0)

    assert links.next_end()[0] == pytest.approx(2.0 * len(readers))


def run(size: int, slice_bytes: int | str = "streams", *, compute: float, passes: int = 4, **more: object) -> Outcome:
    group = Group(
        config=DWDPConfig(group_size=size, slice_bytes=slice_bytes),  # type: ignore[arg-type]
        weights={"w": WeightSpec((size * 2, 1 << 16), torch.uint8)},
        num_layers=4,
        granularity=4096,
        rates=Rates(reader=float(2 << 16), owner=float(2 << 16), host_reader=1.0, host=1.0),
        **more,  # type: ignore[arg-type]
    )
    return simulate(group, [[LayerWork((Phase(compute),), (Phase(compute),))] * passes] * size)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.floats(0.01, 20))
def test_ranks_in_step_take_the_longer_of_compute_and_copies(size: int, compute: float) -> None:
    """A shard takes one second from each other rank; in step and in turn, nobody meets."""
    outcome = run(size, compute=compute)

    # Two slots: copies of a layer begin when the layer before its own slot's reader ends, see `steady_period`.
    period = max(2 * compute, size - 1, (size - 1 + compute) / 2)
    assert outcome.seconds_per_pass == pytest.approx(4 * period, rel=1e-6)
    total = outcome.pass_end[:, -1]
    assert np.allclose(total, 4 * 4 * 2 * compute + outcome.exposed.sum(axis=1))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_fetches_are_slower_by_how_often_ranks_meet(size: int) -> None:
    """If nearly all time is copying, all meet; if hardly any is, a fetch has the links to itself."""
    outcome = run(size, compute=0.001, resolution="fetches")
    assert outcome.seconds_per_pass == pytest.approx(4 * (size - 1) / contended_share(size), rel=0.01)

    begins = [100.0 * rank for rank in range(size)]
    apart = run(size, compute=0.001, resolution="fetches", passes=1, start=begins)
    assert apart.copying == pytest.approx(np.full(size, 4.0 * (size - 1)), rel=1e-6)


def test_a_host_that_waits_between_passes_waits_for_the_copies_of_the_next() -> None:
    """Four layers in two slots of two ranks: three seconds of compute and one of copies for each layer."""
    more = {"compute": 1.5, "passes": 3, "slice_bytes": "auto"}
    flowing, stopping = run(2, **more), run(2, **more, stops=True)  # type: ignore[arg-type]

    # After its last release, the second pass waits for one more copy; nothing follows the third.
    assert np.diff(flowing.pass_end) == pytest.approx(np.full((2, 2), 4 * 3.0))
    assert np.diff(stopping.pass_end) == pytest.approx(np.array([[4 * 3.0 + 1.0, 4 * 3.0]] * 2))


def test_time_is_compute_and_waiting_and_nothing_else() -> None:
    outcome = run(3, compute=0.7, start=[0.0, 0.4, 1.1])

    busy = 4 * 4 * 2 * 0.7
    ended = outcome.pass_end[:, -1] - [0.0, 0.4, 1.1]
    assert np.allclose(ended, busy + outcome.exposed.sum(axis=1))
    assert all(before < after for row in outcome.pass_end for before, after in pairwise(row))


def test_one_group_of_one_copies_nothing() -> None:
    outcome = run(1, compute=1.0)

    assert outcome.seconds_per_pass == pytest.approx(8.0)
    assert outcome.copying.sum() == 0


def test_host_memory_is_one_source_for_all() -> None:
    """Two ranks read two experts each from host memory that gives 4 bytes a second in all, 3 to one reader."""
    group = Group(
        config=DWDPConfig(group_size=2, num_local_experts=0, host_experts=6),
        weights={"w": WeightSpec((6, 2), torch.uint8)},
        num_layers=4,
        granularity=1,
        rates=Rates(reader=1.0, owner=1.0, host_reader=3.0, host=4.0),
    )
    work = LayerWork((Phase(1e-6),), (Phase(1e-6),))

    assert simulate(group, [[work] * 5] * 2).seconds_per_pass == pytest.approx(4 * 12 / 2, rel=1e-4)


def test_work_must_be_for_every_rank() -> None:
    group = Group(
        config=DWDPConfig(group_size=2),
        weights={"w": WeightSpec((2, 2), torch.uint8)},
        num_layers=1,
        granularity=1,
        rates=Rates(reader=1.0, owner=1.0, host_reader=1.0, host=1.0),
    )
    with pytest.raises(ConfigError, match="1 ranks"):
        simulate(group, [[LayerWork((), (Phase(1.0),))]])


def test_a_layer_that_has_a_slot_to_itself_is_fetched_once() -> None:
    """Three layers in two slots: the second one's bytes are never overwritten."""
    group = Group(
        config=DWDPConfig(group_size=2, prefetch_depth=2),
        weights={"w": WeightSpec((2, 10), torch.uint8)},
        num_layers=3,
        granularity=1,
        rates=Rates(reader=10.0, owner=10.0, host_reader=1.0, host=1.0),
    )
    work = LayerWork((Phase(5.0),), (Phase(5.0),))

    outcome = simulate(group, [[work] * 4] * 2)

    # Two ranks; three fetches for the first pass, two for each of the others.
    assert outcome.copying.tolist() == [9.0, 9.0]
    assert len(outcome.pulls) == 2 * 9

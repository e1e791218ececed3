"""Whose turn it is, against the rule as it is stated; and runs, against the bytes of the plan they are cut from."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmm_dwdp.config import COPY_ALIGNMENT, DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, Segment, plan_layer
from vmm_dwdp.layout.placement import HOST, ExpertPlacement, Owner
from vmm_dwdp.layout.ranges import RangeLayout
from vmm_dwdp.layout.turns import (
    MAX_RANKS,
    NOBODY,
    SMALLEST_RUN,
    Line,
    choose,
    choose_of_two,
    chooses,
    cut_runs,
    is_alone,
    pullers,
    settle,
)

State = tuple[int, list[int], list[Line], list[bool]]  # a rank, its bytes left by owner, lines, which of them count
IDLE = 0


@st.composite
def states(draw: st.DrawFn, numbers: st.SearchStrategy[int]) -> State:
    """A rank, the bytes that it has left by owner, and a line of ``numbers`` and whether it counts, for every rank."""
    size = draw(st.integers(1, 8))
    rank = draw(st.integers(0, size - 1))
    left = draw(st.lists(st.sampled_from([0, 1, 5, 1 << 40]), min_size=size, max_size=size))
    left[rank] = 0
    words = st.lists(numbers, min_size=size, max_size=size)
    lines = [Line(draw(numbers), draw(words)) for _ in range(size)]
    return rank, left, lines, draw(st.lists(st.booleans(), min_size=size, max_size=size))


honest = states(st.integers(0, 2))
garbage = states(st.integers(-(1 << 63), (1 << 64) - 1))


def by_the_rule(rank: int, left: list[int], lines: list[Line], alive: list[bool]) -> int:
    """Fewest pullers, then most bytes left, then the next higher rank: one comparison after another."""
    owners = [owner for owner in range(len(left)) if left[owner]]
    others = [line for other, line in enumerate(lines) if other != rank and alive[other]]
    met = {owner: len([line for line in others if line.under_way[owner]]) for owner in owners}
    owners = [owner for owner in owners if met[owner] == min(met.values())]
    owners = [owner for owner in owners if left[owner] == max(left[other] for other in owners)]
    return next(((rank + n) % len(left) for n in range(len(left)) if (rank + n) % len(left) in owners), NOBODY)


@given(honest)
def test_the_choice_is_by_the_rule(state: State) -> None:
    rank, left, lines, alive = state

    assert choose(rank, left, pullers(rank, lines, alive)) == by_the_rule(rank, left, lines, alive)


@given(garbage, st.integers(0, 8))
def test_whatever_lines_say_the_owner_has_bytes_left(state: State, before: int) -> None:
    rank, left, lines, alive = state
    owner = choose(rank, left, pullers(rank, lines, alive))

    assert owner == NOBODY if not any(left) else left[owner] > 0
    if owner != NOBODY:
        assert left[settle(rank, owner, left, before, lines, alive)] > 0
    assert isinstance(is_alone(rank, lines, alive), bool)


@given(garbage)
def test_a_choice_changes_nothing_and_is_the_same_again(state: State) -> None:
    rank, left, lines, alive = state
    kept = copy.deepcopy(state)
    first = choose(rank, left, pullers(rank, lines, alive))

    assert choose(rank, left, pullers(rank, lines, alive)) == first
    assert state == kept


@given(honest, st.integers(0, 7))
def test_no_rank_is_preferred_to_another(state: State, by: int) -> None:
    """Number all ranks anew, cyclically: the choice is the same rank under its new number."""
    rank, left, lines, alive = state
    size = len(left)

    def turned(values: list[Any]) -> list[Any]:
        return [values[(new - by) % size] for new in range(size)]

    moved = [Line(line.pulls, turned(list(line.under_way))) for line in turned(lines)]
    chosen = choose(rank, left, pullers(rank, lines, alive))
    again = choose((rank + by) % size, turned(left), pullers((rank + by) % size, moved, turned(alive)))

    assert again == (NOBODY if chosen == NOBODY else (chosen + by) % size)


@given(honest, st.integers(0, 99))
def test_it_does_not_matter_which_of_the_others_pull(state: State, seed: int) -> None:
    rank, _, lines, alive = state
    others = [other for other in range(len(lines)) if other != rank]
    shuffled = others.copy()
    random.Random(seed).shuffle(shuffled)
    source = dict(zip(others, shuffled, strict=True)) | {rank: rank}
    exchanged = [lines[source[other]] for other in range(len(lines))]
    exchanged_alive = [alive[source[other]] for other in range(len(lines))]

    assert pullers(rank, exchanged, exchanged_alive) == pullers(rank, lines, alive)


@given(honest)
def test_lines_that_do_not_count_are_as_if_they_were_empty(
    state: State,
) -> None:
    rank, _, lines, alive = state
    size = len(lines)
    emptied = [
        line if counts and other != rank else Line(IDLE, [0] * size)
        for other, (line, counts) in enumerate(zip(lines, alive, strict=True))
    ]

    assert pullers(rank, lines, alive) == pullers(rank, emptied, [True] * size)
    assert is_alone(rank, lines, alive) == all(line.pulls == 0 for line in emptied)


@given(st.integers(3, 8), st.data())
def test_of_two_that_claim_a_free_owner_at_once_the_further_moves(size: int, data: st.DataObject) -> None:
    first, second, owner, free = data.draw(st.permutations(range(size)).map(lambda order: [*order, *order][:4]))
    assume(free not in {first, second, owner})
    left = [1] * size
    lines = [
        Line(1, [int(rank in {first, second} and other == owner) for other in range(size)]) for rank in range(size)
    ]
    alive = [True] * size

    settled = {rank: settle(rank, owner, _without(left, rank), 0, lines, alive) for rank in (first, second)}

    nearer, further = sorted((first, second), key=lambda rank: (owner - rank) % size)
    assert settled[nearer] == owner
    assert settled[further] != owner


def _without(left: list[int], rank: int) -> list[int]:
    return [0 if owner == rank else nbytes for owner, nbytes in enumerate(left)]


@given(honest)
def test_who_sees_nobody_new_stays(state: State) -> None:
    rank, left, lines, alive = state
    pulled = pullers(rank, lines, alive)
    owner = choose(rank, left, pulled)
    assume(owner != NOBODY)

    assert settle(rank, owner, left, pulled[owner], lines, alive) == owner


@given(honest)
def test_who_moves_meets_fewer(state: State) -> None:
    rank, left, lines, alive = state
    now = pullers(rank, lines, alive)
    for owner in range(len(left)):
        if left[owner]:
            moved = settle(rank, owner, left, 0, lines, alive)
            assert moved == owner or now[moved] < now[owner]


@given(honest, st.data())
def test_of_two_layers_the_first_unless_its_owner_has_more_pullers(state: State, data: st.DataObject) -> None:
    rank, first, lines, alive = state
    assume(any(first))
    second = [0 if owner == rank else data.draw(st.sampled_from([0, 1, 9])) for owner in range(len(first))]
    pulled = pullers(rank, lines, alive)
    of_first, of_second = by_the_rule(rank, first, lines, alive), by_the_rule(rank, second, lines, alive)
    is_better = any(second) and pulled[of_second] < pulled[of_first]

    assert choose_of_two(rank, first, None, pulled) == (0, of_first)
    assert choose_of_two(rank, first, second, pulled) == ((1, of_second) if is_better else (0, of_first))


@pytest.mark.parametrize(
    ("config", "there_is_a_choice"),
    [
        (DWDPConfig(group_size=3, slice_bytes="auto"), True),
        (DWDPConfig(group_size=MAX_RANKS, slice_bytes="auto"), True),
        (DWDPConfig(group_size=MAX_RANKS + 1, slice_bytes="auto"), False),
        (DWDPConfig(group_size=2, slice_bytes="auto"), False),
        (DWDPConfig(group_size=4, slice_bytes="streams"), False),
        (DWDPConfig(group_size=4, slice_bytes=1 << 20), False),
        (DWDPConfig(group_size=4, slice_bytes="auto", mode="in_place", prefetch_depth=0), False),
    ],
)
def test_who_chooses(config: DWDPConfig, there_is_a_choice: bool) -> None:
    assert chooses(config) == there_is_a_choice


def test_a_rank_between_two_runs_is_not_idle() -> None:
    pausing, idle = Line(1, [0, 0]), Line(0, [0, 0])

    assert not is_alone(0, [pausing, pausing], [True, True])
    assert is_alone(0, [pausing, idle], [True, True])
    assert is_alone(0, [pausing, pausing], [True, False])


@st.composite
def plans(draw: st.DrawFn) -> tuple[LayerPlan, int]:
    """A plan of several weights, small ones among them, and the number of ranks."""
    experts, size = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    host = draw(st.integers(0, experts))
    config = DWDPConfig(group_size=size, host_experts=host)
    placement = ExpertPlacement(experts, config)
    sizes = draw(st.lists(st.sampled_from([4, 16, 100, 4096, 12345, 100_000]), min_size=1, max_size=4))
    granularity = draw(st.sampled_from([1, 64, 4096]))
    layouts = {f"w{n}": RangeLayout(placement, nbytes, granularity) for n, nbytes in enumerate(sizes)}
    return plan_layer(layouts, draw(st.integers(0, size - 1)), draw(st.sampled_from([None, 4096]))), size


def spans(pieces: Iterable[Segment]) -> list[tuple[str, Owner, int, int]]:
    """Which bytes of which weight are copied from whom, with neighbours joined; fails where a byte is copied twice."""
    joined: list[tuple[str, Owner, int, int]] = []
    for weight, owner, run in sorted(pieces, key=lambda piece: (piece.weight, piece.bytes.start)):
        if joined and joined[-1][0] == weight:
            assert joined[-1][3] <= run.start
        if joined and joined[-1][:2] == (weight, owner) and joined[-1][3] == run.start:
            joined[-1] = (weight, owner, joined[-1][2], run.stop)
        else:
            joined.append((weight, owner, run.start, run.stop))
    return joined


@given(plans(), st.sampled_from([SMALLEST_RUN, 10_000, 65_536, 1 << 30]))
def test_runs_and_the_hosts_copies_have_every_byte_once(planned: tuple[LayerPlan, int], run_bytes: int) -> None:
    plan, size = planned
    runs = cut_runs(plan, size, run_bytes)

    cut = [piece for owned in runs.by_owner for run in owned for piece in run.pieces]
    assert spans([*cut, *runs.host]) == spans(itertools.chain.from_iterable(plan.streams))
    assert all(piece.owner == HOST for piece in runs.host)
    assert len(runs.by_owner) == size
    assert runs.nbytes == [sum(len(p.bytes) for p in cut if p.owner == owner) for owner in range(size)]


@given(plans(), st.sampled_from([SMALLEST_RUN, 10_000, 65_536]))
def test_a_run_is_one_owners_and_no_run_is_long_or_short(planned: tuple[LayerPlan, int], run_bytes: int) -> None:
    plan, size = planned
    runs = cut_runs(plan, size, run_bytes)
    for owner, owned in enumerate(runs.by_owner):
        lengths = [run.nbytes for run in owned]
        total = sum(lengths)
        assert all(piece.owner == owner and piece.bytes for run in owned for piece in run.pieces)
        assert lengths == [sum(len(piece.bytes) for piece in run.pieces) for run in owned]
        assert all(0 < nbytes <= run_bytes for nbytes in lengths)
        assert len(lengths) <= -(-total // (run_bytes - COPY_ALIGNMENT))
        assert all(abs(nbytes - total / len(lengths)) < COPY_ALIGNMENT for nbytes in lengths)
        cuts = [piece.bytes.start for run in owned[1:] for piece in run.pieces[:1]]
        starts = {piece.bytes.start for stream in plan.streams for piece in stream}
        assert all(cut % COPY_ALIGNMENT == 0 or cut in starts for cut in cuts)


def test_a_small_weight_is_no_run_of_its_own() -> None:
    placement = ExpertPlacement(8, DWDPConfig(group_size=2))
    layouts = {"w": RangeLayout(placement, 1 << 20, 1), "scale": RangeLayout(placement, 64, 1)}
    (runs,) = [owned for owned in cut_runs(plan_layer(layouts, 0, None), 2, 2 << 20).by_owner if owned]

    assert [[piece.weight for piece in run.pieces] for run in runs] == [["w"], ["w"], ["w", "scale"]]


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4096 bytes, not 4095"):
        cut_runs(LayerPlan((), ()), 1, 4095)

"""The simulator against a slow one that knows no events: time in small steps, everything looked at in each."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning import pulling
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.pulling import Turns
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate

IN_TURN = 1 << 40
WEIGHTS = {"w": WeightSpec((8, 100), torch.uint8)}
LARGE = {"w": WeightSpec((12, 100 << 10), torch.uint8)}  # the same bytes in a larger unit, as runs are not short
UNIT = 1 << 10
LAYERS, PASSES = 4, 2
READER, OWNER = 100.0, 80.0  # bytes a second
STEP = 0.02  # seconds
RUNS = 4  # of an owner
LEAD = 0.1  # seconds before a run can end, in which the next is chosen


@dataclass
class Flight:
    """A copy that was given."""

    fetch: int
    owner: int
    left: float  # bytes
    begins: float
    can_end: float = math.inf


@dataclass
class Rank:
    """Work and copies that are left, in order."""

    work: list[tuple[int, bool, float, float]]  # fetch, whether it reads the slot, seconds, slowdown
    copies: list[tuple[int, float]]  # of one layer: owner, bytes; in order, if owners are not chosen
    start: float
    left: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # by fetch whose slot is free: not given
    flights: list[Flight] = field(default_factory=list)
    ended: float = -math.inf  # the latest copy
    arrived: set[int] = field(default_factory=set)
    ends: list[float] = field(default_factory=list)

    def allow(self, fetch: int) -> None:
        self.left[fetch] = list(self.copies)

    def give(self, fetch: int, copy: tuple[int, float], begins: float) -> None:
        self.left[fetch].remove(copy)
        self.flights.append(Flight(fetch, *copy, begins, begins + copy[1] / OWNER))

    def end(self, now: float) -> None:
        """What has moved all its bytes has ended; and what all of which has ended has arrived, in order."""
        for flight in [flight for flight in self.flights if flight.left <= 0]:
            self.flights.remove(flight)
            self.ended = now
        for fetch in sorted(self.left):
            if self.left[fetch] or any(flight.fetch == fetch for flight in self.flights):
                break
            self.arrived.add(fetch)
            del self.left[fetch]


def in_order(rank: Rank, now: float) -> None:
    """One copy after another."""
    open_ = [fetch for fetch in sorted(rank.left) if rank.left[fetch]]
    if open_ and not rank.flights:
        rank.give(open_[0], rank.left[open_[0]][0], now)


def by_choice(ranks: list[Rank], number: int, turns: Turns, now: float) -> None:
    """The next run from where fewest pull, most is left, and the ring is short, of the first layer or the one after."""
    rank = ranks[number]
    pulled = Counter(owner for other in ranks if other is not rank for owner in {f.owner for f in other.flights})

    def best(fetch: int) -> tuple[int, float]:
        def rule(copy: tuple[int, float]) -> tuple[int, float, int]:
            left = sum(nbytes for owner, nbytes in rank.left[fetch] if owner == copy[0])
            return pulled[copy[0]], -left, (copy[0] - number) % len(ranks)

        return min(rank.left[fetch], key=rule)

    while open_ := [fetch for fetch in sorted(rank.left) if rank.left[fetch]]:
        alone = not any(other.left for other in ranks if other is not rank)
        first = rank.flights[0] if rank.flights else None
        if len(rank.flights) == 2:
            return
        if first and not alone and not (turns.native and now >= first.can_end - LEAD):
            return
        if not first and not alone and not turns.native and now < rank.ended + turns.gap:
            return
        fetch, copy = open_[0], best(open_[0])
        if turns.native and len(open_) > 1 and pulled[copy[0]] > pulled[best(open_[1])[0]]:
            fetch, copy = open_[1], best(open_[1])
        gap = turns.gap if turns.native and not alone else 0.0
        rank.give(fetch, copy, max(now, first.can_end if first and gap else now) + gap)


@cache
def fair(flows: tuple[tuple[int, int], ...]) -> list[float]:
    """Rates of flows, reader and owner, each as fast as can be without slowing a slower one: filled in small drops."""
    rates = [0.0] * len(flows)
    drop = 0.5
    grows = True
    while grows:
        grows = False
        for this, (reader, owner) in enumerate(flows):
            of_reader = sum(rate for rate, flow in zip(rates, flows, strict=True) if flow[0] == reader)
            of_owner = sum(rate for rate, flow in zip(rates, flows, strict=True) if flow[1] == owner)
            if of_reader + drop <= READER and of_owner + drop <= OWNER:
                rates[this] += drop
                grows = True
    return rates


def by_steps(
    config: DWDPConfig,
    before: list[float],
    experts: float,
    slowdown: float,
    turns: Turns | None = None,
    start: Sequence[float] = (0.0,) * 8,
) -> list[list[float]]:
    """When each pass of each rank ends."""
    fetches = LAYERS * PASSES
    ranks = []
    for number in range(config.group_size):
        plan = describe_layer(0, LARGE if turns else WEIGHTS, config, number, 1).plan
        pieces = [piece for stream in plan.streams for piece in stream]
        work = []
        for fetch in range(fetches):
            work += [(fetch, False, before[number], slowdown), (fetch, True, experts, 1.0)]
        copies = [(int(piece.owner), float(len(piece.bytes))) for piece in pieces]
        if turns:
            copies = [(owner, nbytes / RUNS / UNIT) for owner, nbytes in copies for _ in range(RUNS)]
        ranks.append(Rank(work, copies, start[number]))
    now = 0.0
    while any(rank.work for rank in ranks):
        begun = [rank for rank in ranks if now >= rank.start]
        for number, rank in enumerate(ranks):
            if rank not in begun:
                continue
            if len(rank.work) == 2 * fetches and not rank.left and not rank.arrived:
                for fetch in range(config.prefetch_depth):
                    rank.allow(fetch)
            by_choice(ranks, number, turns, now) if turns else in_order(rank, now)
        moving = [(n, flight) for n, rank in enumerate(ranks) for flight in rank.flights if now >= flight.begins]
        rates = fair(tuple((reader, flight.owner) for reader, flight in moving))
        now += STEP
        for (_, flight), rate in zip(moving, rates, strict=True):
            flight.left -= rate * STEP
        for number, rank in enumerate(ranks):
            if rank not in begun:
                continue
            flights = len(rank.flights)
            rank.end(now)
            if turns and len(rank.flights) < flights:
                for flight in rank.flights:
                    flight.can_end = now + turns.gap + rank.copies[0][1] / OWNER
            if rank.work and (not rank.work[0][1] or rank.work[0][0] in rank.arrived):
                fetch, reads, seconds, slower = rank.work[0]
                used = sum(rate for rate, (reader, _) in zip(rates, moving, strict=True) if reader == number)
                speed = 1 / (1 + (slower - 1) * used / READER)
                rank.work[0] = (fetch, reads, seconds - STEP * speed, slower)
                if rank.work[0][2] <= 0:
                    rank.work.pop(0)
                    if reads:
                        if fetch + config.prefetch_depth < fetches:
                            rank.allow(fetch + config.prefetch_depth)
                        if (fetch + 1) % LAYERS == 0:
                            rank.ends.append(now)
    return [rank.ends for rank in ranks]


@pytest.mark.parametrize("seed", range(10))
def test_events_and_steps_agree(seed: int) -> None:
    """Ranks of different pace; ties, where a step decides who comes first and who meets whom, have no one answer.

    With more layers than slots, and a multiple of them, every layer is fetched anew in every pass.
    """
    random = np.random.default_rng(seed)
    size, depth = int(random.integers(2, 5)), int(random.integers(1, 3))
    before, experts = random.uniform(0.3, 4.0, size).tolist(), float(random.uniform(0.3, 3.0))
    slowdown = float(random.choice([1.0, 1.5]))
    config = DWDPConfig(group_size=size, prefetch_depth=depth, slice_bytes=IN_TURN)
    group = Group(
        config=config,
        weights=WEIGHTS,
        num_layers=LAYERS,
        granularity=1,
        rates=Rates(reader=READER, owner=OWNER, host_reader=1.0, host=1.0),
    )
    work = [[LayerWork((Phase(before[rank], slowdown),), (Phase(experts),))] * PASSES for rank in range(size)]

    ends = simulate(group, work).pass_end[:, -1]

    assert ends == pytest.approx(np.array(by_steps(config, before, experts, slowdown))[:, -1], rel=0.03)


@pytest.mark.parametrize("gap", [0.1, 0.5])
@pytest.mark.parametrize("native", [True, False], ids=["a layer ahead", "when a run has ended"])
def test_events_and_steps_agree_on_the_mean_where_owners_are_chosen(
    native: bool, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that begin at random moments, hardly compute, and choose the owner of each run by what the others do.

    Where two choose at almost the same moment, a step decides who is first, and what follows; so the means agree.
    """
    monkeypatch.setattr(pulling, "LEAD", LEAD)
    by_events, stepped = [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        size = int(random.integers(3, 5))
        start = random.uniform(0.0, 20.0, size).tolist()
        before, experts = random.uniform(0.1, 1.0, size).tolist(), 0.3
        config = DWDPConfig(group_size=size, slice_bytes="auto")
        turns = Turns(run_bytes=LARGE["w"].expert_nbytes * (12 // size) // RUNS, gap=gap, native=native)
        group = Group(
            config=config,
            weights=LARGE,
            num_layers=LAYERS,
            granularity=1,
            rates=Rates(reader=READER * UNIT, owner=OWNER * UNIT, host_reader=1.0, host=1.0),
            turns=turns,
            start=start,
        )
        work = [[LayerWork((Phase(before[rank]),), (Phase(experts),))] * PASSES for rank in range(size)]
        by_events.append(simulate(group, work).pass_end[:, -1].mean())
        stepped.append(np.mean([ends[-1] for ends in by_steps(config, before, experts, 1.0, turns, start)]))

    assert np.mean(by_events) == pytest.approx(np.mean(stepped), rel=0.03)
    assert by_events == pytest.approx(stepped, rel=0.1)

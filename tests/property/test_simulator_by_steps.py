"""The simulator against a slow one that knows no events: time in small steps, everything looked at in each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.weight_spec import WeightSpec
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


@dataclass
class Rank:
    """Work and copies that are left, in order."""

    work: list[tuple[int, bool, float, float]]  # fetch, whether it reads the slot, seconds, slowdown
    copies: list[tuple[int, float]]  # of one layer: owner, bytes; in order, if owners are not chosen
    start: float = 0.0
    ready: float = 0.0  # when the next chosen copy may begin
    allowed: list[int] = field(default_factory=list)  # fetches whose slot is free, in order
    under_way: list[tuple[int, float]] = field(default_factory=list)
    copying: bool = False  # the first of `under_way`
    arrived: set[int] = field(default_factory=set)
    ends: list[float] = field(default_factory=list)


def chosen_first(ranks: list[Rank], number: int) -> list[tuple[int, float]]:
    """The copies that ``number`` has left, next the one from where fewest pull, most is left, and the ring is short."""

    def rule(copy: tuple[int, float]) -> tuple[int, float, int]:
        owner = copy[0]
        met = sum(other.under_way[0][0] == owner for other in ranks if other.copying and other is not ranks[number])
        left = sum(nbytes for of, nbytes in ranks[number].under_way if of == owner)
        return met, -left, (owner - number) % len(ranks)

    first = min(ranks[number].under_way, key=rule)
    rest = list(ranks[number].under_way)
    rest.remove(first)
    return [first, *rest]


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
        ranks.append(Rank(work, copies, start[number], start[number], list(range(config.prefetch_depth))))
    now = 0.0
    while any(rank.work for rank in ranks):
        for number, rank in enumerate(ranks):
            if now < rank.start:
                continue
            if not rank.under_way and rank.allowed:
                rank.under_way = list(rank.copies)
            if turns and rank.under_way and not rank.copying and now >= rank.ready:
                rank.under_way = chosen_first(ranks, number)
                rank.copying = True
            rank.copying = rank.copying or bool(rank.under_way and not turns)
        readers = [rank.under_way[0][0] for rank in ranks if rank.copying]
        rates = [min(READER, OWNER / readers.count(rank.under_way[0][0])) if rank.copying else 0.0 for rank in ranks]
        now += STEP
        for rank, rate in zip(ranks, rates, strict=True):
            if now < rank.start:
                continue
            if rank.copying:
                owner, nbytes = rank.under_way[0]
                rank.under_way[0] = (owner, nbytes - rate * STEP)
                if rank.under_way[0][1] <= 0:
                    rank.under_way.pop(0)
                    rank.copying = False
                    alone = not any(other.under_way or other.allowed for other in ranks if other is not rank)
                    rank.ready = now + (turns.gap if turns and not alone else 0.0)
                    if not rank.under_way:
                        rank.arrived.add(rank.allowed.pop(0))
            if rank.work and (not rank.work[0][1] or rank.work[0][0] in rank.arrived):
                fetch, reads, seconds, slower = rank.work[0]
                speed = 1 / (1 + (slower - 1) * rate / READER)
                rank.work[0] = (fetch, reads, seconds - STEP * speed, slower)
                if rank.work[0][2] <= 0:
                    rank.work.pop(0)
                    if reads:
                        if fetch + config.prefetch_depth < fetches:
                            rank.allowed.append(fetch + config.prefetch_depth)
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
def test_events_and_steps_agree_on_the_mean_where_owners_are_chosen(gap: float) -> None:
    """Ranks that begin at random moments, hardly compute, and choose the owner of each run by what the others do.

    Where two choose at almost the same moment, a step decides who is first, and what follows; so the means agree.
    """
    by_events, stepped = [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        size = int(random.integers(3, 5))
        start = random.uniform(0.0, 20.0, size).tolist()
        before, experts = random.uniform(0.1, 1.0, size).tolist(), 0.3
        config = DWDPConfig(group_size=size)
        turns = Turns(run_bytes=LARGE["w"].expert_nbytes * (12 // size) // RUNS, gap=gap)
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

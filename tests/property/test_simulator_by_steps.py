"""The simulator against a slow one that knows no events: time in small steps, everything looked at in each."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate

IN_TURN = 1 << 40
WEIGHTS = {"w": WeightSpec((8, 100), torch.uint8)}
LAYERS, PASSES = 4, 2
READER, OWNER = 100.0, 80.0  # bytes a second
STEP = 0.02  # seconds


@dataclass
class Rank:
    """Work and copies that are left, in order."""

    work: list[tuple[int, bool, float, float]]  # fetch, whether it reads the slot, seconds, slowdown
    copies: list[tuple[int, float]]  # of one layer: owner, bytes
    allowed: list[int]  # fetches whose slot is free, in order
    under_way: list[tuple[int, float]] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)
    ends: list[float] = field(default_factory=list)


def by_steps(config: DWDPConfig, before: list[float], experts: float, slowdown: float) -> list[list[float]]:
    """When each pass of each rank ends."""
    fetches = LAYERS * PASSES
    ranks = []
    for number in range(config.group_size):
        plan = describe_layer(0, WEIGHTS, config, number, 1).plan
        (stream,) = plan.streams
        work = []
        for fetch in range(fetches):
            work += [(fetch, False, before[number], slowdown), (fetch, True, experts, 1.0)]
        copies = [(int(piece.owner), float(len(piece.bytes))) for piece in stream]
        ranks.append(Rank(work, copies, list(range(config.prefetch_depth))))
    now = 0.0
    while any(rank.work for rank in ranks):
        for rank in ranks:
            if not rank.under_way and rank.allowed:
                rank.under_way = list(rank.copies)
        readers = [rank.under_way[0][0] for rank in ranks if rank.under_way]
        rates = [min(READER, OWNER / readers.count(rank.under_way[0][0])) if rank.under_way else 0.0 for rank in ranks]
        now += STEP
        for rank, rate in zip(ranks, rates, strict=True):
            if rank.under_way:
                owner, nbytes = rank.under_way[0]
                rank.under_way[0] = (owner, nbytes - rate * STEP)
                if rank.under_way[0][1] <= 0:
                    rank.under_way.pop(0)
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

"""Two functions timed in turns on one GPU, until the ratio of their times is known.

A GPU at its power limit changes its clock all the time, and most within a tenth of a second after it was idle. So the
two run in turns, one after another without a pause, and a run is only compared with one beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

AHEAD = 10_000_000  # clock ticks for which the GPU waits while the host issues the first rounds
ROUND_MILLISECONDS = 20  # of a round, which has at least two pairs
LEAST_RATIOS = 8  # whatever they are
DEVIATIONS = 1.96  # of a normal distribution, to either side of its mean: 95 % lie between


class Turns(NamedTuple):
    """What `in_turns` saw: milliseconds of each run, and how many times as fast ``method`` was as ``other``."""

    method: list[float]
    other: list[float]
    ratios: list[float]


def in_turns(method: Callable[[], object], other: Callable[[], object], *, seconds: float, precision: float) -> Turns:
    """Run ``other, method, method, other``, and so on, on the current stream.

    That way drift counts for the one in one pair and for the other in the next, and where the two are the same, nothing
    tells them apart. Rounds of pairs follow each other, and each is issued before the one before it is looked at, so
    that the GPU never waits. The first one does not count: in it the clock settles. No round is issued any more once
    `interval` of the ratios reaches at most ``precision`` to either side of its middle, or ``seconds`` are over.
    """
    begin = time.perf_counter()
    other()
    method()
    torch.cuda.synchronize()
    order = [other, method, method, other]
    order *= max(1, round(ROUND_MILLISECONDS / (2e3 * (time.perf_counter() - begin))))
    begins: list[torch.cuda.Event] = []

    def issue(runs: Sequence[Callable[[], object]]) -> None:
        for run in runs:
            begins.append(torch.cuda.Event(enable_timing=True))
            begins[-1].record()
            run()

    torch.cuda._sleep(AHEAD)
    issue(order)
    issue(order)
    del begins[: len(order)]
    times: list[float] = []
    begin = time.perf_counter()
    done = False
    while not done:
        issue(order)
        begins[-len(order)].synchronize()  # the round before the one just issued has ended
        times += durations(begins[len(times) : 1 - len(order)])
        known = turns(times).ratios
        if len(known) >= LEAST_RATIOS:
            least, most = interval(known)
            done = (most - least) / 2 <= precision or time.perf_counter() - begin > seconds
    issue([lambda: None])
    torch.cuda.synchronize()
    return turns(times + durations(begins[len(times) :]))


def durations(begins: Sequence[torch.cuda.Event]) -> list[float]:
    """Milliseconds of runs of which one begins where another ends; the last event is no run's."""
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(begins)]


def turns(times: Sequence[float]) -> Turns:
    """What `in_turns` saw, of times in its order."""
    method = [time for first in range(1, len(times), 4) for time in times[first : first + 2]]
    other = [time for first in range(0, len(times), 4) for time in (times[first], times[first + 3])]
    return Turns(method, other, [theirs / ours for theirs, ours in zip(other, method, strict=True)])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what ``values`` were drawn from lies, at about 95 %, if they were drawn independently.

    By their order alone: of ``n``, the number below the median is binomial, with mean ``n / 2`` and deviation
    ``sqrt(n) / 2``.
    """
    count = len(values)
    ordered = sorted(values)
    outside = max(0, math.floor((count - DEVIATIONS * math.sqrt(count)) / 2))
    return ordered[outside], ordered[-1 - outside]


def sustained(run: Callable[[], object], *, seconds: float) -> float:
    """Milliseconds of a run among others like it, after the GPU's clock has settled: the median."""
    seen = in_turns(run, run, seconds=seconds, precision=0)
    return statistics.median(seen.method + seen.other)

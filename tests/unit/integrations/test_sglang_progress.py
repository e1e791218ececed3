"""What the log of an engine says once a minute, of counts that stand for a runtime's."""

from __future__ import annotations

from dataclasses import replace

from vmm_dwdp.integrations.sglang.progress import Progress
from vmm_dwdp.observe.stats import LayerStats, Stats


class Rank:
    """A rank's statistics, and its clock."""

    def __init__(self, layers: dict[int, LayerStats]) -> None:
        self.now = 1000.0
        self.found = Stats(0, 0, layers, None, None, None)
        self.progress = Progress(lambda: self.found, lambda: self.now)

    def after(self, seconds: float, layers: dict[int, LayerStats], advice: str | None = None) -> str | None:
        self.now += seconds
        self.found = replace(self.found, layers=layers, advice=advice)
        return self.progress.line()


def test_a_minute_of_passes() -> None:
    rank = Rank({3: LayerStats(hits=5, in_place=1), 4: LayerStats(hits=4, misses=1, in_place=1)})
    staged = {3: LayerStats(9, 6, 0, 0.5, 8), 4: LayerStats(14, 1, 0, 1.5, 8)}
    assert rank.after(59, staged) is None
    assert rank.after(1, staged) == (
        "10 passes with experts copied ahead, 7 read in place; waited for copies 2 of 60 s, most for layer 4 (1.5 s)"
    )
    assert rank.after(60, staged) is None  # there were no passes


def test_each_minute_stands_for_itself() -> None:
    rank = Rank({0: LayerStats()})
    assert rank.after(90, {0: LayerStats(in_place=4)}) == (
        "0 passes with experts copied ahead, 4 read in place; waited for copies 0 of 90 s"
    )
    assert rank.after(30, {0: LayerStats(in_place=5)}) is None
    told = rank.after(30, {0: LayerStats(hits=2, in_place=5, exposed_wait_s=0.25)}, "Passes wait for copies")
    assert told == (
        "2 passes with experts copied ahead, 1 read in place; "
        "waited for copies 0.25 of 60 s, most for layer 0 (0.25 s). Passes wait for copies"
    )

"""Which passes `benchmarks/end_to_end.py` holds against the link."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import end_to_end

from vmm_dwdp.observe.stats import LayerStats, Stats


def stats(hits: int, misses: int, in_place: int) -> Stats:
    return Stats(0, 0, {0: LayerStats(hits, misses, 0, 0.0, in_place)}, None, None, None)


@pytest.mark.parametrize(("after", "staged"), [((9, 3, 5), True), ((5, 2, 9), False), ((6, 2, 6), False)])
def test_a_pass_that_reads_in_place_is_not_staged(after: tuple[int, int, int], staged: bool) -> None:
    assert end_to_end.mostly_staged(stats(5, 2, 5), stats(*after)) is staged

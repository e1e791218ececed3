"""Which tiles of the in-place ranges a resident cache holds. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

KEEP: Final = 1.25  # how much hotter a tile must be to take another's place, which costs a copy and driver calls


class Candidate(NamedTuple):
    """A tile that another owner backs.

    Attributes:
        heat: tokens times the bytes of the tile that each of them reads.
        num_pages: what it would take of the cache.
        cached: whether it is there now.
    """

    heat: int
    num_pages: int
    cached: bool


def hottest(candidates: Sequence[Candidate], num_pages: int) -> set[int]:
    """The places of those that a cache of ``num_pages`` holds best: the hottest by page first, as long as they fit.

    What nobody read does not come, and leaves only for something else.
    """

    def by_page(place: int) -> float:
        heat, pages, cached = candidates[place]
        return heat / pages * (KEEP if cached else 1)

    chosen = set()
    for place in sorted(range(len(candidates)), key=by_page, reverse=True):
        heat, pages, cached = candidates[place]
        if (heat or cached) and pages <= num_pages:
            chosen.add(place)
            num_pages -= pages
    return chosen

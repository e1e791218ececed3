"""Tables of address ranges, by which the host driver refuses what CUDA would refuse."""

from __future__ import annotations

import bisect
import operator
from dataclasses import dataclass
from typing import Final

from vmm_dwdp.allocator.driver import Access


@dataclass
class Range:
    start: int
    nbytes: int
    access: Access | None = None  # of a mapping, until it is unmapped

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def allows(self, wanted: Access) -> bool:
        return self.access in (wanted, Access.READ_WRITE)


class Ranges:
    """Address ranges that do not overlap, in order."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []

    def add(self, new: Range) -> None:
        bisect.insort(self._ranges, new, key=_start)

    def remove(self, old: list[Range]) -> None:
        """Forget ranges that follow one another."""
        first = bisect.bisect_left(self._ranges, old[0].start, key=_start)
        del self._ranges[first : first + len(old)]

    def touching(self, start: int, nbytes: int) -> list[Range]:
        """The ranges that have a byte in ``[start, start + nbytes)``."""
        first = bisect.bisect_right(self._ranges, start, key=_end)
        last = bisect.bisect_left(self._ranges, start + nbytes, key=_start)
        return self._ranges[first:last]

    def covering(self, start: int, nbytes: int) -> list[Range]:
        """The same, if they leave no gap in it; otherwise none."""
        ranges = self.touching(start, nbytes)
        whole = ranges and ranges[0].start <= start and start + nbytes <= ranges[-1].end
        if whole and sum(r.nbytes for r in ranges) == ranges[-1].end - ranges[0].start:
            return ranges
        return []

    def exactly(self, start: int, nbytes: int) -> list[Range]:
        """The same, if they end where it ends on both sides; otherwise none."""
        ranges = self.covering(start, nbytes)
        return ranges if ranges and (ranges[0].start, ranges[-1].end) == (start, start + nbytes) else []


_start: Final = operator.attrgetter("start")
_end: Final = operator.attrgetter("end")

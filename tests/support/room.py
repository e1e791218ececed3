"""How many experts fit, counted page by page and expert by expert: an independent reference for `layout/auto.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Weights = tuple[int, ...]  # bytes of one expert in each weight of a layer


class Counted(NamedTuple):
    """A group as far as it matters here: by layer, its experts and weights; the rest as `DWDPConfig` has it."""

    layers: Sequence[tuple[int, Weights]]
    group_size: int
    depth: int
    page: int
    host_experts: int = 0
    cache: int = 0

    def smallest(self) -> int:
        """Experts on ranks of the smallest layer."""
        return min(experts for experts, _ in self.layers) - self.host_experts

    def share(self, experts: int) -> int:
        """An equal share of a layer, rounded up."""
        return (experts - self.host_experts + self.group_size - 1) // self.group_size

    def held(self, experts: int, rank: int, number: int | None) -> range:
        """``number`` of a layer's experts, or an equal share; the first rank's from the first on, the last rank's to
        the last."""
        count = self.share(experts) if number is None else number
        last_start = experts - self.host_experts - count
        first = 0 if self.group_size == 1 else last_start * rank // (self.group_size - 1)
        return range(first, first + count)

    def takes(self, rank: int, number: int | None) -> int:
        """Bytes of shards and slots, and of the cache."""
        shards = 0
        in_slots: list[int] = []
        for experts, weights in self.layers:
            remote = 0
            for nbytes in weights:
                pages = range((experts * nbytes + self.page - 1) // self.page)
                own = {
                    page
                    for expert in self.held(experts, rank, number)
                    for page in range(expert * nbytes // self.page, ((expert + 1) * nbytes - 1) // self.page + 1)
                }
                shards += len(own)
                remote += sum(page not in own for page in pages)
            in_slots.append(remote)
        slots = sum(max(in_slots[slot :: self.depth]) for slot in range(min(self.depth, len(in_slots))))
        return (shards + slots) * self.page + self.cache

    def most(self, rank: int, wanted: int, limit: int) -> int | str:
        """How many the rank offers: a number, or ``"equal"``, or ``"none"``."""
        if self.takes(rank, None) > limit:
            return "none"
        fitting: int | str = "equal"
        for number in range(max(self.share(experts) for experts, _ in self.layers) + 1, self.smallest() + 1):
            if self.takes(rank, number) > wanted:
                break
            fitting = number
        return fitting

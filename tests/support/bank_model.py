"""What a bank is to hold, worked out with sets and dictionaries: a reference for the planner on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

HALF_LIFE = 16
ONE = 1 << 24
USES_A_COPY = 8
DECAY = 62757  # of 65536: 2 ** (-1 / 16)

# What passes use of 12 experts: a bank of 4 rows has saved copies for long when four others come, and then four more.
SAVING = [[0, 1, 2, 3]] * 20 + [[4, 5, 6, 7, 8, 9, 10, 11]] * 12 + [[8, 9, 10, 11]] * 8


class BankModel:
    """The bank of one layer.

    Attributes:
        row_of: the row of each expert that is in the bank.
        counts: uses of remote experts, hits, and copies.
    """

    def __init__(self, num_experts: int, num_rows: int, own: Iterable[int] = ()) -> None:
        self.num_rows = num_rows
        self.row_of: dict[int, int] = {}
        self.counts = [0, 0, 0]
        self._experts = range(num_experts)
        self._own = set(own)
        self._scores = dict.fromkeys(self._experts, 0)
        self._credit = 0

    def look_up(self, chosen: Sequence[int], *, copies: bool) -> list[int]:
        """The row of each of ``chosen``, which are of one pass."""
        used = set(chosen) & set(self._experts)
        remote, hits = used - self._own, used & self.row_of.keys()
        for expert in self._experts:
            self._scores[expert] = self._scores[expert] * DECAY // 65536
        for expert in hits:
            self._scores[expert] += ONE
        coming: list[int] = []
        if copies:
            coming = self._exchange(remote, hits)
        for expert in used - hits:
            self._scores[expert] += ONE
        for place, count in enumerate((len(remote), len(hits), len(coming))):
            self.counts[place] += count
        return [self.row_of.get(each, self.num_rows + each) if each in self._experts else -1 for each in chosen]

    def _exchange(self, remote: set[int], hits: set[int]) -> list[int]:
        """Take in what is worth it, in the place of what is worth least. Returns what came."""

        def worth(expert: int) -> tuple[bool, int, int]:
            return expert in hits, self._scores[expert], -expert

        self._credit = min(self._credit + len(remote), USES_A_COPY * self.num_rows)
        most = self.num_rows - len(self.row_of) + self._credit // USES_A_COPY
        newcomers = sorted(remote - self.row_of.keys(), key=worth, reverse=True)[:most]
        best = sorted([*self.row_of, *newcomers], key=worth, reverse=True)[: self.num_rows]
        left = sorted(self.row_of.keys() - set(best))
        self._credit -= USES_A_COPY * len(left)
        free = [self.row_of.pop(expert) for expert in left]
        free += [row for row in range(self.num_rows) if row not in {*free, *self.row_of.values()}]
        coming = sorted(set(best) - self.row_of.keys())
        self.row_of.update(zip(coming, free, strict=False))
        return coming

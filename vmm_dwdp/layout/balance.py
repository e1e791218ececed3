"""Which experts change places so that no owner's link is much busier than the others'. Pure integers.

[Note: Loads of links]
Where layers are read in place, a token that is routed to an expert reads its row from an owner: from nobody, if the
reader holds the row itself. The load of an owner is how many reads others make there. A swap of two rows changes it in
two ways: a busy expert goes where it is read over another link, or to the rank that reads it most, and then over none.

All ranks work out the same from the same counts, so only the counts have to be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import HOST, nearest_first

LEAST: Final = 100  # a swap that relieves by less than this part of the busiest owner's load is not worth its copies

Counts = Mapping[int, Sequence[int]]  # by the number of a layer, how many tokens were routed to each expert
_Loads = npt.NDArray[np.int64]


def balanced(layers: Sequence[Layer], order: ExpertOrder, counts: Sequence[Counts], most: int) -> ExpertOrder:
    """The order after at most ``most`` swaps of two experts of a layer; ``order`` itself, if there is nothing to gain.

    One swap after another, each of the layer whose busiest owner has the most bytes fewer to send by it. What relieves
    an owner by less than a hundredth of the busiest one's load is not done. Experts of `HOST` stay.

    Args:
        counts: of each rank, by the experts' own numbers.
    """
    changing = [_ChangingLayer(layer, order, counts) for layer in layers]
    for _ in range(most):
        found = [(each.gain, place) for place, each in enumerate(changing) if each.swap is not None]
        if not found:
            break
        changing[max(found, key=lambda gain: (gain[0], -gain[1]))[1]].make_swap()
    moved = {each.layer.number: each.experts.tolist() for each in changing if each.has_changed}
    return order.changed(moved) if moved else order


class _Swap(NamedTuple):
    """Of two rows, and the loads of all ranks after it."""

    row: int
    other: int
    loads: _Loads


class _ChangingLayer:
    """A layer some of whose experts change places.

    Attributes:
        experts: by row.
        swap: the next one to be made, if there is one.
    """

    def __init__(self, layer: Layer, order: ExpertOrder, counts: Sequence[Counts]) -> None:
        self.layer = layer
        self.experts = np.array(order.experts_of(layer))
        self._before = self.experts.copy()
        self._nbytes = sum(spec.expert_nbytes for spec in layer.weights.values())
        group_size = layer.placement.config.group_size
        by_reader = np.array([each[layer.number] for each in counts], np.int64)
        owners = [tuple(owner for owner, _ in layer.placement.locate(row)) for row in range(len(self.experts))]
        kinds = list(dict.fromkeys(owners))  # rows of one kind are read from the same ranks
        self._kinds = np.array([kinds.index(each) for each in owners])
        self._movable = np.array([HOST not in each for each in owners])
        self._per_kind = np.zeros((len(kinds), len(owners), group_size), np.int64)  # of an expert in a row of the kind
        for kind, holders in enumerate(kinds):
            for reader in range(group_size):
                source = nearest_first(holders, reader, group_size)[0]
                if source not in (reader, HOST):
                    self._per_kind[kind, :, source] += by_reader[reader]
        self._loads = self._if_in_row().diagonal().sum(-1)
        self.swap = self._best_swap()

    @property
    def has_changed(self) -> bool:
        return bool((self.experts != self._before).any())

    @property
    def gain(self) -> int:
        """How many bytes fewer the busiest owner sends after the swap."""
        assert self.swap is not None
        return int(self._loads.max() - self.swap.loads.max()) * self._nbytes

    def make_swap(self) -> None:
        assert self.swap is not None
        row, other, self._loads = self.swap
        self.experts[[row, other]] = self.experts[[other, row]]
        self.swap = self._best_swap()

    def _if_in_row(self) -> _Loads:
        """``[rows, rows, ranks]``: the loads by the expert of the second row, if it were in the first."""
        loads: _Loads = self._per_kind[self._kinds[:, None], self.experts[None, :]]
        return loads

    def _best_swap(self) -> _Swap | None:
        """Of those worth it, after which the busiest owner has least; of such, the second busiest; and so on."""
        rows, others = np.triu_indices(len(self.experts), 1)
        differ = self._movable[rows] & self._movable[others] & (self._kinds[rows] != self._kinds[others])
        rows, others = rows[differ], others[differ]
        if not len(rows):
            return None
        there = self._if_in_row()
        here = there[np.arange(len(there)), np.arange(len(there))]
        after = self._loads - here[rows] - here[others] + there[rows, others] + there[others, rows]
        busiest_first = -np.sort(-after, axis=1)
        relief = -np.sort(-self._loads) - busiest_first
        first = relief[np.arange(len(relief)), (relief != 0).argmax(axis=1)]  # of the owners who are read otherwise
        left = np.flatnonzero(first * LEAST >= max(self._loads.max(), 1))
        if not len(left):
            return None
        for column in busiest_first.T:
            left = left[column[left] == column[left].min()]
        best = left[0]
        return _Swap(int(rows[best]), int(others[best]), after[best])

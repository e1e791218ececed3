"""Experts that change places between owners, so that their links are evenly used: what, and how nobody loses a byte.

[Note: Moving experts]
All ranks tell each other how their tokens were routed, work out the same new order, and each reads the experts that
come to it into memory of its own. So far nothing is written: that is one attempt. Once all have read, all write what
they hold into their own rows, which is an update whose bytes they have already: the other attempt. What an update
promises, a move does: edges, checksums, doubt where a rank dies in its middle, and which shards are written anew then.
See [Note: The latest order] for who goes by which order where.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from vmm_dwdp.errors import ExchangeError
from vmm_dwdp.group.agreement import LAST_STEP
from vmm_dwdp.group.exchange import Exchange, Numbers
from vmm_dwdp.group.sleep import SleepingMembership
from vmm_dwdp.layout.balance import Counts, balanced
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.placement import Owner, nearest_first


class Arriving(NamedTuple):
    """An expert that comes to this rank: its part of a weight, ``[...]``, in memory of its own."""

    layer: int
    weight: str
    expert: int
    value: torch.Tensor


class Moves(NamedTuple):
    """What changes places.

    Attributes:
        order: afterwards; the same on all ranks.
        arriving: what comes to this rank.
        moved: how many experts are in other rows afterwards, of all layers; the same on all ranks.
    """

    order: ExpertOrder
    arriving: list[Arriving]
    moved: int


class MovingMembership(SleepingMembership):
    """A rank's part in a group whose experts may move."""

    _routed: Sequence[int] = ()  # what this rank tells of its tokens, of every layer's experts

    def _numbers(self, what: Numbers, owner: Owner) -> list[int]:
        if what == "order":
            return self._assembly.tables.order.numbers(self._layers)
        return list(self._routed) if what == "routed" else super()._numbers(what, owner)

    def agree_on_moves(self, routed: Counts, most: int, timeout: float) -> Moves:
        """Settle with all ranks on what to move, and read what comes here; nothing is written, and passes may go on.

        Args:
            routed: how this rank's tokens were routed.
            most: swaps; of what the ranks say, the least.

        Raises:
            ExchangeError: a rank, which is named, did not come in time.
        """
        assert self._exchange is not None
        self._routed = [count for layer in self._layers for count in routed[layer.number]]
        deadline = time.monotonic() + timeout
        try:
            with self._exchange.attempt("rebalance", "rebalance: its tokens are counted", deadline, str(most)):
                told = self._told_by_all(self._exchange, deadline)
                most = min(most, *(int(offer) for offer in self._exchange.offers() if offer.isdecimal()))
                before = self._assembly.tables.order
                after = balanced(self._layers, before, told, most)
                with self._assembly.touching():
                    arriving = list(self._read(before, after))
                    self._driver.synchronize()
                self._exchange.step(1, "rebalance: this rank has read what comes to it", deadline)
                self._exchange.step(LAST_STEP, "rebalance: all have read", deadline)
        except ExchangeError as error:
            raise ExchangeError(f"nothing was written: {error}") from error
        changed = (
            was != now
            for layer in self._layers
            for was, now in zip(before.rows_of(layer), after.rows_of(layer), strict=True)
        )
        return Moves(after, arriving, sum(changed))

    def _told_by_all(self, exchange: Exchange, deadline: float) -> list[Counts]:
        """By rank, how its tokens were routed."""
        told: list[Counts] = []
        for rank in range(self.config.group_size):
            numbers = self._routed
            if rank != self._rank:
                numbers = exchange.collect_numbers("routed", rank, rank, len(self._routed), deadline)
            remaining = iter(numbers)
            told.append(
                {layer.number: [next(remaining) for _ in range(layer.placement.num_experts)] for layer in self._layers}
            )
        return told

    def _read(self, before: ExpertOrder, after: ExpertOrder) -> Iterator[Arriving]:
        for layer in self._layers:
            here = layer.placement.experts(self._rank)
            was, now = before.experts_of(layer), after.experts_of(layer)
            for row in here:
                if was[row] == now[row]:
                    continue
                source = before.rows_of(layer)[now[row]]
                owners = [owner for owner, _ in layer.placement.locate(source)]
                owner = nearest_first(owners, self._rank, self.config.group_size)[0]
                for weight in layer.weights:
                    shard = self._assembly.shard(layer, weight, owner)
                    value = shard[source - layer.placement.experts(owner).start].clone()
                    yield Arriving(layer.number, weight, now[row], value)

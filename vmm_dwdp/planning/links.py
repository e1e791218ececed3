"""How copies share the links of a group: at what rate each runs, and which one ends next.

A copy goes over two links, its reader's and its owner's, or its reader's to host memory and the host's own. The copies
on a link share it evenly, except that what one cannot use, because its other link is fuller, goes to the others: this
is max-min fairness (Bertsekas and Gallager, "Data Networks", 6.5.2). Two resolutions:

  * `CopyLinks`: every copy is a flow from one owner.
  * `FetchLinks`: everything a rank copies for a layer is one flow from all owners, in proportion to their bytes: the
    limit of streams or short slices that keep all owners busy. The busiest owner sets the pace of all who read there.
    When all readers of a group copy all the time, each reaches a stated share of its rate, and when fewer do, more in
    proportion: they meet less often. While a fetch lasts, its reader is taken to use the share with which it began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vmm_dwdp.layout.placement import HOST, Owner


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes a second.

    Attributes:
        reader: to one rank from all others. ``owner``: from one rank to all others. ``pair``: from one to one other.
        host_reader: to one rank from host memory. ``host``: from host memory to all ranks.
    """

    reader: float
    owner: float
    host_reader: float
    host: float
    pair: float = inf

    @property
    def alone(self) -> float:
        """Of a copy from one rank to another with nobody else on the links."""
        return min(self.reader, self.owner, self.pair)

    @property
    def switched(self) -> bool:
        """Whether one owner can fill a reader's link, so that readers meet at owners."""
        return self.pair >= self.reader


@dataclass(frozen=True)
class Flow:
    """``nbytes`` from owners in the given shares, which add up to 1."""

    shares: Mapping[Owner, float]
    nbytes: float


class Links(Protocol):
    """The flows under way; a reader has numbered lanes, each with at most one. Time, in seconds, never goes back."""

    def start(self, lane: int, flow: Flow, now: float) -> int:
        """Begin ``flow``; from how many readers besides this one its owner is read."""

    def stop(self, lane: int, now: float) -> None:
        """The flow of ``lane`` has ended."""

    def next_end(self) -> tuple[float, int]:
        """When the next flow ends if nothing else happens, and its lane; time ``inf`` if none is under way."""

    def changes(self) -> dict[int, float]:
        """Since the last call: by reader, the share of its link that its copies use now; after `next_end`."""


class _Flows:
    """What the two resolutions have in common: bytes left and rates, brought up to date when something changes."""

    def __init__(self, lanes: int) -> None:
        self._left = np.full(lanes, inf)  # bytes; infinite without a flow
        self._rate = np.ones(lanes)  # bytes a second; anything but 0 without a flow
        self._until = 0.0
        self._next: tuple[float, int] | None = (inf, -1)
        self._changes: dict[int, float] = {}

    def changes(self) -> dict[int, float]:
        changes, self._changes = self._changes, {}
        return changes

    def _advance(self, now: float) -> None:
        """Before any change: what was moved at the rates so far."""
        if now > self._until:
            self._left -= self._rate * (now - self._until)
            self._until = now
        self._next = None

    def next_end(self) -> tuple[float, int]:
        if self._next is None:
            self._share()
            seconds = self._left / self._rate
            lane = int(seconds.argmin())
            first = float(seconds[lane])
            self._next = (self._until + max(0.0, first), lane) if first < inf else (inf, -1)
        return self._next

    def _share(self) -> None:
        """After all changes of one moment: the rates from now on."""
        raise NotImplementedError


class CopyLinks(_Flows):
    """One owner per flow, for ``readers`` ranks with ``lanes`` lanes each."""

    def __init__(self, readers: int, lanes: int, rates: Rates) -> None:
        super().__init__(readers * lanes)
        self._lanes = lanes
        self._pair = rates.pair
        # The links: each reader's, each reader's to host memory, each owner's, the host's.
        self._readers = readers
        self._capacity = np.array(
            [rates.reader] * readers + [rates.host_reader] * readers + [rates.owner] * readers + [rates.host]
        )
        self._near = np.zeros(readers * lanes, dtype=np.intp)  # the links that each lane's flow goes over
        self._far = np.zeros(readers * lanes, dtype=np.intp)
        self._used = np.zeros(readers)  # the share of its link that each reader's copies use

    def start(self, lane: int, flow: Flow, now: float) -> int:
        (owner,) = flow.shares
        self._advance(now)
        reader = lane // self._lanes
        self._near[lane] = reader + (self._readers if owner == HOST else 0)
        self._far[lane] = 3 * self._readers if owner == HOST else 2 * self._readers + owner
        here = np.flatnonzero((self._far == self._far[lane]) & (self._left < inf)) // self._lanes
        self._left[lane] = flow.nbytes
        return len(set(here.tolist()) - {reader})

    def stop(self, lane: int, now: float) -> None:
        self._advance(now)
        self._left[lane] = inf

    def _share(self) -> None:
        lanes = np.flatnonzero(self._left < inf)
        near, far, size = self._near[lanes], self._far[lanes], len(self._capacity)
        capacity = self._capacity.copy()
        rate = np.zeros(len(lanes))
        open_ = np.ones(len(lanes), dtype=bool)
        while open_.any():
            users = np.bincount(near[open_], minlength=size) + np.bincount(far[open_], minlength=size)
            share = np.where(users > 0, capacity / np.maximum(users, 1), inf)
            least = share.min()
            if least >= self._pair:
                rate[open_] = self._pair
                break
            tight = share <= least * (1 + 1e-9)
            settled = open_ & (tight[near] | tight[far])
            rate[settled] = least
            used = np.bincount(near[settled], minlength=size) + np.bincount(far[settled], minlength=size)
            capacity = np.maximum(capacity - least * used, 0.0)
            open_ &= ~settled
        self._rate[lanes] = rate
        of_link = np.zeros(self._readers)
        np.add.at(of_link, lanes // self._lanes, rate / self._capacity[near])
        for reader in np.flatnonzero(np.abs(of_link - self._used) > 1e-9).tolist():
            self._changes[reader] = float(of_link[reader])
        self._used = of_link


class FetchLinks(_Flows):
    """All owners of a fetch in one flow, one lane a reader; every flow of a reader has the same shares.

    ``contended`` is the share of its rate that a reader reaches when all others copy, too.
    """

    def __init__(self, readers: int, rates: Rates, contended: float = 1.0) -> None:
        super().__init__(readers)
        self._lost = (1 - contended) / max(1, readers - 1)  # of the rate, by each other reader that copies
        self._linked = np.zeros(readers, dtype=bool)  # whether the reader copies from other ranks now
        self._rates = rates
        self._owners: Sequence[Owner] = [*range(readers), HOST]
        self._limit = np.array([rates.owner] * readers + [rates.host])
        self._tolerated = self._limit * (1 + 1e-9)  # so that rounding makes no owner short
        self._alone = np.ones(readers)  # each reader's rate if no owner is short
        self._wants = np.zeros((readers, len(self._owners)))  # that rate, by owner
        self._known: list[Flow | None] = [None] * readers
        self._demand = np.zeros(len(self._owners))  # what the flows under way want

    def start(self, lane: int, flow: Flow, now: float) -> int:
        if self._known[lane] is not flow:
            self._known[lane] = flow
            shares = np.array([flow.shares.get(owner, 0.0) for owner in self._owners])
            self._alone[lane] = self._rate_alone(shares)
            self._wants[lane] = shares * self._alone[lane]
        self._advance(now)
        self._left[lane] = flow.nbytes
        self._demand += self._wants[lane]
        self._linked[lane] = flow.shares.keys() != {HOST}
        self._changes[lane] = self._reached() if self._linked[lane] else 1.0
        return 0

    def _reached(self) -> float:
        return 1 - self._lost * max(0, int(self._linked.sum()) - 1)

    def _rate_alone(self, shares: NDArray[np.float64]) -> float:
        """The rate at which no link of the reader carries more than it can."""
        host = shares[-1]
        limits = (
            (self._rates.reader, 1 - host),
            (self._rates.pair, float(shares[:-1].max(initial=0.0))),
            (self._rates.host_reader, host),
        )
        return min(rate / share for rate, share in limits if share > 1e-12)

    def stop(self, lane: int, now: float) -> None:
        self._advance(now)
        self._left[lane] = inf
        self._demand -= self._wants[lane]
        self._linked[lane] = False
        self._changes[lane] = 0.0

    def _share(self) -> None:
        pace = np.where(self._linked, self._reached(), 1.0)
        short = np.flatnonzero(self._demand > self._tolerated)
        if short.size:
            pace = np.minimum(pace, self._pace(short))
        self._rate = self._alone * pace

    def _pace(self, short: NDArray[np.intp]) -> NDArray[np.float64]:
        """What is left of each reader's rate when the owners ``short`` give less than is wanted of them."""
        pace = np.ones(len(self._alone))
        given = self._limit[short] / self._demand[short]
        for position in np.argsort(-given):  # the shortest last: it overwrites the others
            pace[self._wants[:, short[position]] > 0] = given[position]
        return pace

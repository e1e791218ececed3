"""Runs that a rank takes one by one, each from the owner that is best then: the C half's twin in Python.

See [Note: Turns] in ``layout/turns.py`` for the rule, and ``allocator/_pulls.c`` for the thread that needs no
interpreter and sees a run end in memory. This one asks events, looks no layer ahead, and gives a run when the one
before has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from vmm_dwdp.allocator.driver import Driver, Lane
from vmm_dwdp.allocator.handles import Event, Ledger, ResourceStack
from vmm_dwdp.layout.turns import MOST_UNDER_WAY, Line, choose, is_alone, pullers, settle
from vmm_dwdp.memory.lines import SharedLines

_REST_SECONDS: Final = 20e-6  # between two looks


class _Flight(NamedTuple):
    """A run that was given to the driver."""

    owner: int
    ended: Event


class Puller:
    """Gives jobs whose lanes have runs. One thread calls all but `close`.

    Attributes:
        lines: of all ranks; not this object's own.
    """

    def __init__(self, driver: Driver, ledger: Ledger, lines: SharedLines) -> None:
        self.lines = lines
        self._driver = driver
        self._resources = ResourceStack()
        self._free = [self._resources.push(Event(driver, ledger, f"run {i}")) for i in range(MOST_UNDER_WAY)]
        self._flights: list[_Flight] = []
        at = lines.at
        self._rank, self._num_ranks = at.rank, at.num_ranks

    def give(self, lanes: Sequence[Lane]) -> None:
        """Give all runs of ``lanes`` to the driver, and return when it has the last; those that have none, first.

        Raises `DriverError`; runs that were given stay under way.
        """
        chosen = {lane.owner: lane for lane in lanes if lane.owner is not None}
        for lane in lanes:
            if lane.owner is None:
                give_whole(self._driver, lane)
        try:
            for after in {lane.after for lane in chosen.values()}:
                while not self._driver.complete(after):  # until then what is chosen would be runs that do not move
                    self._look()
                    time.sleep(_REST_SECONDS)
            for lane in chosen.values():
                self._driver.wait(lane.stream, lane.after)
            self._give_runs({owner: list(lane.runs) for owner, lane in chosen.items()}, chosen)
        finally:
            self._say(pulls=False)
        for lane in chosen.values():
            self._driver.record(lane.then, lane.stream)

    def _give_runs(self, left: dict[int, list[Any]], lanes: dict[int, Lane]) -> None:
        while any(left.values()):
            self._look()
            said, alive = self.lines.read()
            if len(self._flights) >= (MOST_UNDER_WAY if is_alone(self._rank, said, alive) else 1):
                time.sleep(_REST_SECONDS)
                continue
            owner = self._claim([len(left.get(rank, ())) for rank in range(self._num_ranks)], said, alive)
            ended = self._free.pop()
            try:
                self._driver.copy(left[owner].pop(0), lanes[owner].stream)
                self._driver.record(ended.event, lanes[owner].stream)
            except BaseException:
                self._free.append(ended)
                raise
            self._flights.append(_Flight(owner, ended))
            self._say(pulls=True)

    def _claim(self, left: list[int], said: Sequence[Line], alive: Sequence[bool]) -> int:
        """Choose, say so, and look again."""
        pulled = pullers(self._rank, said, alive)
        owner = choose(self._rank, left, pulled)
        self._say(pulls=True, claimed=owner)
        return settle(self._rank, owner, left, pulled[owner], *self.lines.read())

    def _look(self) -> None:
        """See which runs have ended."""
        for flight in [flight for flight in self._flights if self._driver.complete(flight.ended.event)]:
            self._flights.remove(flight)
            self._free.append(flight.ended)
        self._say(pulls=True)

    def _say(self, *, pulls: bool, claimed: int | None = None) -> None:
        under_way = [0] * self._num_ranks
        for owner in [flight.owner for flight in self._flights] + ([] if claimed is None else [claimed]):
            under_way[owner] += 1
        self.lines.say(Line(int(pulls or bool(self._flights)), under_way))

    def close(self) -> None:
        """Free its events; the device is idle."""
        self._resources.close()


def give_whole(driver: Driver, lane: Lane) -> None:
    """Give a lane's copies to the driver, of which nothing is chosen."""
    driver.wait(lane.stream, lane.after)
    driver.copy(lane.copies, lane.stream)
    driver.record(lane.then, lane.stream)

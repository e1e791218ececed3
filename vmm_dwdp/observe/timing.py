"""How long things took on the device, by its own clock: the waits of a pass, or a stretch of work.

To time the waits, two events a layer stand around those of an acquire. They are read when the next pass is to be timed,
all at once, if the device is past them by then; a launching thread that is further ahead than that leaves the pass that
it begins untimed. To record them takes as many driver calls as the rest of an acquire, so after the first passes one in
several is timed, and stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmm_dwdp.allocator.driver import Driver, EventId, StreamId
from vmm_dwdp.allocator.handles import Event, Ledger, Owned, ResourceStack

FIRST: Final = 4  # passes that are all timed
EVERY: Final = 8  # passes, of which one is timed after that


@dataclass(frozen=True)
class PassTimes:
    """One pass, from its first layer to its last.

    Attributes:
        total_s: seconds until the compute stream came to the last layer.
        waited_s: seconds of these for which it waited for copies.
    """

    total_s: float
    waited_s: float


class PassTimer(Owned):
    """Times the waits of one pass after another.

    Attributes:
        waited_s: by layer, seconds that the compute stream waited for it in all passes that were timed, and in those
            that they stand for.
        latest: the latest pass that was timed from its first layer to its last, in that order.
        order: the layers of the pass whose events are recorded and not read yet; always the same list.
    """

    def __init__(self, driver: Driver, ledger: Ledger, num_layers: int) -> None:
        self.waited_s = [0.0] * num_layers
        self.latest: PassTimes | None = None
        self._driver = driver
        self._resources = ResourceStack()
        self.order: list[int] = []
        self._stands_for = 1  # passes: that one
        self._pass = 0  # the number of the one in progress
        self._due = 1  # of the next that is to be timed
        try:
            push = self._resources.push
            self._arrived = [push(Event(driver, ledger, f"arrived {i}", timed=True)) for i in range(num_layers)]
            self._resumed = [push(Event(driver, ledger, f"resumed {i}", timed=True)) for i in range(num_layers)]
        except BaseException:
            self.close()
            raise

    def begin(self) -> bool:
        """A pass begins. Tells whether it is timed: if so, `arrive` and `resume` are called at each of its layers."""
        self._pass += 1
        timed = self._pass >= self._due and self.read()
        if timed:
            self._stands_for = 1 if self._pass <= FIRST else EVERY
            self._due = self._pass + self._stands_for
        return timed

    def events(self, index: int) -> tuple[EventId, EventId]:
        """What `arrive` and `resume` record for layer ``index``."""
        return self._arrived[index].event, self._resumed[index].event

    def arrive(self, index: int, stream: StreamId) -> None:
        """Before ``stream`` waits for layer ``index``."""
        self._driver.record(self._arrived[index].event, stream)

    def resume(self, index: int, stream: StreamId) -> None:
        """After it."""
        self._driver.record(self._resumed[index].event, stream)
        self.order.append(index)

    def read(self) -> bool:
        """Add up what was recorded; false if the device is not past it yet."""
        if not all(self._driver.complete(self._resumed[index].event) for index in reversed(self.order)):
            return False
        waits = [self._driver.elapsed(self._arrived[i].event, self._resumed[i].event) for i in self.order]
        for index, seconds in zip(self.order, waits, strict=True):
            self.waited_s[index] += seconds * self._stands_for
        if len(self.order) > 1 and self.order == list(range(len(self.waited_s))):
            total = self._driver.elapsed(self._arrived[0].event, self._arrived[-1].event)
            self.latest = PassTimes(total, sum(waits[:-1]))
        self.order.clear()
        return True

    def close(self) -> None:
        self._resources.close()


class Span(Owned):
    """Times a stretch of work on a stream, again and again; one at a time, from the latest `start` to `stop`.

    Attributes:
        pending: whether a stretch was timed and not read yet.
    """

    def __init__(self, driver: Driver, ledger: Ledger, label: str) -> None:
        self.pending = False
        self._driver = driver
        self._resources = ResourceStack()
        try:
            self._start = self._resources.push(Event(driver, ledger, f"{label} starts", timed=True))
            self._stop = self._resources.push(Event(driver, ledger, f"{label} stops", timed=True))
        except BaseException:
            self.close()
            raise

    def start(self, stream: StreamId) -> None:
        """The stretch begins with the work that ``stream`` is given next."""
        self._driver.record(self._start.event, stream)

    def stop(self, stream: StreamId) -> None:
        """It ends with the work that ``stream`` was given so far."""
        self._driver.record(self._stop.event, stream)
        self.pending = True

    def read(self) -> float | None:
        """Its seconds, once; None if there is nothing to read, or the device is not past it yet."""
        if not self.pending or not self._driver.complete(self._stop.event):
            return None
        self.pending = False
        return self._driver.elapsed(self._start.event, self._stop.event)

    def close(self) -> None:
        self._resources.close()

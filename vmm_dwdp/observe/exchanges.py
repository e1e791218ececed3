"""How long a rank is held up by the ranks of its rail on other nodes, which it exchanges tokens with in every layer.

Of an exchange it is not known which part is waiting for a rank that comes later and which the network's: the device
sees one stretch in which the stream stands still.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Event, Ledger, Owned, ResourceStack
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.observe.guard import PASSES
from vmm_dwdp.observe.stats import Stats
from vmm_dwdp.observe.tracer import Tracer

HELD_UP: Final = 0.25  # the part of a pass that may be exchanges before it counts as held up by them

_log = logging.getLogger("vmm_dwdp")


class _Exchange(NamedTuple):
    layer: int
    begins: Event
    ends: Event


class Exchanges(Owned):
    """Times the exchanges of every layer; two events each, which are used again once they are read.

    Attributes:
        tracer: is told of them, while there is one.
        advice: what to know if passes are held up by exchanges; ``None`` if they are not.
    """

    def __init__(self, driver: Driver, ledger: Ledger, layers: Sequence[Layer]) -> None:
        """Takes nothing yet. ``layers``, in the order of a pass, may become more until the first exchange."""
        self.tracer: Tracer | None = None
        self.advice: str | None = None
        self._driver = driver
        self._ledger = ledger
        self._layers = layers
        self._resources = ResourceStack()
        self._free: list[Event] = []
        self._pending: deque[_Exchange] = deque()
        self._waited_s: dict[int, float] = {}
        self._pass: list[_Exchange] = []  # the first and the latest of a pass, whose events are still needed
        self._pass_s = 0.0  # seconds of exchanges in it
        self._latest_s = 0.0  # and in the latest whole one
        self._in_a_row = 0

    def begin(self, layer: int, stream: StreamId) -> Event | None:
        """An exchange begins on ``stream``; what is captured into a graph is not timed."""
        if self._driver.capturing():
            return None
        self.read()
        if self.tracer is not None:
            self.tracer.mark("exchange begins", layer, 0, stream)
        return self._recorded(stream)

    def end(self, layer: int, begins: Event | None, stream: StreamId) -> None:
        """What `begin` gave has ended on ``stream``."""
        if begins is None or self._driver.capturing():
            return
        self._pending.append(_Exchange(layer, begins, self._recorded(stream)))
        if self.tracer is not None:
            self.tracer.mark("exchange ends", layer, 0, stream)

    def abandon(self, begins: Event | None) -> None:
        """What `begin` gave has failed."""
        if begins is not None:
            self._free.append(begins)

    def _recorded(self, stream: StreamId) -> Event:
        if self._free:
            event = self._free.pop()
        else:
            with uninterrupted():
                event = self._resources.push(Event(self._driver, self._ledger, "exchange", timed=True))
        self._driver.record(event.event, stream)
        return event

    def read(self) -> None:
        """Add up what the device is past, which a capture into a graph would not bear a look at."""
        if self._driver.capturing():
            return
        while self._pending and self._driver.complete(self._pending[0].ends.event):
            exchange = self._pending.popleft()
            if self._pass and exchange.layer == self._layers[0].number != self._pass[-1].layer:
                self._end_pass()
            seconds = self._driver.elapsed(exchange.begins.event, exchange.ends.event)
            self._waited_s[exchange.layer] = self._waited_s.get(exchange.layer, 0.0) + seconds
            self._pass_s += seconds
            for past in self._pass[1:]:
                self._recycle(past)
            self._pass[1:] = [exchange]

    def _end_pass(self) -> None:
        """The next one begins; of one that was given up in its middle nothing is said."""
        first, last = self._pass[0], self._pass[-1]
        if (first.layer, last.layer) == (self._layers[0].number, self._layers[-1].number):
            self._latest_s = self._pass_s
            self._advise(self._driver.elapsed(first.begins.event, last.ends.event))
        for past in self._pass:
            self._recycle(past)
        self._pass, self._pass_s = [], 0.0

    def _recycle(self, exchange: _Exchange) -> None:
        self._free += [exchange.begins, exchange.ends]

    def _advise(self, total_s: float) -> None:
        self._in_a_row = self._in_a_row + 1 if self._latest_s > HELD_UP * total_s else 0
        if self._in_a_row == PASSES and self.advice is None:
            self.advice = (
                f"passes are held up by other nodes: of {total_s * 1e3:.3g} ms, {self._latest_s / total_s:.0%} are "
                "exchanges with this rank's rail, in which it waits for the rank with most tokens and for the network"
            )
            _log.warning(self.advice)

    def added_to(self, stats: Stats) -> Stats:
        """``stats`` with what is known here."""
        if not self._waited_s:
            return stats
        waited = self._waited_s
        layers = {number: replace(layer, node_wait_s=waited.get(number, 0.0)) for number, layer in stats.layers.items()}
        advice = stats.advice
        if advice is not None and self._latest_s:
            advice += f"; of what is called compute, {self._latest_s * 1e3:.3g} ms are exchanges with other nodes"
        return replace(stats, layers=layers, advice=advice, node_advice=self.advice)

    def close(self) -> None:
        self._pending.clear()
        self._resources.close()

"""When things happened on the device: events between the operations of a pass, read once the device is past them.

A mark is one event record; `benchmarks/tracing.py` measures what it costs. Events are used again as soon as they are
read, so that a trace may stay on for as long as one likes.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Event, Ledger, Owned, ResourceStack
from vmm_dwdp.allocator.uninterrupted import uninterrupted

What = Literal["arrived", "resumed", "released", "copies begin", "copies end", "exchange begins", "exchange ends"]

READ_AFTER: Final = 512  # marks, so that few events wait to be read


class Mark(NamedTuple):
    """One moment of one stream.

    Attributes:
        layer: the model's own number of the layer.
        lane: number of the copy stream; 0 for the compute stream.
        seconds: since the trace began.
    """

    what: What
    layer: int
    lane: int
    seconds: float


class Tracer(Owned):
    """Marks of one rank, all made by the launching thread: while it traces, it issues the copies, too.

    Attributes:
        recording: whether somebody waits for what is marked; set by whom.
    """

    def __init__(self, driver: Driver, ledger: Ledger, stream: StreamId) -> None:
        """Time 0 is when ``stream`` comes to this point."""
        self.recording = False
        self._driver = driver
        self._ledger = ledger
        self._resources = ResourceStack()
        self._free: list[Event] = []
        self._pending: deque[tuple[Event, What, int, int]] = deque()
        self._marks: list[Mark] = []
        self._ranges: dict[int, int] = {}  # NVTX range of each acquired layer
        self._nvtx = driver.device.type == "cuda"
        try:
            self._base, self._base_seconds = self._event(), 0.0
            driver.record(self._base.event, stream)
        except BaseException:
            self.close()
            raise

    def _event(self) -> Event:
        if self._free:
            return self._free.pop()
        with uninterrupted():
            return self._resources.push(Event(self._driver, self._ledger, "trace", timed=True))

    def mark(self, what: What, layer: int, lane: int, stream: StreamId) -> None:
        """``what`` happens when ``stream`` comes to this point."""
        if self._nvtx and lane == 0:
            self._mark_range(what, layer)
        event = self._event()
        self._driver.record(event.event, stream)
        self._pending.append((event, what, layer, lane))
        if len(self._pending) % READ_AFTER == 0:
            self._read()

    def _mark_range(self, what: What, layer: int) -> None:
        """A range of the launching thread from acquire to release, for Nsight Systems."""
        if what == "arrived":
            self._ranges[layer] = torch.cuda.nvtx.range_start(f"vmm-dwdp layer {layer}")
        elif what == "released":
            self._end_range(layer)

    def _end_range(self, layer: int) -> None:
        if layer in self._ranges:
            torch.cuda.nvtx.range_end(self._ranges.pop(layer))

    def _read(self) -> None:
        """Read the events that the device is past, in the order of their records."""
        while self._pending and self._driver.complete(self._pending[0][0].event):
            event, what, layer, lane = self._pending.popleft()
            seconds = self._base_seconds + self._driver.elapsed(self._base.event, event.event)
            self._marks.append(Mark(what, layer, lane, seconds))
            # The device gives times as 32-bit floats: close to the latest event they stay exact.
            self._free.append(self._base)
            self._base, self._base_seconds = event, seconds

    def finish(self) -> list[Mark]:
        """Wait for the device, and return those that were made."""
        self._driver.synchronize()
        self._read()
        for layer in list(self._ranges):
            self._end_range(layer)
        return self._marks

    def close(self) -> None:
        self._resources.close()

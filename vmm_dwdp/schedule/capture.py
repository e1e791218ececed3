"""A pass inside a CUDA graph.

[Note: Capture]
Nothing runs while a stream is captured, so what the slots hold does not change by it. A replay finds them as they are
between passes, whoever ran the pass before, and must leave them so. A captured pass therefore begins with the first
layers in their slots and ends with the copies that put them back. The compute stream waits for these at the end, as
CUDA demands of everything that is captured; so a replay takes as long as an eager pass and one layer's copy.

    replay     | wait r0 | layer 0 |-----| layer 1 |-----| wait | layer 2 |------| wait | layer 3 |-----| wait |
    copies                         |== layer 2 ==|       |== layer 3 ==| |== layer 0 ==|r0|   |== layer 1 ==|r1|

Inside, the events of the event protocol are edges of the graph, which mean nothing to anybody else. Only a slot's
`ready` events cross its border, as nodes that run with it: a replay waits for the record that an eager pass, another
graph or this one made last, and makes the record that the next to read the first layers waits for. `consumed` needs no
such node: what reads or writes a slot after a replay comes after it on the compute stream.

A wait refers to the latest record made before it, and a replay's is made at its launch, of which nobody tells us. So
once there is a graph, an eager pass ends only when the driver has been given the copies of the first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Ledger, ResourceStack
from vmm_dwdp.errors import StateError
from vmm_dwdp.schedule.layer import Fetch, SlotEvents, StagedLayer
from vmm_dwdp.schedule.staging import Staging, open_streams_and_slots


@dataclass(slots=True)
class _CapturedSlot(SlotEvents):
    """One slot as the capture in progress has it; its events are edges of the graph."""

    holds: int = 0  # the layer that it holds at this point of a replay
    fetched: bool = False  # whether a captured copy put it there
    reader: int | None = None  # the layer that was acquired in this capture and not yet released


class CapturedPasses:
    """The second transition table of staged layers, for streams that are being captured; see [Note: Capture].

    The calls come from one thread, the one of the passes. One capture can be in progress at a time. A capture that
    fails leaves nothing behind: the next one starts anew.
    """

    def __init__(self, driver: Driver, ledger: Ledger, staging: Staging, fetches: Sequence[Fetch]) -> None:
        """``fetches``: of the layers of ``staging``, in few copies, each of which is a node of the graph."""
        self._driver = driver
        self._staging = staging
        self._fetches = fetches
        self._capture = 0  # the one in progress, or the latest
        self._resources = ResourceStack()
        try:
            self._streams, self._slots = open_streams_and_slots(
                _CapturedSlot, len(staging.slots), driver, ledger, fetches, self._resources
            )
        except BaseException:
            self.close()
            raise

    def acquire(self, capture: int, layer: StagedLayer, stream: StreamId) -> None:
        """`StagedLayer.acquire` on a stream that is in ``capture``, as `Driver.capture` tells it.

        Raises `StateError` if the slots are not as they are between passes, or the layer is out of order.
        """
        self._enter(capture)
        slot = self._slot_of(layer)
        if slot.reader is not None:
            held = self._fetches[slot.reader].number
            raise StateError(f"layer {layer.number} is captured, but layer {held} has its slot and was not released")
        if slot.holds != layer.place:
            held = self._fetches[slot.holds].number
            raise StateError(f"layer {layer.number} is captured out of order: layer {held} is the next to use its slot")
        if slot.fetched:
            for ready in slot.ready[: len(self._fetches[layer.place].streams)]:
                self._driver.wait(stream, ready.event)
        else:
            for ready in layer.ready:
                self._driver.wait(stream, ready.event, external=True)
        slot.reader = layer.place

    def release(self, capture: int, layer: StagedLayer, stream: StreamId) -> None:
        """`StagedLayer.release` on a stream that is in ``capture``; at the end of a pass it waits for the copies."""
        slot = self._slot_of(layer)
        if capture != self._capture or slot.reader != layer.place:
            raise StateError(
                f"layer {layer.number} is released inside a graph capture, but was not acquired inside of it"
            )
        slot.reader = None
        if layer.following is not layer:
            self._fetch(slot, layer.following.place, stream)
        if all(slot.reader is None and slot.holds == first for first, slot in enumerate(self._slots)):
            self._join(stream)

    def is_acquired(self, layer: StagedLayer) -> bool:
        """Whether the layer is being read in the capture in progress."""
        return self._slot_of(layer).reader == layer.place

    def _slot_of(self, layer: StagedLayer) -> _CapturedSlot:
        return self._slots[layer.place % len(self._slots)]

    def _enter(self, capture: int) -> None:
        """On the first call in a capture: see that the slots are as a replay will find them."""
        if capture == self._capture:
            return
        self._staging.settle()
        for first, slot in enumerate(self._slots):
            slot.holds, slot.fetched, slot.reader = first, False, None
        self._capture = capture

    def _fetch(self, slot: _CapturedSlot, place: int, stream: StreamId) -> None:
        self._driver.record(slot.consumed.event, stream)
        for k, copies in enumerate(self._fetches[place].streams):
            copy_stream = self._streams[k].stream
            self._driver.wait(copy_stream, slot.consumed.event)
            self._driver.copy(copies, copy_stream)
            self._driver.record(slot.ready[k].event, copy_stream)
        slot.holds, slot.fetched = place, True

    def _join(self, stream: StreamId) -> None:
        for slot, first in zip(self._slots, self._staging.layers, strict=False):
            if slot.fetched:
                for ready in slot.ready[: len(self._fetches[first.place].streams)]:
                    self._driver.wait(stream, ready.event)
                for ready in first.ready:
                    self._driver.record(ready.event, stream, external=True)

    def close(self) -> None:
        """Free streams and events; the device is idle."""
        self._resources.close()

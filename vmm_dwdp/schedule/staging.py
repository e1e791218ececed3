"""The slots of a rank, and the layers that use them: what is of all layers, between passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from vmm_dwdp.allocator.driver import Driver, Lane, StreamId
from vmm_dwdp.allocator.handles import Event, Ledger, ResourceStack, Stream, undo_after
from vmm_dwdp.errors import StateError
from vmm_dwdp.observe.timing import PassTimer, PassTimes
from vmm_dwdp.schedule.hidden import HiddenPasses
from vmm_dwdp.schedule.issue import Issuer
from vmm_dwdp.schedule.layer import Fetch, Pipeline, Slot, SlotEvents, StagedLayer

S = TypeVar("S", bound=SlotEvents)


def open_streams_and_slots(
    slot: type[S], num_slots: int, driver: Driver, ledger: Ledger, fetches: Sequence[Fetch], owner: ResourceStack
) -> tuple[list[Stream], list[S]]:
    """As many copy streams as some fetch needs, and slots with their events; ``owner`` closes them."""
    streams = [owner.push(Stream(driver, ledger, f"copies {i}")) for i in range(max(f.num_streams for f in fetches))]

    def event(label: str) -> Event:
        return owner.push(Event(driver, ledger, label))

    slots = [slot([event(f"slot {i} ready") for _ in streams], event(f"slot {i} consumed")) for i in range(num_slots)]
    return streams, slots


class Staging:
    """All staged layers, in the order of a pass. One thread calls all but `stop`.

    Attributes:
        layers: in the order of a pass.
        slots: as many as ``prefetch_depth``, or as there are layers.
        pipeline: what the layers share.
    """

    _layer: type[StagedLayer] = StagedLayer

    def __init__(
        self, driver: Driver, ledger: Ledger, issuer: Issuer, fetches: Sequence[Fetch], prefetch_depth: int
    ) -> None:
        """Starts fetching the first ``prefetch_depth`` layers. Takes over ``issuer``."""
        self._driver = driver
        self._issuer = issuer
        self._hidden = HiddenPasses()
        self._timed_nbytes = sum(fetch.nbytes for fetch in fetches[1:])  # until a pass comes to its last layer
        self._resources = ResourceStack()
        try:
            depth = min(prefetch_depth, len(fetches))
            streams, self.slots = open_streams_and_slots(Slot, depth, driver, ledger, fetches, self._resources)
            timer = self._resources.push(PassTimer(driver, ledger, len(fetches)))
            self.pipeline = Pipeline(driver, issuer, streams, timer, len(fetches))
            self.layers = [
                self._make(self.slots[place % depth], place, fetch, is_first=place < depth)
                for place, fetch in enumerate(fetches)
            ]
            for place, each in enumerate(self.layers):
                each.following = self.layers[place + depth if place + depth < len(fetches) else place % depth]
            self.layers[-1].is_last = True
            self.reset(driver.current_stream())
        except BaseException as error:
            undo_after(error, self.abandon)
            raise

    def _make(self, slot: Slot, place: int, fetch: Fetch, *, is_first: bool) -> StagedLayer:
        return self._layer(self.pipeline, slot, place, fetch, self._lanes(slot, fetch), is_first=is_first)

    def _lanes(self, slot: Slot, fetch: Fetch) -> list[Lane]:
        after, streams = slot.consumed.event, self.pipeline.streams
        lanes = [
            Lane(stream.stream, after, copies, ready.event)
            for stream, copies, ready in zip(streams, fetch.streams, slot.ready, strict=False)
        ]
        for place, (owner, copies, runs) in enumerate(fetch.chosen, len(lanes)):
            at = place % fetch.num_streams
            lanes.append(Lane(streams[at].stream, after, copies, slot.ready[at].event, owner, runs))
        return lanes

    def begins(self, tokens: int | None) -> PassTimes | None:
        """A pass of ``tokens`` has begun; gives the latest that was timed before it."""
        pipeline = self.pipeline
        latest = pipeline.timer.latest
        choosing = self._issuer.choosing
        copies_s = self._timed_nbytes * choosing.seconds_per_byte
        choosing.whole = self._hidden.hides(latest, tokens, copies_s, timed=pipeline.timed)
        return latest

    def reset(self, stream: StreamId) -> None:
        """Give up layers that were acquired on ``stream``, and make the slots as they are between passes."""
        for slot, first in zip(self.slots, self.layers, strict=False):
            if slot.reader is not None:
                self._driver.record(slot.consumed.event, stream)
                slot.reader = None
            first.fill(stream)

    def drain(self) -> None:
        """Wait until every copy that was asked for is done. Raises `StateError` if a layer is acquired."""
        for slot in self.slots:
            if slot.reader is not None:
                raise StateError(f"layer {slot.reader.number} was acquired, and was not released")
        self.held()

    def held(self) -> list[StagedLayer]:
        """The layers that slots hold; waits until every copy that was asked for is done."""
        for slot in self.slots:
            slot.await_issue(self.pipeline)
        for stream in self.pipeline.streams:
            self._driver.synchronize(stream.stream)
        return [slot.holds for slot in self.slots if slot.holds is not None]

    def forget(self) -> None:
        """After `drain`: what the slots hold will not be true any more. `reset` fetches it again."""
        for slot in self.slots:
            slot.holds = None

    def settle(self) -> None:
        """See that the slots are as they are between passes, and that the driver has been given all copies; from now on
        it has been whenever a pass is over. Raises `StateError` if a pass is not.
        """
        for slot, first in zip(self.slots, self.layers, strict=False):
            if slot.reader is not None:
                number = slot.reader.number
                raise StateError(f"layer {number} was acquired outside of the graph capture, and was not released")
            if slot.holds is not first:
                number = first.number
                raise StateError(f"a graph capture begins between passes, with layer {number} in its slot: call reset")
            slot.await_issue(self.pipeline)
            first.job.whole = True  # or a release would wait for compute, before its runs can be chosen
        self.pipeline.prompt = True

    def check_integrity(self) -> None:
        """Raise `StateError` unless every slot holds a layer of its own, and its reader's if it has one."""
        for number, slot in enumerate(self.slots):
            if slot.holds is not None and slot.holds.slot is not slot:
                raise StateError(f"slot {number} holds layer {slot.holds.number}, which is not its own")
            if slot.reader is not None and slot.reader is not slot.holds:
                raise StateError(f"slot {number} is read as layer {slot.reader.number}, which it is not")

    def stop(self) -> None:
        """Stop issuing; what was issued may still run. A second call does nothing."""
        self._issuer.close()

    def close(self) -> None:
        """Free streams and events, after `stop`; the device is idle."""
        self._issuer.free()
        self._resources.close()

    def abandon(self) -> None:
        """`stop`, wait for the device, and `close`."""
        self.stop()
        self._driver.synchronize()
        self.close()

"""The schedule: which layer each slot holds, what to copy next, and the events that keep copies and kernels apart.

[Note: The event protocol]
Layer ``i`` always uses slot ``i % depth``. A slot has two kinds of events, and each has one recorder and one waiter:

    ready      one for each copy stream, recorded on it after its last copy into the slot; `acquire` makes the compute
               stream wait for all of them before the first kernel that reads the slot
    consumed   recorded on the compute stream by `release`, after the last kernel that reads the slot; every copy stream
               waits for it before its first copy that overwrites the slot

    compute    | layer 0, slot 0 |c0| layer 1, slot 1 |c1| wait r0 | layer 2, slot 0 |c0| ...
    copies     ............... wait c0 |== layer 2 ==|r0| wait c1 |== layer 3 ==|r1| wait c0 |== layer 4 ==|r0| ...

So a layer is fetched at the release of the layer that holds its own slot, never earlier. At the end of a pass that is
one of the first layers of the next pass; between passes slot ``i`` holds, or is being filled with, layer ``i``.

An event is waited for only after it was recorded: a wait refers to the latest record made before it. `consumed` is
recorded before the fetch is submitted, and `acquire` waits for the issuer before it waits for `ready`.

Copy streams do not wait for each other, so one that is ahead goes on with the next layer. Where a slot is refilled
before anything read it, the compute stream waits for `ready` and records `consumed` all the same: otherwise copies of
the new fetch on one stream could meet those of the old one on another.

[Note: A slot that holds nothing]
Anything may end between two steps of the launching thread: by Ctrl-C, a signal handler's exception, or a call that the
driver refuses. So a slot says "nothing" before the job that fills it is handed over, and names the layer only after.
What ends in between leaves "nothing", with some of the job's copies under way or none. Whoever fills such a slot first
waits for all that was handed over, and for the copy streams.

[Note: The path of the launching thread]
The launching thread comes to `acquire` and `release` from launching kernels, which drives whatever it ran before out of
its caches: on an H100's host a function of ours then takes it 2 to 5 microseconds to call, and the first wait, the
first record and waking a thread 12 to 27 each, a tenth of which they take in a loop. So what it does at every layer is
written out in few functions, nothing is made there that can be made before, and what is rarely needed is asked for
before it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from vmm_dwdp.allocator.driver import Driver, Lane, Ticket
from vmm_dwdp.allocator.handles import Event, Ledger, ResourceStack, Stream, undo_after
from vmm_dwdp.errors import StateError
from vmm_dwdp.observe.timing import PassTimer
from vmm_dwdp.observe.tracer import Tracer
from vmm_dwdp.schedule.issue import InlineIssuer, Issuer, Job


@dataclass(frozen=True)
class Fetch:
    """What one layer's prefetch gives to the driver.

    Attributes:
        number: the model's own number of the layer, for messages.
        streams: for each copy stream that takes part, what `Driver.prepare` made of its copies.
        nbytes: bytes that they move.
    """

    number: int
    streams: tuple[Any, ...]
    nbytes: int


@dataclass
class LayerCounts:
    """What happened to one layer so far."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0


@dataclass
class SlotEvents:
    """The events of one slot; see [Note: The event protocol]."""

    ready: list[Event]  # by copy stream
    consumed: Event


@dataclass
class Slot(SlotEvents):
    """The memory that some layers share, at this point of the launching thread's program."""

    holds: int | None = None  # the layer that it holds or is being filled with; see [Note: A slot that holds nothing]
    reader: int | None = None  # the layer that was acquired and not yet released
    read: bool = True  # whether what it holds was acquired since it was fetched
    ticket: Ticket | None = None  # the latest fetch into it


S = TypeVar("S", bound=SlotEvents)


def open_streams_and_slots(
    slot: type[S], num_slots: int, driver: Driver, ledger: Ledger, fetches: Sequence[Fetch], owner: ResourceStack
) -> tuple[list[Stream], list[S]]:
    """As many copy streams as some fetch needs, and slots with their events; ``owner`` closes them."""
    streams = [owner.push(Stream(driver, ledger, f"copies {i}")) for i in range(max(len(f.streams) for f in fetches))]

    def event(label: str) -> Event:
        return owner.push(Event(driver, ledger, label))

    slots = [slot([event(f"slot {i} ready") for _ in streams], event(f"slot {i} consumed")) for i in range(num_slots)]
    return streams, slots


class Prefetcher:
    """Fetches layers into slots ahead of their use. One thread calls `acquire`, `release` and `reset`.

    Nothing here waits for the device, except on a driver whose compute is synchronous.

    Attributes:
        counts: by layer.
        following: for each layer, the next that uses its slot, in cyclic order.
        timer: times the waits of `acquire`.
        slots: as many as ``prefetch_depth``, or as there are layers.
        tracer: is told what happens, while there is one.
    """

    def __init__(
        self, driver: Driver, ledger: Ledger, issuer: Issuer, fetches: Sequence[Fetch], prefetch_depth: int
    ) -> None:
        """Starts fetching the first ``prefetch_depth`` layers. Takes over ``issuer``."""
        self.counts = [LayerCounts() for _ in fetches]
        self.tracer: Tracer | None = None
        self._driver = driver
        self._issuer = issuer
        self._fetches = fetches
        self._latest = len(fetches)  # the layer that was acquired last
        self._prompt = False  # whether the copies of the first layers are given to the driver before a pass ends
        self._resources = ResourceStack()
        try:
            self._streams, self.slots = open_streams_and_slots(
                Slot, min(prefetch_depth, len(fetches)), driver, ledger, fetches, self._resources
            )
            self.timer = self._resources.push(PassTimer(driver, ledger, len(fetches)))
            depth = len(self.slots)
            # By layer, see [Note: The path of the launching thread]
            self._slot_of = [self.slots[index % depth] for index in range(len(fetches))]
            self._lanes_of = [self._lanes(slot, fetch) for slot, fetch in zip(self._slot_of, fetches, strict=True)]
            self._jobs = [
                issuer.job(partial(self._issue, lanes, fetch.number), lanes)
                for lanes, fetch in zip(self._lanes_of, fetches, strict=True)
            ]
            self.following = [i + depth if i + depth < len(fetches) else i % depth for i in range(len(fetches))]
            self.reset(driver.current_stream())
        except BaseException as error:
            undo_after(error, self.abandon)
            raise

    def acquire(self, index: int, stream: int) -> None:
        """Make ``stream`` wait until layer ``index`` is in its slot. Raises `StateError` if the slot is being read."""
        slot, timer = self._slot_of[index], self.timer
        if slot.reader is not None:
            held, asked = self._fetches[slot.reader].number, self._fetches[index].number
            if slot.reader == index:
                raise StateError(f"layer {asked} is acquired already, and was not released")
            raise StateError(f"layer {asked} needs the slot of layer {held}, which was not released")
        hit = slot.holds == index
        if index <= self._latest:
            timer.begin()
        if timer.timed:
            timer.arrive(index, stream)
        if self.tracer is not None:
            self.tracer.mark("arrived", self._fetches[index].number, 0, stream)
        if not hit:
            self._fetch(slot, index, stream)
        if slot.ticket is not None and not slot.ticket.done:
            self._await_issue(slot)
        for ready in slot.ready:  # those of copy streams that took no part are complete since an earlier fetch
            self._driver.wait(stream, ready.event)
        if timer.timed:
            timer.resume(index, stream)
        if self.tracer is not None:
            self.tracer.mark("resumed", self._fetches[index].number, 0, stream)
        self._latest = slot.reader = index
        slot.read = True
        counts = self.counts[index]
        counts.hits += hit
        counts.misses += not hit

    def release(self, index: int, stream: int) -> None:
        """Layer ``index`` has been read by the work given to ``stream``: fetch the next layer that uses its slot."""
        slot = self._slot_of[index]
        if slot.reader != index:
            raise StateError(f"layer {self._fetches[index].number} is released, but was not acquired")
        self._driver.record(slot.consumed.event, stream)
        if self.tracer is not None:
            self.tracer.mark("released", self._fetches[index].number, 0, stream)
        slot.reader = None
        following = self.following[index]
        if slot.holds != following:
            self._fetch(slot, following, stream)
        if self._prompt:
            self._fill(slot, following, stream)

    def ready(self, index: int) -> list[Event]:
        """The events that are recorded after the copies of layer ``index``."""
        return self.slots[index % len(self.slots)].ready[: len(self._fetches[index].streams)]

    def reset(self, stream: int) -> None:
        """Give up layers that were acquired on ``stream``, and make the slots as they are between passes."""
        for index, slot in enumerate(self.slots):
            if slot.reader is not None:
                self._driver.record(slot.consumed.event, stream)
                slot.reader = None
            self._fill(slot, index, stream)

    def drain(self) -> None:
        """Wait until every copy that was asked for is done. Raises `StateError` if a layer is acquired."""
        for slot in self.slots:
            if slot.reader is not None:
                raise StateError(f"layer {self._fetches[slot.reader].number} was acquired, and was not released")
        self.held()

    def held(self) -> list[int]:
        """The layers that slots hold; waits until every copy that was asked for is done."""
        for slot in self.slots:
            self._await_issue(slot)
        for stream in self._streams:
            self._driver.synchronize(stream.stream)
        return [slot.holds for slot in self.slots if slot.holds is not None]

    def forget(self) -> None:
        """After `drain`: what the slots hold will not be true any more. `reset` fetches it again."""
        for slot in self.slots:
            slot.holds = None

    def check_integrity(self) -> None:
        """Raise `StateError` unless every slot holds a layer of its own, and its reader's if it has one."""
        for number, slot in enumerate(self.slots):
            if slot.holds is not None and slot.holds % len(self.slots) != number:
                raise StateError(f"slot {number} holds layer {self._fetches[slot.holds].number}, which is not its own")
            if slot.reader is not None and slot.reader != slot.holds:
                raise StateError(f"slot {number} is read as layer {self._fetches[slot.reader].number}, which it is not")

    def settle(self) -> None:
        """See that the slots are as they are between passes, and that the driver has been given all copies; from now on
        it has been whenever a pass is over. Raises `StateError` if a pass is not.
        """
        for first, slot in enumerate(self.slots):
            if slot.reader is not None:
                number = self._fetches[slot.reader].number
                raise StateError(f"layer {number} was acquired outside of the graph capture, and was not released")
            if slot.holds != first:
                number = self._fetches[first].number
                raise StateError(f"a graph capture begins between passes, with layer {number} in its slot: call reset")
            self._await_issue(slot)
        self._prompt = True

    def _fill(self, slot: Slot, index: int, stream: int) -> None:
        if slot.holds != index:
            self._fetch(slot, index, stream)
        if self._prompt and index < len(self.slots):
            self._await_issue(slot)

    def _fetch(self, slot: Slot, index: int, stream: int) -> None:
        if slot.holds is None:
            self._await_issue(slot)
        elif not slot.read:
            self._await_issue(slot)
            for ready in slot.ready:
                self._driver.wait(stream, ready.event)
            self._driver.record(slot.consumed.event, stream)
        slot.holds = None
        if self.tracer is None:
            slot.ticket = self._issuer.submit(self._jobs[index])
        else:
            traced = partial(self._issue, self._lanes_of[index], self._fetches[index].number, self.tracer)
            slot.ticket = InlineIssuer().submit(Job(traced))
        slot.read = False
        slot.holds = index
        self.counts[index].fetched_bytes += self._fetches[index].nbytes

    def _lanes(self, slot: Slot, fetch: Fetch) -> list[Lane]:
        return [
            Lane(stream.stream, slot.consumed.event, copies, ready.event)
            for stream, copies, ready in zip(self._streams, fetch.streams, slot.ready, strict=False)
        ]

    def _issue(self, lanes: Sequence[Lane], layer: int, tracer: Tracer | None = None) -> None:
        for number, lane in enumerate(lanes):
            self._driver.wait(lane.stream, lane.after)
            if tracer is not None:
                tracer.mark("copies begin", layer, number, lane.stream)
            self._driver.copy(lane.copies, lane.stream)
            self._driver.record(lane.then, lane.stream)
            if tracer is not None:
                tracer.mark("copies end", layer, number, lane.stream)

    def _await_issue(self, slot: Slot) -> None:
        """Wait until the driver has been given the copies into ``slot``; into one that holds nothing, until none are
        under way. Raises what the driver refused, and the slot holds nothing then."""
        if slot.holds is None:
            self._issuer.flush()
            for stream in self._streams:
                self._driver.synchronize(stream.stream)
        elif slot.ticket is not None:
            try:
                slot.ticket.result()
            except Exception:
                slot.holds = None
                raise
        slot.ticket = None

    def is_acquired(self, index: int) -> bool:
        """Whether layer ``index`` is being read."""
        return self._slot_of[index].reader == index

    def stop(self) -> None:
        """Stop issuing; what was issued may still run. A second call does nothing."""
        self._issuer.close()

    def close(self) -> None:
        """Free streams and events, after `stop`; the device is idle."""
        self._resources.close()

    def abandon(self) -> None:
        """`stop`, wait for the device, and `close`."""
        self.stop()
        self._driver.synchronize()
        self.close()

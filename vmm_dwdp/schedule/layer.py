"""A layer's life: into its slot, to the kernels that read it, and out of the way of the next.

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

What happens at nearly every layer is done in C: see [Note: The hit path].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from vmm_dwdp.allocator.driver import Driver, Lane, StreamId, Ticket
from vmm_dwdp.allocator.handles import Event, Stream
from vmm_dwdp.config import Mode
from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.copies import MAX_STREAMS
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Weights
from vmm_dwdp.observe.timing import PassTimer
from vmm_dwdp.observe.tracer import Tracer
from vmm_dwdp.schedule.hit_path import LayerState, PipelineState, SlotState
from vmm_dwdp.schedule.issue import InlineIssuer, Issuer, Job


class OwnerCopies(NamedTuple):
    """The copies from one rank's memory, as `Driver.prepare` made them: all at once, and in runs."""

    owner: int
    copies: Any
    runs: tuple[Any, ...]


@dataclass(frozen=True)
class Fetch:
    """What one layer's prefetch gives to the driver.

    Attributes:
        number: the model's own number of the layer, for messages.
        streams: for each copy stream that takes part, what `Driver.prepare` made of its copies.
        nbytes: bytes that they move, and those of ``chosen``.
        chosen: what else is copied, in runs of which the next is chosen; on the streams after those, in turn.
    """

    number: int
    streams: tuple[Any, ...]
    nbytes: int
    chosen: tuple[OwnerCopies, ...] = ()

    @property
    def num_streams(self) -> int:
        return min(len(self.streams) + len(self.chosen), max(MAX_STREAMS, len(self.streams)))


class Pipeline(PipelineState):
    """What the staged layers of a rank share.

    Attributes:
        driver: of the device.
        issuer: gives a layer's copies to the driver.
        streams: on which they run.
        timer: times the waits of `StagedLayer.acquire`.
        timed: whether the pass in progress is.
        watched: whether somebody else is to see every acquire and release of it.
        tracer: is told what happens, while there is one.
        latest: the place in a pass of the layer that was acquired last.
        prompt: whether the driver is given the copies of the first layers before a pass ends; see [Note: Capture].
    """

    driver: Driver
    issuer: Issuer
    timed: bool
    watched: bool
    tracer: Tracer | None
    latest: int
    prompt: bool

    def __init__(
        self, driver: Driver, issuer: Issuer, streams: list[Stream], timer: PassTimer, num_layers: int
    ) -> None:
        super().__init__(driver, issuer, driver.native_calls, timer.order, num_layers)
        self.streams = streams
        self.timer = timer


@dataclass
class SlotEvents:
    """The events of one slot; see [Note: The event protocol]."""

    ready: list[Event]  # by copy stream
    consumed: Event


class Slot(SlotEvents, SlotState):
    """The memory that some layers share, at this point of the launching thread's program."""

    holds: StagedLayer | None  # or is being filled with; see [Note: A slot that holds nothing]
    reader: StagedLayer | None  # the layer that was acquired and not yet released
    read: bool  # whether what it holds was acquired since it was fetched; so it is where nothing was
    ticket: Ticket | None  # the latest fetch into it

    def __init__(self, ready: list[Event], consumed: Event) -> None:
        SlotState.__init__(self)
        SlotEvents.__init__(self, ready, consumed)

    def await_issue(self, pipeline: Pipeline) -> None:
        """Wait until the driver has been given the copies into this slot; if it holds nothing, until none are under
        way. Raises what the driver refused, and the slot holds nothing then."""
        if self.holds is None:
            pipeline.issuer.flush()
            for stream in pipeline.streams:
                pipeline.driver.synchronize(stream.stream)
        elif self.ticket is not None:
            try:
                self.ticket.result()
            except Exception:
                self.holds = None
                raise
        self.ticket = None


class StagedLayer(LayerState):
    """One layer and its slot. One thread calls `acquire`, `release` and `fill`.

    Nothing here waits for the device, except on a driver whose compute is synchronous.

    Attributes:
        place: in a pass, from 0.
        number: the model's own.
        slot: shared with the layers ``depth`` places before and after.
        following: the layer that uses the slot next, in cyclic order; whoever makes all layers sets it.
        is_first: whether the slot holds it between passes.
        is_last: whether a pass ends with it; whoever makes all layers sets it.
        weights: what `acquire` gives; whoever knows sets it.
        hits, misses, fetched_bytes: what happened to it since publish.
    """

    slot: Slot
    following: StagedLayer
    weights: Weights | None

    def __init__(
        self, pipeline: Pipeline, slot: Slot, place: int, fetch: Fetch, lanes: Sequence[Lane], *, is_first: bool
    ) -> None:
        """``lanes``: what each copy stream that takes part in ``fetch`` is given."""
        ready = tuple(event.event for event in slot.ready)
        super().__init__(pipeline, slot, ready, slot.consumed.event, *pipeline.timer.events(place))
        self.place = place
        self.number = fetch.number
        self.is_first = is_first
        self.nbytes = fetch.nbytes
        self._pipeline = pipeline
        self._driver = pipeline.driver
        self._lanes = lanes
        self.job = pipeline.issuer.job(partial(self._issue, None), lanes)

    def acquire(self, stream: StreamId) -> None:
        """Make ``stream`` wait until the layer is in its slot. Raises `StateError` if the slot is being read."""
        if self.enter(stream):
            return
        slot, pipeline = self.slot, self._pipeline
        timer, tracer = pipeline.timer, pipeline.tracer
        if slot.reader is not None:
            if slot.reader is self:
                raise StateError(f"layer {self.number} is acquired already, and was not released")
            raise StateError(
                f"layer {self.number} needs the slot of layer {slot.reader.number}, which was not released"
            )
        hit = slot.holds is self
        if self.place <= pipeline.latest:
            pipeline.timed = timer.begin()
        if pipeline.timed:
            timer.arrive(self.place, stream)
        if tracer is not None:
            tracer.mark("arrived", self.number, 0, stream)
        if not hit:
            self._fetch(stream)
        if slot.ticket is not None and not slot.ticket.done:
            slot.await_issue(pipeline)
        for ready in slot.ready:  # those of copy streams that took no part are complete since an earlier fetch
            self._driver.wait(stream, ready.event)
        if pipeline.timed:
            timer.resume(self.place, stream)
        if tracer is not None:
            tracer.mark("resumed", self.number, 0, stream)
        pipeline.latest = self.place
        slot.reader = self
        slot.read = True
        self.hits += hit
        self.misses += not hit

    def release(self, stream: StreamId) -> None:
        """The layer has been read by the work given to ``stream``: fetch the next that uses its slot."""
        if self.leave(stream):
            return
        slot, pipeline = self.slot, self._pipeline
        if slot.reader is not self:
            raise StateError(f"layer {self.number} is released, but was not acquired")
        self._driver.record(slot.consumed.event, stream)
        if pipeline.tracer is not None:
            pipeline.tracer.mark("released", self.number, 0, stream)
        slot.reader = None
        following = self.following
        if slot.holds is not following:
            following._fetch(stream)
        if pipeline.prompt:
            following.fill(stream)

    def fill(self, stream: StreamId) -> None:
        """Fetch the layer unless its slot holds it, after the work given to ``stream``, which read the slot last."""
        if self.slot.holds is not self:
            self._fetch(stream)
        if self._pipeline.prompt and self.is_first:
            self.slot.await_issue(self._pipeline)

    @property
    def ready(self) -> list[Event]:
        """The events that are recorded after the layer's copies."""
        return self.slot.ready[: len(self._lanes)]

    def _fetch(self, stream: StreamId) -> None:
        slot, pipeline = self.slot, self._pipeline
        if slot.holds is None:
            slot.await_issue(pipeline)
        elif not slot.read:
            slot.await_issue(pipeline)
            for ready in slot.ready:
                self._driver.wait(stream, ready.event)
            self._driver.record(slot.consumed.event, stream)
        slot.holds = None
        if pipeline.tracer is None:
            slot.ticket = pipeline.issuer.submit(self.job)
        else:
            slot.ticket = InlineIssuer().submit(Job(partial(self._issue, pipeline.tracer)))
        slot.read = False
        slot.holds = self
        self.fetched_bytes += self.nbytes

    def _issue(self, tracer: Tracer | None) -> None:
        for number, lane in enumerate(self._lanes):
            self._driver.wait(lane.stream, lane.after)
            if tracer is not None:
                tracer.mark("copies begin", self.number, number, lane.stream)
            self._driver.copy(lane.copies, lane.stream)
            self._driver.record(lane.then, lane.stream)
            if tracer is not None:
                tracer.mark("copies end", self.number, number, lane.stream)


class NoWeights(dict[Mode, Weights]):
    """Of a layer once the runtime is closed: a call that is in its middle then, in another thread or below a signal's
    handler, is told."""

    def __missing__(self, mode: Mode) -> Weights:
        raise StateError("the runtime is closed")


@dataclass(slots=True)
class ScheduledLayer:
    """One layer, in every mode that the config provides for.

    Attributes:
        layer: its shapes and places in memory.
        place: in a pass, from 0.
        weights: what `acquire` returns, by mode.
        staged: its slot and copies, if it can be staged.
        read_in_place: whether it is acquired in place.
        looked_up: whether it was looked up since.
        in_place: how often it was.
    """

    layer: Layer
    place: int
    weights: dict[Mode, Weights] = field(default_factory=dict)
    staged: StagedLayer | None = None
    read_in_place: bool = False
    looked_up: bool = False
    in_place: int = 0

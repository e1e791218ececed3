"""Every order in which launcher, issuing thread, copies and kernels can run, for what staged layers ask of them.

What staged layers ask of the driver does not depend on how fast the device is: it never looks. So one run against a
recording driver gives the whole program: what the launching thread does, what the issuing thread does, and what each of
them puts on which stream. `explore` then runs that program in every order that threads and streams allow, over states
that are a handful of integers, and checks that no kernel ever reads a slot with another layer's bytes in it.

    actor            takes its next step when
    launcher         always, except to await a job that the issuing thread has not finished, or a stream that has
                     not come to the end of what it was given
    issuing thread   the job was submitted
    a stream         its next operation was enqueued; a wait, once the record that it refers to has been executed

A copy and a kernel take two steps each, a beginning and an end, so that they can overlap.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vmm_dwdp.allocator.driver import Copy, Lane
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.schedule.issue import InlineIssuer, Job
from vmm_dwdp.schedule.layer import Fetch
from vmm_dwdp.schedule.staging import Staging

COMPUTE = 0  # the stream of kernels


class Op(NamedTuple):
    """One step of a thread. ``kind``: submit, await (of job ``value``); synchronize (with ``stream``); wait, record
    (event ``value``, on ``stream``); kernel (layer ``value``, on ``stream``); copy (``part`` of layer ``value``, on
    ``stream``); replay (of graph ``value``)."""

    kind: str
    value: int
    stream: int = -1
    part: int = 0


@dataclass
class Program:
    """What the two threads do, in order; each job of the issuing thread is a list of its own.

    A graph is the list of what was captured. To replay it is to enqueue all of it in one step, on the streams that were
    captured: each wait then refers to the latest record, of the graph itself or, if it is external, of anybody.
    """

    num_layers: int
    num_slots: int
    num_parts: int  # of a slot, each written by one copy
    launcher: list[Op] = field(default_factory=list)
    jobs: list[list[Op]] = field(default_factory=list)
    graphs: list[list[Op]] = field(default_factory=list)


class RecordingDriver:
    """The part of a driver that staged layers use, which only writes down what it is asked to do."""

    native_calls = None

    def __init__(self, program: Program) -> None:
        self.program = program
        self.writing = program.launcher  # the list of the thread that runs now
        self._next = 1

    def _new(self) -> int:
        self._next += 1
        return self._next - 1

    def create_stream(self) -> int:
        return self._new()

    def create_event(self, timed: bool) -> int:
        return self._new()

    def destroy_stream(self, stream: int) -> None: ...

    def destroy_event(self, event: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        self.writing.append(Op("synchronize", 0, stream))

    def current_stream(self) -> int:
        return COMPUTE

    def complete(self, event: int) -> bool:
        return True

    def elapsed(self, start: int, end: int) -> float:
        return 0.0

    def record(self, event: int, stream: int, *, external: bool = False) -> None:
        self.writing.append(Op("record", event, stream))

    def wait(self, stream: int, event: int, *, external: bool = False) -> None:
        self.writing.append(Op("wait", event, stream))

    def prepare(self, copies: Sequence[Copy]) -> Any:
        raise AssertionError("the explorer prepares its own copies")

    def capture(self, stream: int) -> int:
        """The number of the graph that is being written, from 1."""
        return next((n for n, graph in enumerate(self.program.graphs, 1) if graph is self.writing), 0)

    def copy(self, prepared: tuple[int, int], stream: int) -> None:
        layer, part = prepared
        self.writing.append(Op("copy", layer, stream, part))

    def kernel(self, layer: int, stream: int = COMPUTE) -> None:
        self.writing.append(Op("kernel", layer, stream))


class RecordingIssuer:
    """An issuing thread: its jobs are written down beside the launcher's steps."""

    def __init__(self, driver: RecordingDriver) -> None:
        self._driver = driver

    def job(self, work: Callable[[], None], lanes: Sequence[Lane]) -> Job:
        return Job(work)

    def submit(self, job: Job) -> _Ticket:
        program = self._driver.program
        number = len(program.jobs)
        program.launcher.append(Op("submit", number))
        program.jobs.append([])
        self._driver.writing = program.jobs[number]
        job.work()
        self._driver.writing = program.launcher
        return _Ticket(program, number)

    def flush(self) -> None:
        if self._driver.program.jobs:
            self._driver.program.launcher.append(Op("await", len(self._driver.program.jobs) - 1))

    def close(self) -> None: ...

    def free(self) -> None: ...


@dataclass
class _Ticket:
    program: Program
    number: int
    done: bool = False

    def result(self) -> None:
        self.program.launcher.append(Op("await", self.number))


def rotating(num_layers: int, depth: int, num_streams: int) -> list[Fetch]:
    """Fetches in which each stream fills a part of the slot, and another part for the slot's next layer."""
    return [
        Fetch(layer, tuple((layer, (stream + layer // depth) % num_streams) for stream in range(num_streams)), 1)
        for layer in range(num_layers)
    ]


Launch = Callable[[Staging, Callable[[int], None]], None]


def record(
    launch: Launch,
    num_layers: int,
    depth: int,
    *,
    thread: bool,
    staging: type[Staging] = Staging,
    num_streams: int = 1,
) -> Program:
    """The program of ``launch(staging, run)``, where ``run(layer)`` acquires, launches one kernel and releases."""
    program = Program(num_layers, min(depth, num_layers), num_streams)
    driver = RecordingDriver(program)
    issuer = RecordingIssuer(driver) if thread else InlineIssuer()
    made = staging(driver, Ledger(), issuer, rotating(num_layers, depth, num_streams), depth)  # type: ignore[arg-type]

    def run(layer: int) -> None:
        made.layers[layer].acquire(COMPUTE)
        driver.kernel(layer)
        made.layers[layer].release(COMPUTE)

    launch(made, run)
    program.launcher = without_timing(program)
    return program


def without_timing(program: Program) -> list[Op]:
    """The launcher's steps without records that nobody waits for: they order nothing, and would multiply the states."""
    waited = {op.value for op in _every(program) if op.kind == "wait"}
    return [op for op in program.launcher if op.kind != "record" or op.value in waited]


def _every(program: Program) -> list[Op]:
    return [*program.launcher, *(op for ops in program.jobs + program.graphs for op in ops)]


class _State(NamedTuple):
    """Where everybody is. Queues hold what was enqueued and not yet executed; a wait holds the record it refers to."""

    launched: int  # steps that the launcher has taken
    issued: tuple[int, int]  # the issuing thread's job, and its step in it
    submitted: int  # jobs
    queues: tuple[tuple[tuple[Op, int], ...], ...]  # by stream: (operation, how often its event had been recorded)
    begun: tuple[bool, ...]  # by stream: whether the first operation is a copy or kernel that has begun
    enqueued: tuple[int, ...]  # by event: records enqueued
    executed: tuple[int, ...]  # by event: records executed
    slots: tuple[tuple[int, ...], ...]  # by slot and part: the layer whose bytes it holds, or -1 while it is written


@dataclass
class Exploration:
    """What `explore` found: the first order that went wrong, if one did, and how many states there are."""

    violation: str | None
    num_states: int


def explore(program: Program) -> Exploration:
    """Run ``program`` in every order."""
    every = _every(program)
    streams = sorted({op.stream for op in every if op.stream >= 0})
    stream_index = {stream: index for index, stream in enumerate(streams)}
    recorded = sorted({op.value for op in every if op.kind == "record"})
    event_index = {event: index for index, event in enumerate(recorded)}

    def enqueue(state: _State, op: Op) -> _State:
        index = stream_index[op.stream]
        enqueued = state.enqueued
        refers_to = 0
        if op.kind in ("wait", "record"):
            event = event_index.get(op.value)
            if event is None:
                return state  # an event that is never recorded counts as complete
            if op.kind == "record":
                enqueued = _with(enqueued, event, enqueued[event] + 1)
            refers_to = enqueued[event]
        queue = (*state.queues[index], (op, refers_to))
        return state._replace(queues=_with(state.queues, index, queue), enqueued=enqueued)

    def launcher_step(state: _State) -> _State | None:
        if state.launched == len(program.launcher):
            return None
        op = program.launcher[state.launched]
        after = state._replace(launched=state.launched + 1)
        if op.kind == "submit":
            return after._replace(submitted=state.submitted + 1)
        if op.kind == "await":
            return after if state.issued[0] > op.value else None
        if op.kind == "synchronize":
            return None if state.queues[stream_index[op.stream]] else after
        if op.kind == "replay":
            return functools.reduce(enqueue, program.graphs[op.value], after)
        return enqueue(after, op)

    def issuing_step(state: _State) -> _State | None:
        job, step = state.issued
        if job == state.submitted:
            return None
        op = program.jobs[job][step]
        last = step + 1 == len(program.jobs[job])
        return enqueue(state._replace(issued=(job + 1, 0) if last else (job, step + 1)), op)

    def stream_step(state: _State, index: int) -> _State | str | None:
        if not state.queues[index]:
            return None
        op, refers_to = state.queues[index][0]
        popped = state._replace(
            queues=_with(state.queues, index, state.queues[index][1:]), begun=_with(state.begun, index, False)
        )
        if op.kind == "wait":
            return popped if state.executed[event_index[op.value]] >= refers_to else None
        if op.kind == "record":
            return popped._replace(executed=_with(state.executed, event_index[op.value], refers_to))
        slot = op.value % program.num_slots
        if op.kind == "copy":
            if state.begun[index]:
                return popped._replace(slots=_written(state.slots, slot, op.part, op.value))
            return state._replace(begun=_with(state.begun, index, True), slots=_written(state.slots, slot, op.part, -1))
        for held in state.slots[slot]:
            if held != op.value:
                return f"the kernel of layer {op.value} reads slot {slot}, which holds {_named(held)}"
        return popped if state.begun[index] else state._replace(begun=_with(state.begun, index, True))

    start = _State(
        launched=0,
        issued=(0, 0),
        submitted=0,
        queues=((),) * len(streams),
        begun=(False,) * len(streams),
        enqueued=(0,) * len(event_index),
        executed=(0,) * len(event_index),
        slots=((-1,) * program.num_parts,) * program.num_slots,
    )
    seen = {start}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        following = [launcher_step(state), issuing_step(state)]
        following += [stream_step(state, index) for index in range(len(streams))]
        if not any(following):
            if state.launched < len(program.launcher) or any(state.queues):
                return Exploration(f"nobody can go on after {state.launched} steps of the launcher", len(seen))
            if state.slots != tuple((first,) * program.num_parts for first in range(program.num_slots)):
                return Exploration(f"the slots hold {state.slots} at the end", len(seen))
        for found in following:
            if isinstance(found, str):
                return Exploration(found, len(seen))
            if found is not None and found not in seen:
                seen.add(found)
                waiting.append(found)
    return Exploration(None, len(seen))


def _named(held: int) -> str:
    return "unfinished bytes" if held < 0 else f"layer {held}"


def _written(slots: tuple[tuple[int, ...], ...], slot: int, part: int, layer: int) -> tuple[tuple[int, ...], ...]:
    return _with(slots, slot, _with(slots[slot], part, layer))


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])

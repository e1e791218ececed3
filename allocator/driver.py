"""The driver calls that all else is written against.

Two drivers implement this Protocol: ``CudaDriver`` (a GPU) and ``HostDriver`` (real pages and descriptors, no GPU).
Both obey the same rules and refuse the same mistakes; ``tests/unit/allocator/test_driver_conformance.py`` states
those rules and runs unchanged on both. Every method raises :class:`~vmm_dwdp.errors.DriverError` on refusal.

Addresses, handles, streams and events are plain integers: two handles compare as integers compare, and an integer can
be printed. Who must release what is said by the pairs of calls; :mod:`vmm_dwdp.allocator.handles` wraps each pair in an
object that owns it.

[Note: The rules of virtual memory]
  * A handle is mapped whole, at offset 0 of the handle; its size is a multiple of the granularity.
  * A mapping is removed whole, and access is set on whole mappings.
  * Mappings do not overlap, and an address range is freed exactly as it was reserved, once nothing is mapped in it.
  * A handle may be released while it is mapped: the mapping keeps the memory.
  * Memory mapped ``Access.READ`` refuses to be written.
  * Nothing may use a range while it is unmapped: synchronise first.

[Note: Which device is current]
Calls are made while the driver's device is current in the calling thread, as `Driver.is_current` tells and
`Driver.current` sees to. Which other device is current at other times is the caller's business: it is not changed for
good, except in threads of our own. A driver is of no use in a child of fork.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NewType, Protocol

import torch

Address = NewType("Address", int)  # of a byte, as the device and this process see it
HandleId = NewType("HandleId", int)  # of physical memory
StreamId = NewType("StreamId", int)
EventId = NewType("EventId", int)


class Access(enum.Enum):
    """What this process may do with mapped memory."""

    READ = "read"
    READ_WRITE = "read-write"


FABRIC_NBYTES: Final = 64  # of a fabric handle


class HandleType(enum.Enum):
    """How physical memory can be handed to another process."""

    POSIX_FD = "posix-fd"  # a file descriptor: processes of one machine
    FABRIC = "fabric"  # `FABRIC_NBYTES` bytes that may travel anywhere in an NVLink domain


@dataclass(frozen=True)
class Location:
    """Where physical memory lives: on this driver's device, or on a NUMA node of the host."""

    numa_node: int | None = None

    def __str__(self) -> str:
        return "device" if self.numa_node is None else f"NUMA node {self.numa_node}"


DEVICE = Location()


class Copy(NamedTuple):
    """``nbytes`` bytes from address ``src`` to address ``dst``; the two do not overlap."""

    dst: Address
    src: Address
    nbytes: int


class Lane(NamedTuple):
    """What one stream is given: it waits for the event ``after``, copies, and records ``then``."""

    stream: StreamId
    after: EventId
    copies: Any  # as `Driver.prepare` made them
    then: EventId
    owner: int | None = None  # the rank of whose memory it copies ``runs``, if the next run is chosen among the lanes
    runs: tuple[Any, ...] = ()  # the same copies, in parts, as `Driver.prepare` made them


class LinesAt(NamedTuple):
    """Where in this process the lines are by which runs are chosen; see `vmm_dwdp.memory.lines`."""

    first: int  # address
    nbytes: int  # from one line to the next
    num_ranks: int
    rank: int  # whose own line this process writes


class Ticket(Protocol):
    """What was submitted, to be given to the driver by whoever gives it.

    Attributes:
        done: whether the driver has been given everything: then `result` has nothing to wait for and nothing to raise.
        whole: whether its lanes are given one after another from now on, though they have runs to choose from: so
            giving them waits for nothing.
    """

    whole: bool

    @property
    def done(self) -> bool: ...

    def result(self) -> None:
        """Wait until the driver has been given everything, and raise what it refused, until it is submitted again.

        Before the first `submit` there is nothing to wait for.
        """


class Choosing(Protocol):
    """How runs are chosen by whoever gives them.

    Attributes:
        whole: whether nothing is chosen of what is submitted, though there are runs.
        seconds_per_byte: of a run that had the link to itself; 0 where that is not known.
    """

    whole: bool

    @property
    def seconds_per_byte(self) -> float: ...


class IssuingThread(Protocol):
    """A thread that calls the driver and never takes the interpreter's lock.

    Attributes:
        native_id: its number in the kernel.
        choosing: of runs.
    """

    choosing: Choosing

    @property
    def native_id(self) -> int: ...

    def job(self, lanes: Sequence[Lane]) -> Ticket:
        """Lanes that `submit` gives to the driver, again and again; for this thread only."""

    def submit(self, job: Any) -> None:
        """Give the lanes of ``job`` to the driver, after all that was submitted before. It is not under way already."""

    def flush(self) -> None:
        """Wait until the driver was given all that was submitted so far, or refused it; raises nothing."""

    def close(self) -> None:
        """Finish what was submitted, and end the thread. A second call does nothing."""


class NativeCalls(NamedTuple):
    """Where in this process the calls are that every layer of every pass makes, for C that needs no interpreter: 0 is
    success."""

    get_current: int  # (context *) -> result: the calling thread's context
    context: int  # of the device: it is current where `get_current` tells this one
    is_capturing: int  # (stream, int *status) -> result; the status is 0 where it is not
    wait: int  # (stream, event, flags) -> result
    record: int  # (event, stream, flags) -> result
    current_stream: Callable[[int], StreamId]  # of a device by its index
    failure: Callable[[str, int], Exception]  # of a call's name and its result


class Driver(Protocol):
    """One device of one process."""

    name: str  # "cuda" or "host"
    device: torch.device
    index: int  # of the device among those that this process sees
    current_device: Callable[[], int]  # the index of the calling thread's current device
    max_mappings: int  # that a process can have at one time
    numa_node: int  # the host's, nearest to the device
    native_calls: NativeCalls | None  # ``None``: only Python can call it

    # -- this thread -------------------------------------------------------------------------------------------------
    def current(self) -> AbstractContextManager[None]:
        """This device is current in the calling thread while the body runs, and then again what was before.

        To be used once; bodies may be nested. A thread of our own may enter it and never leave.
        """

    def ignore_captures(self) -> None:
        """From now on no call of the calling thread, one of our own, ends what another thread captures into a graph."""

    def is_current(self) -> bool:
        """Whether calls may be made as things stand.

        A thread without any context gets this device's for good, if this device is the current one anyway. Where this
        was so once, it is so again whenever `current_device` tells ``index``, which is cheaper to ask.
        """

    # -- physical memory ---------------------------------------------------------------------------------------------
    def granularity(self, location: Location = DEVICE) -> int:
        """Bytes per page: sizes and addresses of mappings are multiples of it."""

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> HandleId:
        """Take ``nbytes`` of physical memory, undefined at first, exportable as ``handle_type``. Undo: `release`."""

    def release(self, handle: HandleId) -> None:
        """Give the handle back. Memory that is still mapped stays until it is unmapped."""

    def export(self, handle: HandleId, handle_type: HandleType) -> int | bytes:
        """The handle as a file descriptor (the caller owns and closes it) or as bytes."""

    def import_(self, shared: int | bytes, handle_type: HandleType, nbytes: int) -> HandleId:
        """A handle to another process's ``nbytes``; the caller still owns a descriptor. Undo with `release`."""

    # -- addresses ---------------------------------------------------------------------------------------------------
    def reserve(self, nbytes: int) -> Address:
        """The first address of a free range of ``nbytes``, aligned to the granularity; undo with `free`."""

    def free(self, address: Address, nbytes: int) -> None:
        """Give back exactly what `reserve` returned."""

    def map(self, address: Address, nbytes: int, handle: HandleId) -> None:
        """Put the whole handle, of ``nbytes``, at ``address``. No access until `set_access`; undo with `unmap`."""

    def unmap(self, address: Address, nbytes: int) -> None:
        """Remove the mappings that make up exactly this range."""

    def set_access(self, address: Address, nbytes: int, access: Access) -> None:
        """Allow this device to read, or to read and write, the mappings that make up exactly this range."""

    def allow_cpu(self, address: Address, nbytes: int, location: Location) -> None:
        """Allow the CPU, too, to read and write the mappings of ``location``'s host memory that make up this range."""

    # -- memory without the above, for `assembly: tensor_list` ---------------------------------------------------------
    def allocate(self, nbytes: int) -> Address:
        """Ordinary device memory; its first address. Undo with `deallocate`."""

    def deallocate(self, address: Address) -> None:
        """Give back what `allocate` returned."""

    def export_allocation(self, address: Address) -> bytes:
        """A token by which another process of this machine can open what `allocate` returned."""

    def open_allocation(self, token: bytes, nbytes: int) -> Address:
        """The address here of another process's allocation of ``nbytes``. Undo with `close_allocation`."""

    def close_allocation(self, address: Address) -> None:
        """Undo `open_allocation`."""

    # -- streams, events, copies -------------------------------------------------------------------------------------
    def current_stream(self) -> StreamId:
        """The stream on which the calling thread's kernels run now."""

    def create_stream(self) -> StreamId:
        """A stream for copies: not ordered with the default stream, of the highest priority. Undo: `destroy_stream`."""

    def owns(self, stream: StreamId) -> bool:
        """Whether a stream that somebody names, whoever created it, is of this device."""

    def destroy_stream(self, stream: StreamId) -> None:
        """Undo `create_stream`; the caller has synchronised it."""

    def create_event(self, timed: bool) -> EventId:
        """An event, which counts as complete until it is recorded. Only one that is ``timed`` has a time for `elapsed`,
        and it costs more to record. Undo with `destroy_event`."""

    def destroy_event(self, event: EventId) -> None:
        """Undo `create_event`."""

    def record(self, event: EventId, stream: StreamId, *, external: bool = False) -> None:
        """``event`` is complete once all work given to ``stream`` so far is; for ``external`` see `capture`."""

    def wait(self, stream: StreamId, event: EventId, *, external: bool = False) -> None:
        """Work given to ``stream`` from now on starts after the latest `record` of ``event``, made before this call.

        For ``external`` see `capture`.
        """

    def complete(self, event: EventId) -> bool:
        """Whether the latest record of ``event`` is complete."""

    def elapsed(self, start: EventId, end: EventId) -> float:
        """Seconds from one complete timed event to another; negative if ``end`` came first."""

    def prepare(self, copies: Sequence[Copy]) -> Any:
        """Whatever `copy` wants to have ready: made once, used many times, owned by the garbage collector."""

    def copy(self, prepared: Any, stream: StreamId) -> None:
        """Give the prepared copies to ``stream``. They may run in any order among themselves.

        While ``stream`` is captured, each becomes a node of the graph.
        """

    def issuing_thread(self, lines: LinesAt | None = None) -> IssuingThread | None:
        """A new one, or ``None`` where there is none: then a thread of Python's has to do.

        ``lines``: those by which it chooses runs; a job that has some waits for the event ``after`` of its lanes, which
        is one and the same, before the driver is given the first.
        """

    def capture(self, stream: StreamId) -> int:
        """Which capture into a graph ``stream`` takes part in, a number that no other capture has; 0 if none.

        A stream takes part from its first `wait` for an event that was recorded in the capture; such events are edges
        of the graph. To record an event, or wait for it, whenever the graph runs, together with work outside of it, say
        ``external``. Raises `DriverError` for the default stream while another one is captured: it can take no part.
        """

    def capturing(self) -> bool:
        """Whether the stream that `current_stream` tells takes part in a capture; cheaper than `capture`."""

    def synchronize(self, stream: StreamId | None = None) -> None:
        """Wait until all work of ``stream``, or of the whole device, is complete."""

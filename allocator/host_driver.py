"""The driver without a GPU: real pages, real descriptors, real threads, and the rules of the CUDA driver.

Physical memory is a memory file, mapping it is mmap(MAP_FIXED), access is mprotect, and a stream is a thread that works
off a queue. What the kernel would allow and the CUDA driver refuses, such as mapping half a handle, is refused here
too, from tables, with CUDA's own code: a program that is correct here makes no call there that is not allowed.

Kernels of this device run in the calling thread. So stream 0, on which they run, is the calling thread itself: work
given to it is complete when the call returns.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from vmm_dwdp.allocator import host_fabric, host_pages
from vmm_dwdp.allocator.driver import (
    DEVICE,
    Access,
    Address,
    Copy,
    EventId,
    HandleId,
    HandleType,
    IssuingThread,
    LinesAt,
    Location,
    NativeCalls,
    StreamId,
)
from vmm_dwdp.allocator.host_context import HostContext, current_device
from vmm_dwdp.allocator.host_ranges import Range, Ranges
from vmm_dwdp.allocator.host_stream import CallingThread, HostStream, Record
from vmm_dwdp.allocator.numa import numa_nodes
from vmm_dwdp.errors import ConfigError, DriverError

ILLEGAL_ADDRESS: Final = "CUDA_ERROR_ILLEGAL_ADDRESS"
INVALID_HANDLE: Final = "CUDA_ERROR_INVALID_HANDLE"
INVALID_VALUE: Final = "CUDA_ERROR_INVALID_VALUE"
NOT_READY: Final = "CUDA_ERROR_NOT_READY"
NOT_SUPPORTED: Final = "CUDA_ERROR_NOT_SUPPORTED"

_COMPUTE_STREAM: Final = StreamId(0)


class _Memory(NamedTuple):
    fd: int
    nbytes: int
    handle_type: HandleType | None


class HostDriver:
    """See `vmm_dwdp.allocator.driver.Driver`. Any thread may use it.

    ``granularity`` is in bytes: a power of two, at least the page size of the machine (4 KiB on x86). Its default is
    that of NVIDIA GPUs. ``index`` tells devices apart where a program is to believe that there are several: what needs
    a current device refuses another one, as with CUDA. The memory of all of them is the CPU's.
    """

    name = "host"
    device = torch.device("cpu")
    numa_node = 0
    native_calls: NativeCalls | None = None

    def __init__(self, granularity: int = 2 << 20, index: int = 0) -> None:
        if granularity < host_pages.PAGE_BYTES or granularity & (granularity - 1):
            raise ConfigError(
                f"the granularity of the host driver must be a power of two of at least {host_pages.PAGE_BYTES} bytes, "
                f"not {granularity}"
            )
        self.max_mappings = host_pages.max_mappings()
        self._granularity = granularity
        self._lock = threading.Lock()  # of the two tables of ranges
        self._numbers = itertools.count(1)  # handles, streams and events
        self._handles: dict[int, _Memory] = {}
        self._reservations = Ranges()
        self._mappings = Ranges()
        self._allocations: dict[int, _Memory] = {}
        self._opened: dict[int, int] = {}  # address -> bytes
        self._streams: dict[int, HostStream] = {}
        self._events: dict[int, Record | None] = {}  # the latest record
        self._timed: set[int] = set()  # events
        self.index = index
        self._context = HostContext(index)
        self.current_device = current_device
        self.is_current = self._context.is_current
        self.is_current()

    # -- this thread -------------------------------------------------------------------------------------------------
    def current(self) -> HostContext:
        return self._context

    def ignore_captures(self) -> None:
        pass  # the host has no graphs

    # -- physical memory ---------------------------------------------------------------------------------------------
    def granularity(self, location: Location = DEVICE) -> int:
        if location.numa_node is not None and location.numa_node not in numa_nodes():
            raise _invalid("granularity", f"use memory on {location}, which this machine does not have")
        return self._granularity

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> HandleId:
        if nbytes <= 0 or nbytes % self.granularity(location):
            attempt = f"create {nbytes} bytes on {location}, no multiple of {self._granularity}"
            raise _invalid("create", attempt)
        create_file = host_fabric.create_file if handle_type is HandleType.FABRIC else host_pages.create_file
        return self._add_handle(_Memory(create_file(nbytes), nbytes, handle_type))

    def release(self, handle: HandleId) -> None:
        memory = self._memory("release", handle)
        del self._handles[handle]
        os.close(memory.fd)

    def export(self, handle: HandleId, handle_type: HandleType) -> int | bytes:
        memory = self._memory("export", handle)
        if memory.handle_type is not handle_type:
            raise _invalid("export", f"export handle {handle}, which was not created as {handle_type}")
        if handle_type is HandleType.FABRIC:
            return host_fabric.name_of(memory.fd)
        return host_pages.duplicate(memory.fd)

    def import_(self, shared: int | bytes, handle_type: HandleType, nbytes: int) -> HandleId:
        if isinstance(shared, int) is (handle_type is HandleType.FABRIC):
            raise _invalid("import", f"import what is no {handle_type.value} as one")
        fd = host_pages.duplicate(shared) if isinstance(shared, int) else host_fabric.open_file(shared)
        if host_pages.sealed_size(fd) != nbytes:
            os.close(fd)
            raise _invalid("import", f"import a {handle_type.value}, which is no memory of {nbytes} bytes")
        return self._add_handle(_Memory(fd, nbytes, handle_type))

    def _add_handle(self, memory: _Memory) -> HandleId:
        handle = HandleId(next(self._numbers))
        self._handles[handle] = memory
        return handle

    def _memory(self, call: str, handle: int) -> _Memory:
        memory = self._handles.get(handle)
        if memory is None:
            raise _invalid(call, f"{call} {handle}, which is no handle")
        return memory

    # -- addresses ---------------------------------------------------------------------------------------------------
    def reserve(self, nbytes: int) -> Address:
        if nbytes <= 0 or nbytes % self._granularity:
            raise _invalid("reserve", f"reserve {nbytes} bytes, no multiple of {self._granularity}")
        address = Address(host_pages.reserve(nbytes, self._granularity))
        with self._lock:
            self._reservations.add(Range(address, nbytes))
        return address

    def free(self, address: Address, nbytes: int) -> None:
        attempt = f"free {nbytes} bytes at {address:#x}"
        with self._lock:
            reserved = self._reservations.exactly(address, nbytes)
            if len(reserved) != 1:
                raise _invalid("free", f"{attempt}, which were not reserved as such")
            if self._mappings.touching(address, nbytes):
                raise _invalid("free", f"{attempt}, where memory is still mapped")
            host_pages.remove(address, nbytes)
            self._reservations.remove(reserved)

    def map(self, address: Address, nbytes: int, handle: HandleId) -> None:
        attempt = f"map {nbytes} bytes of handle {handle} at {address:#x}"
        memory = self._memory("map", handle)
        if nbytes != memory.nbytes:
            raise DriverError("map", NOT_SUPPORTED, f"{attempt}, which has {memory.nbytes}")
        if address % self._granularity:
            raise _invalid("map", f"{attempt}, no multiple of {self._granularity}")
        with self._lock:
            if len(self._reservations.covering(address, nbytes)) != 1:
                raise _invalid("map", f"{attempt}, which is not reserved")
            if self._mappings.touching(address, nbytes):
                raise _invalid("map", f"{attempt}, where memory is mapped already")
            host_pages.place(address, nbytes, memory.fd)
            self._mappings.add(Range(address, nbytes))

    def unmap(self, address: Address, nbytes: int) -> None:
        with self._lock:
            mappings = self._mappings_of("unmap", address, nbytes)
            host_pages.displace(address, nbytes)
            self._mappings.remove(mappings)
            for mapping in mappings:
                mapping.access = None

    def set_access(self, address: Address, nbytes: int, access: Access) -> None:
        with self._lock:
            mappings = self._mappings_of("set_access", address, nbytes)
            host_pages.protect(address, nbytes, writable=access is Access.READ_WRITE)
            for mapping in mappings:
                mapping.access = access

    def allow_cpu(self, address: Address, nbytes: int, location: Location) -> None:
        with self._lock:
            self._mappings_of("allow_cpu", address, nbytes)  # the device is the CPU

    def _mappings_of(self, call: str, address: int, nbytes: int) -> list[Range]:
        mappings = self._mappings.exactly(address, nbytes)
        if not mappings:
            attempt = f"{call} {nbytes} bytes at {address:#x}, which are not made up of whole mappings"
            raise _invalid(call, attempt)
        return mappings

    # -- memory without the above --------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> Address:
        self._context.require_current("allocate")
        if nbytes <= 0:
            raise _invalid("allocate", f"allocate {nbytes} bytes")
        fd = host_pages.create_file(nbytes)
        try:
            address = Address(host_pages.map_anywhere(nbytes, fd))
        except DriverError:
            os.close(fd)
            raise
        self._allocations[address] = _Memory(fd, nbytes, HandleType.POSIX_FD)
        return address

    def deallocate(self, address: Address) -> None:
        memory = self._allocation("deallocate", address)
        host_pages.remove(address, memory.nbytes)
        del self._allocations[address]
        os.close(memory.fd)

    def export_allocation(self, address: Address) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._allocation('export_allocation', address).fd}".encode()

    def open_allocation(self, token: bytes, nbytes: int) -> Address:
        self._context.require_current("open_allocation")
        if re.fullmatch(rb"/proc/\d+/fd/\d+", token) is None:
            raise _invalid("open_allocation", f"open {token!r}, which names no allocation")
        fd = host_pages.open_file(token.decode())
        try:
            if host_pages.sealed_size(fd) != nbytes:
                raise _invalid("open_allocation", f"open {token!r}, which has not {nbytes} bytes")
            address = Address(host_pages.map_anywhere(nbytes, fd))
        finally:
            os.close(fd)
        self._opened[address] = nbytes
        return address

    def close_allocation(self, address: Address) -> None:
        if address not in self._opened:
            raise _invalid("close_allocation", f"close {address:#x}, which was not opened")
        host_pages.remove(address, self._opened[address])
        del self._opened[address]

    def _allocation(self, call: str, address: int) -> _Memory:
        memory = self._allocations.get(address)
        if memory is None:
            raise _invalid(call, f"use {address:#x}, which was not allocated")
        return memory

    # -- streams, events, copies -------------------------------------------------------------------------------------
    def current_stream(self) -> StreamId:
        return _COMPUTE_STREAM

    def create_stream(self) -> StreamId:
        self._context.require_current("create_stream")
        stream = StreamId(next(self._numbers))
        self._streams[stream] = HostStream(f"vmm-dwdp stream {stream}")
        return stream

    def owns(self, stream: StreamId) -> bool:
        return stream == _COMPUTE_STREAM or stream in self._streams

    def destroy_stream(self, stream: StreamId) -> None:
        self._stream("destroy_stream", stream).close()
        del self._streams[stream]

    def create_event(self, timed: bool) -> EventId:
        self._context.require_current("create_event")
        event = EventId(next(self._numbers))
        self._events[event] = None
        if timed:
            self._timed.add(event)
        return event

    def destroy_event(self, event: EventId) -> None:
        self._record("destroy_event", event)
        del self._events[event]
        self._timed.discard(event)

    def record(self, event: EventId, stream: StreamId, *, external: bool = False) -> None:
        self._record("record", event)
        record = Record()
        self._stream("record", stream).record(record)
        self._events[event] = record

    def wait(self, stream: StreamId, event: EventId, *, external: bool = False) -> None:
        record = self._record("wait", event)
        queue = self._stream("wait", stream)
        if record is not None:
            queue.submit(record.wait)

    def complete(self, event: EventId) -> bool:
        record = self._record("complete", event)
        return record is None or record.is_complete()

    def elapsed(self, start: EventId, end: EventId) -> float:
        first, last = self._record("elapsed", start), self._record("elapsed", end)
        if first is None or last is None or not {start, end} <= self._timed:
            raise DriverError("elapsed", INVALID_HANDLE, "take the time between events that are not timed and recorded")
        if not (first.is_complete() and last.is_complete()):
            raise DriverError("elapsed", NOT_READY, "take the time between events that are not complete")
        return last.time - first.time

    def prepare(self, copies: Sequence[Copy]) -> Sequence[Copy]:
        return tuple(copies)

    def copy(self, prepared: Sequence[Copy], stream: StreamId) -> None:
        self._context.require_current("copy")
        uses = self._uses(prepared)
        self._stream("copy", stream).submit(functools.partial(_copy, prepared, uses))

    def issuing_thread(self, lines: LinesAt | None = None) -> IssuingThread | None:
        return None

    def capture(self, stream: StreamId) -> int:
        self._stream("capture", stream)
        return 0  # the host has no graphs

    def capturing(self) -> bool:
        self._context.require_current("capturing")
        return False

    def synchronize(self, stream: StreamId | None = None) -> None:
        if stream is None:
            self._context.require_current("synchronize")
            for each in list(self._streams.values()):
                each.synchronize()
        else:
            self._stream("synchronize", stream).synchronize()

    def _uses(self, copies: Sequence[Copy]) -> list[tuple[Range, Access]]:
        """The mappings that the copies use and the access that they need, which all of them allow."""
        uses: list[tuple[Range, Access]] = []
        with self._lock:
            for dst, src, nbytes in copies:
                for address, wanted in ((src, Access.READ), (dst, Access.READ_WRITE)):
                    if not self._reservations.touching(address, nbytes):
                        continue  # not ours: torch's memory, for example
                    mappings = self._mappings.covering(address, nbytes)
                    if not mappings or not all(mapping.allows(wanted) for mapping in mappings):
                        raise _invalid("copy", f"use {nbytes} bytes at {address:#x}, not mapped as {wanted.value}")
                    uses += [(mapping, wanted) for mapping in mappings]
        return uses

    def _stream(self, call: str, stream: int) -> HostStream | CallingThread:
        if stream == _COMPUTE_STREAM:
            self._context.require_current(call)  # whose default stream it is
            return CallingThread()
        self._context.require_same_process(call)
        if stream not in self._streams:
            raise DriverError(call, INVALID_HANDLE, f"use {stream}, which is no stream")
        return self._streams[stream]

    def _record(self, call: str, event: int) -> Record | None:
        self._context.require_same_process(call)
        if event not in self._events:
            raise DriverError(call, INVALID_HANDLE, f"use {event}, which is no event")
        return self._events[event]


def _copy(copies: Sequence[Copy], uses: Sequence[tuple[Range, Access]]) -> None:
    if not all(mapping.allows(wanted) for mapping, wanted in uses):
        raise DriverError("copy", ILLEGAL_ADDRESS, "run copies whose memory was unmapped before their turn came")
    for copy in copies:
        ctypes.memmove(*copy)


def _invalid(call: str, attempt: str) -> DriverError:
    return DriverError(call, INVALID_VALUE, attempt)

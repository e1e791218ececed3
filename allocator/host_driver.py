"""The driver without a GPU: real pages, real descriptors, real threads, and the rules of the CUDA driver.

Physical memory is a memory file, mapping it is mmap(MAP_FIXED), access is mprotect, and a stream is a thread that works
off a queue. What the kernel would allow and the CUDA driver refuses, such as mapping half a handle, is refused here
too, from tables, with CUDA's own code: a program that is correct here makes no call there that is not allowed.

Kernels of this device run in the calling thread. So stream 0, on which they run, is the calling thread itself: work
given to it is complete when the call returns.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import operator
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from vmm_dwdp.allocator import host_pages
from vmm_dwdp.allocator.driver import DEVICE, Access, Copy, HandleType, IssuingThread, Location
from vmm_dwdp.allocator.host_stream import HostStream, Record
from vmm_dwdp.allocator.numa import numa_nodes
from vmm_dwdp.errors import ConfigError, DriverError

ILLEGAL_ADDRESS: Final = "CUDA_ERROR_ILLEGAL_ADDRESS"
INVALID_HANDLE: Final = "CUDA_ERROR_INVALID_HANDLE"
INVALID_VALUE: Final = "CUDA_ERROR_INVALID_VALUE"
NOT_READY: Final = "CUDA_ERROR_NOT_READY"
NOT_SUPPORTED: Final = "CUDA_ERROR_NOT_SUPPORTED"

_COMPUTE_STREAM: Final = 0


class _Memory(NamedTuple):
    fd: int
    nbytes: int
    handle_type: HandleType | None


@dataclass
class _Range:
    start: int
    nbytes: int
    access: Access | None = None  # of a mapping, until it is unmapped

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def allows(self, wanted: Access) -> bool:
        return self.access in (wanted, Access.READ_WRITE)


class _Ranges:
    """Address ranges that do not overlap, in order."""

    def __init__(self) -> None:
        self._ranges: list[_Range] = []

    def add(self, new: _Range) -> None:
        bisect.insort(self._ranges, new, key=_start)

    def remove(self, old: list[_Range]) -> None:
        """Forget ranges that follow one another."""
        first = bisect.bisect_left(self._ranges, old[0].start, key=_start)
        del self._ranges[first : first + len(old)]

    def touching(self, start: int, nbytes: int) -> list[_Range]:
        """The ranges that have a byte in ``[start, start + nbytes)``."""
        first = bisect.bisect_right(self._ranges, start, key=_end)
        last = bisect.bisect_left(self._ranges, start + nbytes, key=_start)
        return self._ranges[first:last]

    def covering(self, start: int, nbytes: int) -> list[_Range]:
        """The same, if they leave no gap in it; otherwise none."""
        ranges = self.touching(start, nbytes)
        whole = ranges and ranges[0].start <= start and start + nbytes <= ranges[-1].end
        if whole and sum(r.nbytes for r in ranges) == ranges[-1].end - ranges[0].start:
            return ranges
        return []

    def exactly(self, start: int, nbytes: int) -> list[_Range]:
        """The same, if they end where it ends on both sides; otherwise none."""
        ranges = self.covering(start, nbytes)
        return ranges if ranges and (ranges[0].start, ranges[-1].end) == (start, start + nbytes) else []


_start: Final = operator.attrgetter("start")
_end: Final = operator.attrgetter("end")


class HostDriver:
    """See `vmm_dwdp.allocator.driver.Driver`. Any thread may use it.

    ``granularity`` is in bytes: a power of two, at least the page size of the machine (4 KiB on x86). Its default is
    that of NVIDIA GPUs.
    """

    name = "host"
    device = torch.device("cpu")
    numa_node = 0

    def __init__(self, granularity: int = 2 << 20) -> None:
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
        self._reservations = _Ranges()
        self._mappings = _Ranges()
        self._allocations: dict[int, _Memory] = {}
        self._opened: dict[int, int] = {}  # address -> bytes
        self._streams: dict[int, HostStream] = {}
        self._events: dict[int, Record | None] = {}  # the latest record
        self._timed: set[int] = set()  # events
        self._thread = threading.local()
        self.activate()

    # -- this thread -------------------------------------------------------------------------------------------------
    def activate(self) -> None:
        self._thread.active = True

    def is_current(self) -> bool:
        return getattr(self._thread, "active", False)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.activate()
        yield

    # -- physical memory ---------------------------------------------------------------------------------------------
    def granularity(self, location: Location = DEVICE) -> int:
        if location.numa_node is not None and location.numa_node not in numa_nodes():
            raise _invalid("granularity", f"use memory on {location}, which this machine does not have")
        return self._granularity

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> int:
        attempt = f"create {nbytes} bytes on {location}"
        if nbytes <= 0 or nbytes % self.granularity(location):
            raise _invalid("create", f"{attempt}, no multiple of {self._granularity}")
        if handle_type is HandleType.FABRIC:
            raise DriverError("create", NOT_SUPPORTED, f"{attempt} for fabric handles, which the host does not have")
        return self._add_handle(_Memory(host_pages.create_file(nbytes), nbytes, handle_type))

    def release(self, handle: int) -> None:
        memory = self._memory("release", handle)
        del self._handles[handle]
        os.close(memory.fd)

    def export(self, handle: int, handle_type: HandleType) -> int | bytes:
        memory = self._memory("export", handle)
        if memory.handle_type is not handle_type:
            raise _invalid("export", f"export handle {handle}, which was not created as {handle_type}")
        return host_pages.duplicate(memory.fd)

    def import_(self, shared: int | bytes, handle_type: HandleType, nbytes: int) -> int:
        if not isinstance(shared, int):
            raise DriverError("import", NOT_SUPPORTED, "import a fabric handle, which the host does not have")
        if host_pages.sealed_size(shared) != nbytes:
            raise _invalid("import", f"import descriptor {shared}, which is no memory of {nbytes} bytes")
        return self._add_handle(_Memory(host_pages.duplicate(shared), nbytes, handle_type))

    def _add_handle(self, memory: _Memory) -> int:
        handle = next(self._numbers)
        self._handles[handle] = memory
        return handle

    def _memory(self, call: str, handle: int) -> _Memory:
        memory = self._handles.get(handle)
        if memory is None:
            raise _invalid(call, f"{call} {handle}, which is no handle")
        return memory

    # -- addresses ---------------------------------------------------------------------------------------------------
    def reserve(self, nbytes: int) -> int:
        if nbytes <= 0 or nbytes % self._granularity:
            raise _invalid("reserve", f"reserve {nbytes} bytes, no multiple of {self._granularity}")
        address = host_pages.reserve(nbytes, self._granularity)
        with self._lock:
            self._reservations.add(_Range(address, nbytes))
        return address

    def free(self, address: int, nbytes: int) -> None:
        attempt = f"free {nbytes} bytes at {address:#x}"
        with self._lock:
            reserved = self._reservations.exactly(address, nbytes)
            if len(reserved) != 1:
                raise _invalid("free", f"{attempt}, which were not reserved as such")
            if self._mappings.touching(address, nbytes):
                raise _invalid("free", f"{attempt}, where memory is still mapped")
            host_pages.remove(address, nbytes)
            self._reservations.remove(reserved)

    def map(self, address: int, nbytes: int, handle: int) -> None:
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
            self._mappings.add(_Range(address, nbytes))

    def unmap(self, address: int, nbytes: int) -> None:
        with self._lock:
            mappings = self._mappings_of("unmap", address, nbytes)
            host_pages.displace(address, nbytes)
            self._mappings.remove(mappings)
            for mapping in mappings:
                mapping.access = None

    def set_access(self, address: int, nbytes: int, access: Access) -> None:
        with self._lock:
            mappings = self._mappings_of("set_access", address, nbytes)
            host_pages.protect(address, nbytes, writable=access is Access.READ_WRITE)
            for mapping in mappings:
                mapping.access = access

    def allow_cpu(self, address: int, nbytes: int, location: Location) -> None:
        with self._lock:
            self._mappings_of("allow_cpu", address, nbytes)  # the device is the CPU

    def _mappings_of(self, call: str, address: int, nbytes: int) -> list[_Range]:
        mappings = self._mappings.exactly(address, nbytes)
        if not mappings:
            attempt = f"{call} {nbytes} bytes at {address:#x}, which are not made up of whole mappings"
            raise _invalid(call, attempt)
        return mappings

    # -- memory without the above --------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> int:
        if nbytes <= 0:
            raise _invalid("allocate", f"allocate {nbytes} bytes")
        fd = host_pages.create_file(nbytes)
        try:
            address = host_pages.map_anywhere(nbytes, fd)
        except DriverError:
            os.close(fd)
            raise
        self._allocations[address] = _Memory(fd, nbytes, HandleType.POSIX_FD)
        return address

    def deallocate(self, address: int) -> None:
        memory = self._allocation("deallocate", address)
        host_pages.remove(address, memory.nbytes)
        del self._allocations[address]
        os.close(memory.fd)

    def export_allocation(self, address: int) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._allocation('export_allocation', address).fd}".encode()

    def open_allocation(self, token: bytes, nbytes: int) -> int:
        if re.fullmatch(rb"/proc/\d+/fd/\d+", token) is None:
            raise _invalid("open_allocation", f"open {token!r}, which names no allocation")
        fd = host_pages.open_file(token.decode())
        try:
            if host_pages.sealed_size(fd) != nbytes:
                raise _invalid("open_allocation", f"open {token!r}, which has not {nbytes} bytes")
            address = host_pages.map_anywhere(nbytes, fd)
        finally:
            os.close(fd)
        self._opened[address] = nbytes
        return address

    def close_allocation(self, address: int) -> None:
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
    def current_stream(self) -> int:
        return _COMPUTE_STREAM

    def create_stream(self) -> int:
        stream = next(self._numbers)
        self._streams[stream] = HostStream(f"vmm-dwdp stream {stream}")
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._stream("destroy_stream", stream).close()
        del self._streams[stream]

    def create_event(self, timed: bool) -> int:
        event = next(self._numbers)
        self._events[event] = None
        if timed:
            self._timed.add(event)
        return event

    def destroy_event(self, event: int) -> None:
        self._record("destroy_event", event)
        del self._events[event]
        self._timed.discard(event)

    def record(self, event: int, stream: int, *, external: bool = False) -> None:
        self._record("record", event)
        record = Record()
        if stream == _COMPUTE_STREAM:
            record.complete()
        else:
            self._stream("record", stream).record(record)
        self._events[event] = record

    def wait(self, stream: int, event: int, *, external: bool = False) -> None:
        record = self._record("wait", event)
        if record is None:
            return
        if stream == _COMPUTE_STREAM:
            record.wait()
        else:
            self._stream("wait", stream).submit(record.wait)

    def complete(self, event: int) -> bool:
        record = self._record("complete", event)
        return record is None or record.is_complete()

    def elapsed(self, start: int, end: int) -> float:
        first, last = self._record("elapsed", start), self._record("elapsed", end)
        if first is None or last is None or not {start, end} <= self._timed:
            raise DriverError("elapsed", INVALID_HANDLE, "take the time between events that are not timed and recorded")
        if not (first.is_complete() and last.is_complete()):
            raise DriverError("elapsed", NOT_READY, "take the time between events that are not complete")
        return last.time - first.time

    def prepare(self, copies: Sequence[Copy]) -> Sequence[Copy]:
        return tuple(copies)

    def copy(self, prepared: Sequence[Copy], stream: int) -> None:
        if not getattr(self._thread, "active", False):
            raise _invalid("copy", "copy in a thread that has not activated the driver")
        uses = self._uses(prepared)
        if stream == _COMPUTE_STREAM:
            _copy_now(prepared)
        else:
            self._stream("copy", stream).submit(functools.partial(_copy_later, prepared, uses))

    def issuing_thread(self) -> IssuingThread | None:
        return None

    def capture(self, stream: int) -> int:
        return 0  # the host has no graphs

    def capturing(self) -> bool:
        return False

    def synchronize(self, stream: int | None = None) -> None:
        if stream is None:
            for each in list(self._streams.values()):
                each.synchronize()
        elif stream != _COMPUTE_STREAM:
            self._stream("synchronize", stream).synchronize()

    def _uses(self, copies: Sequence[Copy]) -> list[tuple[_Range, Access]]:
        """The mappings that the copies use and the access that they need, which all of them allow."""
        uses: list[tuple[_Range, Access]] = []
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

    def _stream(self, call: str, stream: int) -> HostStream:
        if stream not in self._streams:
            raise DriverError(call, INVALID_HANDLE, f"use {stream}, which is no stream")
        return self._streams[stream]

    def _record(self, call: str, event: int) -> Record | None:
        if event not in self._events:
            raise DriverError(call, INVALID_HANDLE, f"use {event}, which is no event")
        return self._events[event]


def _copy_now(copies: Sequence[Copy]) -> None:
    for copy in copies:
        ctypes.memmove(*copy)


def _copy_later(copies: Sequence[Copy], uses: Sequence[tuple[_Range, Access]]) -> None:
    if not all(mapping.allows(wanted) for mapping, wanted in uses):
        raise DriverError("copy", ILLEGAL_ADDRESS, "run copies whose memory was unmapped before their turn came")
    _copy_now(copies)


def _invalid(call: str, attempt: str) -> DriverError:
    return DriverError(call, INVALID_VALUE, attempt)

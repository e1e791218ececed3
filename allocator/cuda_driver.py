"""The driver of an NVIDIA GPU, over ``cuda.bindings.driver``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.cuda_batch import BatchCall, CopyBatch
from vmm_dwdp.allocator.cuda_check import check
from vmm_dwdp.allocator.cuda_context import PrimaryContext
from vmm_dwdp.allocator.cuda_events import EventCalls
from vmm_dwdp.allocator.cuda_issue import CudaIssuingThread
from vmm_dwdp.allocator.driver import (
    DEVICE,
    FABRIC_NBYTES,
    Access,
    Address,
    Copy,
    EventId,
    HandleId,
    HandleType,
    LinesAt,
    Location,
    NativeCalls,
    StreamId,
)
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.errors import DriverError

_HANDLE_TYPES: Final = {
    None: cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE,
    HandleType.POSIX_FD: cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    HandleType.FABRIC: cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC,
}
_ACCESS: Final = {
    Access.READ: cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ,
    Access.READ_WRITE: cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
}
_RECORD_EXTERNAL: Final = int(cuda.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
_WAIT_EXTERNAL: Final = int(cuda.CUevent_wait_flags.CU_EVENT_WAIT_EXTERNAL)
_NOT_CAPTURING: Final = cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
_SUCCESS: Final = cuda.CUresult.CUDA_SUCCESS
_NOT_READY: Final = cuda.CUresult.CUDA_ERROR_NOT_READY
_INVALID_VALUE: Final = cuda.CUresult.CUDA_ERROR_INVALID_VALUE.name
_DEFAULT_STREAM: Final = 0
# As where CUDA_VISIBLE_DEVICES is set for each rank
_SEES_NO_OTHER: Final = " (this process sees no other GPU: if it is another GPU's memory, let all ranks see all GPUs)"
# Copies. No kernel is launched while the driver takes a batch: 0.1 ms with 64, 4 ms with 4,000 (H100).
_BATCH: Final = 64


@dataclass(frozen=True)
class _Copies:
    """Copies as they are given to a stream: in batches, or one by one where there are none."""

    copies: tuple[Copy, ...]
    batches: tuple[CopyBatch, ...]


class CudaDriver:
    """See `vmm_dwdp.allocator.driver.Driver`. Any thread may use it.

    It works in the device's primary context, which is the one that torch uses, and keeps it for the life of the
    process. The constructor leaves the current device as it was; where that is this one, calls may be made at once.
    """

    name = "cuda"
    max_mappings = 130_000  # no call tells it; reported for CUDA by others, and not met in our own tests

    def __init__(self, device: torch.device) -> None:
        attempt = f"use {device}"
        try:
            check(attempt, cuda.cuInit, 0)
        except RuntimeError as error:  # there is no driver that could return an error
            raise DriverError("cuInit", type(error).__name__, f"{attempt}: there is no NVIDIA driver here") from error
        if not torch.cuda.is_available():
            raise DriverError("torch.cuda.is_available", "False", f"{attempt}: this torch {torch.__version__} cannot")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.index: int = self.device.index
        self._ordinal = check(attempt, cuda.cuDeviceGet, self.device.index)
        self._context = PrimaryContext(self.device.index, check(attempt, cuda.cuDevicePrimaryCtxRetain, self._ordinal))
        nearest = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
        self._sees = _SEES_NO_OTHER if torch.cuda.device_count() == 1 else ""
        self.numa_node = max(0, check(attempt, cuda.cuDeviceGetAttribute, nearest, self._ordinal))  # -1: no NUMA here
        self._batch_call = BatchCall.find()
        self._events = EventCalls.find()
        # Calls that every layer of every pass makes, without one of ours around them
        self.current = self._context.current
        self.is_current = self._context.is_current
        self.current_device = self._context.current_device
        raw: Callable[[int], StreamId] = torch._C._cuda_getCurrentRawStream  # type: ignore[assignment]
        self.current_stream: Callable[[], StreamId] = partial(raw, self.device.index)
        self.native_calls: NativeCalls | None = self._events.natively(self._context.address, raw)
        self.capturing = torch._C._cuda_isCurrentStreamCapturing  # of the current device: this one, as calls are made
        self.is_current()

    def ignore_captures(self) -> None:
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check("keep this thread out of captures", cuda.cuThreadExchangeStreamCaptureMode, mode)

    # -- physical memory ---------------------------------------------------------------------------------------------
    def granularity(self, location: Location = DEVICE) -> int:
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        attempt = f"find the granularity of memory on {location}"
        return int(check(attempt, cuda.cuMemGetAllocationGranularity, self._properties(location, None), minimum))

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> HandleId:
        attempt = f"create {nbytes} bytes on {location}"
        properties = self._properties(location, handle_type)
        return HandleId(int(_with_room(attempt, cuda.cuMemCreate, nbytes, properties, 0)))

    def release(self, handle: HandleId) -> None:
        check(f"release handle {handle:#x}", cuda.cuMemRelease, handle)

    def export(self, handle: HandleId, handle_type: HandleType) -> int | bytes:
        attempt = f"export handle {handle:#x} as {handle_type.value}"
        shared = check(attempt, cuda.cuMemExportToShareableHandle, handle, _HANDLE_TYPES[handle_type], 0)
        return int(shared) if handle_type is HandleType.POSIX_FD else bytes(shared.data)

    def import_(self, shared: int | bytes, handle_type: HandleType, nbytes: int) -> HandleId:
        attempt = f"import {nbytes} bytes as {handle_type.value}{self._sees}"
        fits = isinstance(shared, int) if handle_type is HandleType.POSIX_FD else _is_fabric_handle(shared)
        if not fits:  # or the driver would read whatever is there
            raise DriverError("cuMemImportFromShareableHandle", _INVALID_VALUE, f"{attempt}, which it is not")
        return HandleId(int(check(attempt, cuda.cuMemImportFromShareableHandle, shared, _HANDLE_TYPES[handle_type])))

    def _properties(self, location: Location, handle_type: HandleType | None) -> cuda.CUmemAllocationProp:
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = _HANDLE_TYPES[handle_type]
        if location.numa_node is None:
            properties.location = self._device_location()
        else:
            properties.location = _host_location(location.numa_node)
        return properties

    def _device_location(self) -> cuda.CUmemLocation:
        location = cuda.CUmemLocation()
        location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.device.index
        return location

    # -- addresses ---------------------------------------------------------------------------------------------------
    def reserve(self, nbytes: int) -> Address:
        return Address(int(check(f"reserve {nbytes} bytes of addresses", cuda.cuMemAddressReserve, nbytes, 0, 0, 0)))

    def free(self, address: Address, nbytes: int) -> None:
        check(f"free {nbytes} bytes at {address:#x}", cuda.cuMemAddressFree, address, nbytes)

    def map(self, address: Address, nbytes: int, handle: HandleId) -> None:
        attempt = f"map {nbytes} bytes of handle {handle:#x} at {address:#x}"
        check(attempt, cuda.cuMemMap, address, nbytes, 0, handle, 0)

    def unmap(self, address: Address, nbytes: int) -> None:
        check(f"unmap {nbytes} bytes at {address:#x}", cuda.cuMemUnmap, address, nbytes)

    def set_access(self, address: Address, nbytes: int, access: Access) -> None:
        attempt = f"make {nbytes} bytes at {address:#x} {access.value}{self._sees}"
        self._set_access(attempt, address, nbytes, access, self._device_location())

    def allow_cpu(self, address: Address, nbytes: int, location: Location) -> None:
        assert location.numa_node is not None, "only host memory has addresses for the CPU"
        attempt = f"let the CPU use {nbytes} bytes at {address:#x}"
        self._set_access(attempt, address, nbytes, Access.READ_WRITE, _host_location(location.numa_node))

    def _set_access(self, attempt: str, address: int, nbytes: int, access: Access, who: cuda.CUmemLocation) -> None:
        description = cuda.CUmemAccessDesc()
        description.location = who
        description.flags = _ACCESS[access]
        check(attempt, cuda.cuMemSetAccess, address, nbytes, [description], 1)

    # -- memory without the above --------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> Address:
        return Address(int(_with_room(f"allocate {nbytes} bytes", cuda.cuMemAlloc, nbytes)))

    def deallocate(self, address: Address) -> None:
        check(f"deallocate {address:#x}", cuda.cuMemFree, address)

    def export_allocation(self, address: Address) -> bytes:
        handle = check(f"export the allocation at {address:#x}", cuda.cuIpcGetMemHandle, address)
        return ctypes.string_at(handle.getPtr(), cuda.CU_IPC_HANDLE_SIZE)

    def open_allocation(self, token: bytes, nbytes: int) -> Address:
        attempt = f"open an allocation of {nbytes} bytes"
        if len(token) != cuda.CU_IPC_HANDLE_SIZE:
            raise DriverError("open_allocation", _INVALID_VALUE, f"{attempt} by a token of {len(token)} bytes")
        handle = cuda.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), token, len(token))
        lazily = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        address = Address(int(check(attempt, cuda.cuIpcOpenMemHandle, handle, lazily)))
        _, size = check(attempt, cuda.cuMemGetAddressRange, address)
        if size != nbytes:
            self.close_allocation(address)
            raise DriverError("open_allocation", _INVALID_VALUE, f"{attempt}, which has {size}")
        return address

    def close_allocation(self, address: Address) -> None:
        check(f"close the allocation at {address:#x}", cuda.cuIpcCloseMemHandle, address)

    # -- streams, events, copies -------------------------------------------------------------------------------------
    def create_stream(self) -> StreamId:
        attempt = "create a stream"
        _, highest = check(attempt, cuda.cuCtxGetStreamPriorityRange)
        flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return StreamId(int(check(attempt, cuda.cuStreamCreateWithPriority, flags, highest)))

    def owns(self, stream: StreamId) -> bool:
        context = check(f"see of which device stream {stream:#x} is", cuda.cuStreamGetCtx, stream)
        return int(context) == self._context.address

    def destroy_stream(self, stream: StreamId) -> None:
        check(f"destroy stream {stream:#x}", cuda.cuStreamDestroy, stream)

    def create_event(self, timed: bool) -> EventId:
        flags = cuda.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING
        return EventId(int(check("create an event", cuda.cuEventCreate, flag)))

    def destroy_event(self, event: EventId) -> None:
        check(f"destroy event {event:#x}", cuda.cuEventDestroy, event)

    # Calls that every layer of every pass makes: a message is put together only where it is needed.
    def record(self, event: EventId, stream: StreamId, *, external: bool = False) -> None:
        result = self._events.record(event, stream, _RECORD_EXTERNAL if external else 0)
        if result:
            attempt = f"record event {event:#x} on stream {stream:#x}"
            raise DriverError("cuEventRecordWithFlags", cuda.CUresult(result).name, attempt)

    def wait(self, stream: StreamId, event: EventId, *, external: bool = False) -> None:
        result = self._events.wait(stream, event, _WAIT_EXTERNAL if external else 0)
        if result:
            attempt = f"let stream {stream:#x} wait for event {event:#x}"
            raise DriverError("cuStreamWaitEvent", cuda.CUresult(result).name, attempt)

    def complete(self, event: EventId) -> bool:
        (result,) = cuda.cuEventQuery(event)
        if result not in (_SUCCESS, _NOT_READY):
            raise DriverError("cuEventQuery", result.name, f"look at event {event:#x}")
        return bool(result == _SUCCESS)

    def elapsed(self, start: EventId, end: EventId) -> float:
        milliseconds = check("take the time between two events", cuda.cuEventElapsedTime, start, end)
        return float(milliseconds) * 1e-3

    def prepare(self, copies: Sequence[Copy]) -> _Copies:
        if (call := self._batch_call) is None:
            return _Copies(tuple(copies), ())
        starts = range(0, len(copies), _BATCH)
        return _Copies(tuple(copies), tuple(CopyBatch(call, copies[start : start + _BATCH]) for start in starts))

    def copy(self, prepared: _Copies, stream: StreamId) -> None:
        # A batch given to a stream that is captured would be missing from the graph, which is otherwise fine.
        if prepared.batches and stream != _DEFAULT_STREAM and not self.capture(stream):
            for batch in prepared.batches:
                result = batch.give(stream)
                if result:
                    attempt = f"give {len(prepared.copies)} copies to stream {stream:#x}"
                    raise DriverError("cuMemcpyBatchAsync", cuda.CUresult(result).name, attempt)
        else:
            attempt = f"give {len(prepared.copies)} copies to stream {stream:#x}"
            for dst, src, nbytes in prepared.copies:
                check(attempt, cuda.cuMemcpyAsync, dst, src, nbytes, stream)

    def issuing_thread(self, lines: LinesAt | None = None) -> CudaIssuingThread | None:
        if self._batch_call is None or not HAS_NATIVE:
            return None
        return CudaIssuingThread.start(self._context.address, self._events, self._batch_call, lines)

    def capture(self, stream: StreamId) -> int:
        result, status = cuda.cuStreamIsCapturing(stream)
        if result == _SUCCESS and status == _NOT_CAPTURING:
            return 0
        attempt = f"see which capture stream {stream:#x} is in"
        _, capture, *_ = check(attempt, cuda.cuStreamGetCaptureInfo, stream)
        return int(capture)

    def synchronize(self, stream: StreamId | None = None) -> None:
        if stream is None:
            check(f"wait for {self.device}", cuda.cuCtxSynchronize)
        else:
            check(f"wait for stream {stream:#x}", cuda.cuStreamSynchronize, stream)


def _is_fabric_handle(shared: int | bytes) -> bool:
    return isinstance(shared, bytes) and len(shared) == FABRIC_NBYTES


def _with_room(attempt: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`check` of a call that takes memory: where there is none left, once more without what torch keeps for later."""
    try:
        return check(attempt, call, *arguments)
    except DriverError as error:
        if not error.is_for_want_of_memory:
            raise
    torch.cuda.empty_cache()
    return check(attempt, call, *arguments)


def _host_location(numa_node: int) -> cuda.CUmemLocation:
    location = cuda.CUmemLocation()
    location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST_NUMA
    location.id = numa_node
    return location

"""``cuEventRecordWithFlags`` and ``cuStreamWaitEvent``, called without the bindings.

Every layer of every pass makes these calls, with integers for arguments and an integer for a result. The bindings make
objects of them, and give up the interpreter's lock meanwhile: where another thread takes it, to get it back takes
longer than the calls, which only write to a queue.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.driver import NativeCalls, StreamId
from vmm_dwdp.errors import DriverError

_CALL: Final = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)  # keeps the lock
_SINCE: Final = {"cuEventRecordWithFlags": 11010, "cuStreamWaitEvent": 3020}  # the driver version that brought it


class EventCalls:
    """The two functions; 0 is success.

    Attributes:
        record: ``(event, stream, flags) -> CUresult``.
        wait: ``(stream, event, flags) -> CUresult``.
        record_at, wait_at: where they are.
    """

    def __init__(self, record: int, wait: int) -> None:
        """``record``, ``wait``: the functions' addresses."""
        self.record_at, self.wait_at = record, wait
        self.record: Any = _CALL(record)
        self.wait: Any = _CALL(wait)

    @classmethod
    def find(cls) -> EventCalls:
        """Of the driver that is loaded."""
        return cls(*(address(call, since) for call, since in _SINCE.items()))

    def natively(self, context: int, current_stream: Callable[[int], StreamId]) -> NativeCalls:
        """These, and what else C asks at every layer of a device's ``context``."""
        asked = address("cuCtxGetCurrent", 4000), context, address("cuStreamIsCapturing", 10000)
        return NativeCalls(*asked, self.wait_at, self.record_at, current_stream, _failure)


def address(call: str, since: int) -> int:
    """Where the loaded driver has ``call``, in the form of version ``since``. Raises `DriverError` if it does not."""
    result, found, _ = cuda.cuGetProcAddress(call.encode(), since, 0)
    if result != cuda.CUresult.CUDA_SUCCESS:
        raise DriverError("cuGetProcAddress", result.name, f"find {call}")
    return int(found)


def _failure(call: str, result: int) -> DriverError:
    return DriverError(call, cuda.CUresult(result).name, "order a layer's kernels after its copies, or before the next")

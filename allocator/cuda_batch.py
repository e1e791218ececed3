"""``cuMemcpyBatchAsync`` with arrays that are built once.

The bindings build the arrays anew from Python lists in every call, and hold the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.driver import Copy

_SINCE: Final = 13000  # the driver version that brought the call in this form
_CALL: Final = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # dsts
    ctypes.c_void_p,  # srcs
    ctypes.c_void_p,  # sizes
    ctypes.c_size_t,  # count
    ctypes.c_void_p,  # attributes
    ctypes.c_void_p,  # for each attribute, the first copy that it is of
    ctypes.c_size_t,  # how many attributes
    ctypes.c_void_p,  # stream
)


class CopyBatch:
    """Some copies, ready to be given to any stream.

    Attributes:
        arguments: of the call, but for the stream.
        nbytes: of all copies.
    """

    def __init__(self, call: BatchCall, copies: Sequence[Copy]) -> None:
        count = len(copies)
        self._arrays: tuple[ctypes.Array[Any], ...] = (
            (ctypes.c_uint64 * count)(*(copy.dst for copy in copies)),
            (ctypes.c_uint64 * count)(*(copy.src for copy in copies)),
            (ctypes.c_size_t * count)(*(copy.nbytes for copy in copies)),
        )
        self.arguments = (*(ctypes.addressof(array) for array in self._arrays), count, *call.attributes)
        self.nbytes = sum(copy.nbytes for copy in copies)
        self._call = call  # which owns the attributes

    def give(self, stream: int) -> int:
        """The driver's result; 0 is success."""
        return int(self._call.function(*self.arguments, stream))


class BatchCall:
    """The function, and what it is told of every copy: in stream order, beside kernels if the device can."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.function: Any = _CALL(address)
        self._attributes = cuda.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._attributes.flags = cuda.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
        self._first = ctypes.c_size_t(0)
        self.attributes = (self._attributes.getPtr(), ctypes.addressof(self._first), 1)

    @classmethod
    def find(cls) -> BatchCall | None:
        """``None`` if this driver is too old to have it."""
        result, address, _ = cuda.cuGetProcAddress(b"cuMemcpyBatchAsync", _SINCE, 0)
        return cls(int(address)) if result == cuda.CUresult.CUDA_SUCCESS and address else None

"""A device's primary context, which is the one that torch uses, and whether it is current in a thread.

[Note: The current device]
The CUDA driver has a stack of contexts for every thread. Calls that name no context go to the topmost: those that
create streams and events, and all that are given stream 0. `torch.cuda.current_device` tells that one's device, with
two exceptions. A new thread has no context: device 0 counts as current, and the calls above fail until somebody makes
a context current there. And torch can have a device current that has no context yet, while another's is topmost
(``targetDeviceIndex`` in c10/cuda/CUDAFunctions.cpp): so it spares a device, to which it only goes back, the memory
that a context takes.

So whoever makes a device current pushes its context, and tells torch where that is not enough; and then undoes both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch
from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.cuda_check import check


class PrimaryContext:
    """The primary context of device ``index``. It is kept for the life of the process.

    Attributes:
        address: what the driver knows it by.
        current_device: see `Driver`.
    """

    def __init__(self, index: int, context: cuda.CUcontext) -> None:
        self.address = int(context)
        self._index = index
        self._context = context
        self.current_device = torch._C._cuda_getDevice  # without the Python of torch.cuda.current_device
        self._thread = threading.local()  # `seen`: that it had this context when torch said so

    def is_current(self) -> bool:
        """See `Driver.is_current`.

        Another device's context that comes to the top later is seen, since torch's answer follows it. Where the stack
        is emptied, calls fail.
        """
        if self.current_device() != self._index:
            return False
        return getattr(self._thread, "seen", False) or self._see()

    def _see(self) -> bool:
        """Whether torch is right about this thread; see [Note: The current device]."""
        attempt = f"see whether cuda:{self._index} is current"
        topmost = int(check(attempt, cuda.cuCtxGetCurrent))
        if not topmost:
            check(attempt, cuda.cuCtxSetCurrent, self._context)
        elif topmost != self.address:
            return False
        self._thread.seen = True
        return True

    def current(self) -> Current:
        """See `Driver.current`."""
        return Current(self._index, self._context, self.current_device)


class Current:
    """Makes a context current from its `__enter__` to its `__exit__`, of the same thread.

    No generator: one that is left where it stands, as by a thread that ends, would be ended by the garbage collector,
    and take the topmost context from whatever thread that runs in.
    """

    def __init__(self, index: int, context: cuda.CUcontext, current_device: Callable[[], int]) -> None:
        self._index = index
        self._context = context
        self._current_device = current_device

    def __enter__(self) -> None:
        self._before = self._current_device()
        check(f"make cuda:{self._index} current", cuda.cuCtxPushCurrent, self._context)
        try:
            if self._current_device() != self._index:
                torch.cuda.set_device(self._index)
        except BaseException:
            self._pop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pop()
        if self._current_device() != self._before:  # which has no context: torch alone knew of it
            torch.cuda._maybe_exchange_device(self._before)

    def _pop(self) -> None:
        check(f"make cuda:{self._before} current again", cuda.cuCtxPopCurrent)

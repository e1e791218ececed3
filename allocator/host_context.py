"""Which device of the host driver is current in a thread, by CUDA's rules.

Every thread has a stack of contexts, and the topmost is current. A new thread has none: its current device is device 0,
and calls that need a context fail there until somebody makes one current.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Final

from vmm_dwdp.errors import DriverError

INVALID_CONTEXT: Final = "CUDA_ERROR_INVALID_CONTEXT"
NOT_INITIALIZED: Final = "CUDA_ERROR_NOT_INITIALIZED"


class _Thread(threading.local):
    def __init__(self) -> None:
        self.contexts: list[int] = []  # devices, whose contexts these are


_thread: Final = _Thread()


def current_device() -> int:
    """The number of the calling thread's current device."""
    return _thread.contexts[-1] if _thread.contexts else 0


class HostContext:
    """The context of device ``index``, which all drivers of that device share; a context manager that makes it current.

    No child of fork has the threads that work for it, so none may use it.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._process = os.getpid()

    def __enter__(self) -> None:
        _thread.contexts.append(self._index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _thread.contexts.pop()

    def is_current(self) -> bool:
        """See `Driver.is_current`."""
        contexts = _thread.contexts
        if not contexts and self._index == current_device():
            contexts.append(self._index)
        return bool(contexts) and contexts[-1] == self._index

    def require_current(self, call: str) -> None:
        """Raises `DriverError` for a ``call`` that goes to the current context, if that is not this one."""
        self.require_same_process(call)
        if _thread.contexts[-1:] != [self._index]:
            found = f"device {_thread.contexts[-1]} is" if _thread.contexts else "no device is"
            raise DriverError(call, INVALID_CONTEXT, f"use device {self._index} in a thread where {found} current")

    def require_same_process(self, call: str) -> None:
        """Raises `DriverError` in a child of fork, where nobody would do what the threads of the parent do."""
        if os.getpid() != self._process:
            raise DriverError(call, NOT_INITIALIZED, "use a driver that was opened before this process was forked")

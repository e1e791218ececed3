"""Host drivers whose calls can be made to fail, one by one, and one whose copies are given by the native thread."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import pytest

from support.groups import PAGE
from vmm_dwdp.allocator.driver import DEVICE, Copy, Driver, HandleId, HandleType, Lane, Location
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.errors import DriverError

CALLS: Final = {name for name in vars(Driver) if not name.startswith("_") and callable(getattr(Driver, name))}

_POINTER, _UNSIGNED, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER)
_EVENT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _UNSIGNED)
_BATCH = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER)


class FailingDriver(HostDriver):
    """Some of its calls raise instead of doing anything, while there is a `fault`."""

    fault: CallFault | None = None

    def __init__(self) -> None:
        super().__init__(PAGE)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in CALLS and (fault := super().__getattribute__("fault")) is not None:
            fault.count(name)
        return found


class SmallDriver(HostDriver):
    """Has ``room`` bytes of memory on its device, and ``host_room`` on the host; both may be changed."""

    def __init__(self, room: int, host_room: int = 1 << 40) -> None:
        super().__init__(PAGE)
        self.room = {True: room, False: host_room}
        self._nbytes: dict[HandleId, tuple[bool, int]] = {}

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> HandleId:
        at = location == DEVICE
        if nbytes > self.room[at]:
            raise DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", f"create {nbytes} bytes on {location}")
        handle = super().create(nbytes, location, handle_type)
        self._nbytes[handle] = at, nbytes
        self.room[at] -= nbytes
        return handle

    def release(self, handle: HandleId) -> None:
        super().release(handle)
        at, nbytes = self._nbytes.pop(handle, (True, 0))  # what was imported is nobody's here
        self.room[at] += nbytes


class CallFault:
    """An `Interruption`: the call number ``at`` of ``driver``, in any thread, raises; later ones do as well if it is
    ``sticky``, as on a CUDA device after a kernel that faulted. What is no `DriverError` is raised in the thread that
    makes this object only: no signal's handler runs in another."""

    def __init__(
        self, driver: FailingDriver, at: int, error: type[BaseException] = DriverError, *, sticky: bool = False
    ) -> None:
        self.seen = 0
        self.where: str | None = None
        self.passed: dict[Any, tuple[int, int]] = {}
        self._driver = driver
        self._at = at
        self._error = error
        self._sticky = sticky
        self._thread = threading.get_ident()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._driver.fault = self
        return self

    def __exit__(self, *error: object) -> None:
        self._driver.fault = None

    def count(self, call: str) -> None:
        if self._error is not DriverError and threading.get_ident() != self._thread:
            return
        with self._lock:
            self.seen += 1
            if self.seen <= self._at or (self.where is not None and not self._sticky):
                return
            self.where = f"the driver's {call}"
        if self._error is DriverError:
            raise DriverError(call, "INJECTED", f"make call number {self._at}")
        raise self._error(self.where)


class NativeDriver(FailingDriver):
    """Lends the compiled issuing thread, whose driver calls are callbacks that do the host driver's."""

    refusal: Refusal | None = None

    def __init__(self) -> None:
        if not HAS_NATIVE:
            pytest.skip("the native thread is not compiled here")
        super().__init__()

    def issuing_thread(self) -> NativeThread:
        return NativeThread(self)


class Refusal:
    """An `Interruption`: callback number ``at`` of the native thread returns an error to the C code."""

    def __init__(self, driver: NativeDriver, at: int) -> None:
        self.seen = 0
        self.where: str | None = None
        self.passed: dict[Any, tuple[int, int]] = {}
        self._driver = driver
        self._at = at

    def __enter__(self) -> Self:
        self._driver.refusal = self
        return self

    def __exit__(self, *error: object) -> None:
        self._driver.refusal = None

    def refuses(self, call: str) -> bool:
        self.seen += 1
        if self.seen != self._at + 1:
            return False
        self.where = f"the callback {call}"
        return True


class NativeThread:
    """See `vmm_dwdp.allocator.driver.IssuingThread`: a batch for each copy, whose addresses are numbers of copies."""

    def __init__(self, driver: NativeDriver) -> None:
        from vmm_dwdp.allocator import _native

        self._driver = driver
        self._numbers = itertools.count(1)
        self._copies: dict[int, Sequence[Copy]] = {}
        self._functions = (
            _CONTEXT(lambda context: self._call("set_current", lambda: None)),
            _EVENT(lambda stream, event, flags: self._call("wait", lambda: driver.wait(stream, event))),
            _BATCH(
                lambda copy, b, c, d, e, f, g, stream: self._call(
                    "copy", lambda: driver.copy(self._copies[copy], stream)
                )
            ),
            _EVENT(lambda event, stream, flags: self._call("record", lambda: driver.record(event, stream))),
        )
        addresses = [ctypes.cast(function, _POINTER).value for function in self._functions]
        self._thread = _native.Issuer(*addresses, 1, self._failure)  # type: ignore[arg-type]
        self.submit = self._thread.submit
        self.flush = self._thread.flush
        self.close = self._thread.close

    def job(self, lanes: Sequence[Lane]) -> Any:
        stated = tuple(
            (lane.stream, lane.after, tuple(self._batch(copy) for copy in lane.copies), lane.then) for lane in lanes
        )
        return self._thread.job(stated, self)

    def _batch(self, copy: Copy) -> tuple[int, int, int, int, int, int, int]:
        number = next(self._numbers)
        self._copies[number] = (copy,)
        return number, 1, 1, 1, 1, 1, 1

    def _call(self, name: str, call: Callable[[], object]) -> int:
        refusal = self._driver.refusal
        if refusal is not None and refusal.refuses(name):
            return 1
        try:
            with HostDriver.current(self._driver):  # Python takes each callback for a thread of its own
                call()
        except DriverError:
            return 1
        return 0

    @staticmethod
    def _failure(call: str, result: int) -> DriverError:
        return DriverError(call, "INJECTED", f"give a layer's copies to the driver: {result}")

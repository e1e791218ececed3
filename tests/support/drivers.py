"""Host drivers whose calls can be made to fail, one by one, and one whose copies are given by the native thread."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import pytest

from support.groups import PAGE
from vmm_dwdp.allocator.driver import DEVICE, Copy, Driver, HandleId, HandleType, Lane, LinesAt, Location
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.errors import DriverError

CALLS: Final = {name for name in vars(Driver) if not name.startswith("_") and callable(getattr(Driver, name))}

_POINTER, _UNSIGNED, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER)
_EVENT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _UNSIGNED)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_uint64, ctypes.c_uint32, _UNSIGNED)
_NOT_READY: Final = 600
_WORDS: Final = 1024
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

    def issuing_thread(self, lines: LinesAt | None = None) -> NativeThread:
        return NativeThread(self, lines)


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

    def __init__(self, driver: NativeDriver, lines: LinesAt | None) -> None:
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
        self._choosing = (
            _WRITE(
                lambda stream, address, value, flags: self._call("write", lambda: self._write(stream, address, value))
            ),
            _CONTEXT(self._query),
            _CONTEXT(lambda mode: self._call("exchange_mode", lambda: None)),
        )
        self._words = (ctypes.c_uint32 * _WORDS)()
        self._places: dict[int, int] = {}  # of streams, in the words
        addresses = [ctypes.cast(function, _POINTER).value for function in self._functions]
        choosing = None
        if lines is not None:
            choosing = (*lines, *(ctypes.cast(function, _POINTER).value for function in self._choosing))
        self._thread = _native.Issuer(*addresses, 1, self._failure, choosing)  # type: ignore[arg-type]
        self.native_id = self._thread.native_id
        self.choosing = self._thread
        self.submit = self._thread.submit
        self.flush = self._thread.flush
        self.close = self._thread.close

    def job(self, lanes: Sequence[Lane]) -> Any:
        stated = [self._stated(lane) for lane in sorted(lanes, key=lambda lane: lane.owner is not None)]
        return self._thread.job(tuple(stated), self)

    def _stated(self, lane: Lane) -> tuple[Any, ...]:
        if lane.owner is None:
            return lane.stream, lane.after, tuple(self._batch([copy]) for copy in lane.copies), lane.then
        place = 2 * self._places.setdefault(lane.stream, len(self._places))
        words = ctypes.addressof(self._words) + ctypes.sizeof(ctypes.c_uint32) * place
        return lane.stream, lane.after, tuple(map(self._batch, lane.runs)), lane.then, lane.owner, words

    def _batch(self, copies: Sequence[Copy]) -> tuple[int, ...]:
        number = next(self._numbers)
        self._copies[number] = copies
        return number, 1, 1, 1, 1, 1, 1, sum(copy.nbytes for copy in copies)

    def _write(self, stream: int, address: int, value: int) -> None:
        def write() -> None:
            ctypes.c_uint32.from_address(address).value = value

        self._driver._stream("write", stream or 0).submit(write)

    def _query(self, event: int) -> int:
        try:
            with HostDriver.current(self._driver):
                return 0 if self._driver.complete(event) else _NOT_READY
        except DriverError:
            return 1

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

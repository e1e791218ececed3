"""What C does of a pass where it calls the driver by the addresses of its functions, as it does on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.groups import join, same_bytes
from support.hits import CONFIG, MODEL, run_pass

from vmm_dwdp import DriverError, DWDPRuntime
from vmm_dwdp.allocator.driver import NativeCalls, StreamId
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.native import HAS_NATIVE

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="there is no C here")


class Native(HostDriver):
    """Whose calls C makes by their addresses, and each of which may be told what to return."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.result = dict.fromkeys(("get_current", "is_capturing", "wait", "record"), 0)
        self.context, self.status = 77, 0
        pointer, whole = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        event = ctypes.PYFUNCTYPE(ctypes.c_int, pointer, pointer, ctypes.c_uint)
        self._functions = (
            ctypes.PYFUNCTYPE(ctypes.c_int, whole)(self._get_current),
            ctypes.PYFUNCTYPE(ctypes.c_int, pointer, ctypes.POINTER(ctypes.c_int))(self._is_capturing),
            event(lambda stream, event, flags: self._call("wait", lambda: self.wait(stream or 0, event))),
            event(lambda event, stream, flags: self._call("record", lambda: self.record(event, stream or 0))),
        )
        current, capturing, wait, record = (ctypes.cast(function, pointer).value or 0 for function in self._functions)
        self.native_calls = NativeCalls(current, 77, capturing, wait, record, lambda index: StreamId(0), self._failure)

    def _get_current(self, found: Any) -> int:
        found[0] = self.context
        return self.result["get_current"]

    def _is_capturing(self, stream: int | None, status: Any) -> int:
        status[0] = self.status
        return self.result["is_capturing"]

    def _call(self, name: str, call: Callable[[], object]) -> int:
        if not self.result[name]:
            call()
        return self.result[name]

    def _failure(self, call: str, result: int) -> DriverError:
        return DriverError(call, f"CODE_{result}", "do what a test forbids")


@pytest.fixture
def native(tmp_path: Path) -> Iterator[tuple[DWDPRuntime, Native]]:
    driver = Native()
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, driver)
    run_pass(runtime)
    runtime.acquire(0)
    runtime.release(0)
    yield runtime, driver
    for name in driver.result:
        driver.result[name] = 0
    assert runtime.close().open() == []


def test_calls_by_address_give_the_same_bytes(
    native: tuple[DWDPRuntime, Native], in_python: list[tuple[str, int]]
) -> None:
    runtime, _ = native
    for _ in range(3):
        run_pass(runtime)
    assert in_python == [("acquire", 0)] * 3


@pytest.mark.parametrize(
    "unusual", [{"context": 78}, {"status": 1}, {"get_current": 201}, {"is_capturing": 906}], ids=str
)
def test_another_context_or_a_capture_is_pythons(
    native: tuple[DWDPRuntime, Native], in_python: list[tuple[str, int]], unusual: dict[str, int]
) -> None:
    runtime, driver = native
    for name, value in unusual.items():
        if name in driver.result:
            driver.result[name] = value
        else:
            setattr(driver, name, value)
    assert same_bytes(runtime.acquire(1)["w"], MODEL[1]["w"])  # type: ignore[arg-type]
    runtime.release(1)
    assert in_python == [("acquire", 1), ("release", 1)]


@pytest.mark.parametrize("call", ["wait", "record"])
def test_a_call_that_fails_is_told_and_may_be_repeated(native: tuple[DWDPRuntime, Native], call: str) -> None:
    runtime, driver = native
    if call == "record":
        runtime.acquire(1)
    driver.result[call] = 700
    with pytest.raises(DriverError, match=r"(cuStreamWaitEvent|cuEventRecordWithFlags) failed with CODE_700"):
        runtime.acquire(1) if call == "wait" else runtime.release(1)
    runtime.check_integrity()
    driver.result[call] = 0
    if call == "wait":
        assert same_bytes(runtime.acquire(1)["w"], MODEL[1]["w"])  # type: ignore[arg-type]
    runtime.release(1)
    run_pass(runtime)

"""What the CUDA driver is asked for in every pass, without a GPU: the calls that it gets are written down."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vmm_dwdp import DriverError
from vmm_dwdp.allocator.driver import Copy, Lane

pytest.importorskip("cuda.bindings.driver")

from cuda.bindings import driver as cuda

from vmm_dwdp.allocator import cuda_driver
from vmm_dwdp.allocator.cuda_batch import _CALL, BatchCall
from vmm_dwdp.allocator.cuda_driver import CudaDriver
from vmm_dwdp.allocator.cuda_events import _CALL as EVENT_CALL
from vmm_dwdp.allocator.cuda_events import EventCalls
from vmm_dwdp.allocator.cuda_issue import CudaIssuingThread
from vmm_dwdp.allocator.native import HAS_NATIVE

COPIES = [Copy(dst=1000 + n, src=5000 + n, nbytes=16 * n) for n in range(1, 150)]
CAPTURED, REFUSING = 77, 88  # streams


class Recorder:
    """Stands for the driver's functions."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[Copy], int, int]] = []  # copies, how many attributes, stream
        self.singles: list[tuple[Copy, int]] = []
        self._callback = _CALL(self._batch)
        self.address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    def _batch(
        self, dsts: int, srcs: int, sizes: int, count: int, attributes: int, first: int, number: int, stream: int
    ) -> int:
        columns = [(ctypes.c_uint64 * count).from_address(address) for address in (dsts, srcs, sizes)]
        order = ctypes.c_int.from_address(attributes).value
        assert order == cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        assert ctypes.c_size_t.from_address(first).value == 0
        self.batches.append(([Copy(*row) for row in zip(*columns, strict=True)], number, stream))
        return int(cuda.CUresult.CUDA_ERROR_INVALID_VALUE if stream == REFUSING else cuda.CUresult.CUDA_SUCCESS)

    def single(self, dst: int, src: int, nbytes: int, stream: int) -> tuple[Any]:
        self.singles.append((Copy(dst, src, nbytes), stream))
        return (cuda.CUresult.CUDA_SUCCESS,)


@pytest.fixture
def calls() -> Recorder:
    return Recorder()


@pytest.fixture
def driver(calls: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDriver]:
    """As far as copies need one."""
    made = object.__new__(CudaDriver)
    made._batch_call = BatchCall(calls.address)
    monkeypatch.setattr(made, "capture", lambda stream: int(stream == CAPTURED))
    monkeypatch.setattr(cuda_driver.cuda, "cuMemcpyAsync", calls.single)
    return made


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemAlloc"])
@pytest.mark.parametrize("kept", [True, False], ids=["torch keeps some", "there is none"])
def test_what_torch_keeps_for_later_is_given_back_before_there_is_no_memory(
    driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, call: str, kept: bool
) -> None:
    happened = []

    def taking(*arguments: object) -> tuple[Any, int]:
        happened.append(call)
        full = "given back" not in happened or not kept
        return (cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0) if full else (cuda.CUresult.CUDA_SUCCESS, 7)

    monkeypatch.setattr(cuda_driver.cuda, call, taking)
    monkeypatch.setattr(driver, "_properties", lambda location, handle_type: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("given back"))

    def take() -> int:
        return driver.create(1 << 21) if call == "cuMemCreate" else driver.allocate(1 << 21)

    if kept:
        assert take() == 7
    else:
        with pytest.raises(DriverError, match="failed with CUDA_ERROR_OUT_OF_MEMORY") as raised:
            take()
        assert raised.value.is_for_want_of_memory
    assert happened == [call, "given back", call]


def test_all_copies_are_given_in_order_and_in_batches_that_hold_up_no_launch_for_long(
    driver: CudaDriver, calls: Recorder
) -> None:
    prepared = driver.prepare(COPIES)
    for _ in range(2):
        calls.batches.clear()
        driver.copy(prepared, 9)
        assert [copy for batch, _, _ in calls.batches for copy in batch] == COPIES
        assert {len(batch) for batch, _, _ in calls.batches[:-1]} == {64}
        assert {(number, stream) for _, number, stream in calls.batches} == {(1, 9)}
    assert calls.singles == []


def test_a_captured_stream_gets_single_copies_and_never_a_batch(driver: CudaDriver, calls: Recorder) -> None:
    driver.copy(driver.prepare(COPIES), CAPTURED)
    assert calls.singles == [(copy, CAPTURED) for copy in COPIES]
    assert calls.batches == []


def test_a_driver_without_the_batch_call_gets_single_copies(driver: CudaDriver, calls: Recorder) -> None:
    driver._batch_call = None
    driver.copy(driver.prepare(COPIES), 9)
    assert calls.singles == [(copy, 9) for copy in COPIES]


def test_a_batch_that_is_refused_is_an_error(driver: CudaDriver, calls: Recorder) -> None:
    with pytest.raises(DriverError, match=r"cuMemcpyBatchAsync failed with CUDA_ERROR_INVALID_VALUE .* 149 copies"):
        driver.copy(driver.prepare(COPIES), REFUSING)
    assert len(calls.batches) == 1


@pytest.mark.skipif(not HAS_NATIVE, reason="there was no C compiler when this package was installed")
def test_the_native_thread_gives_the_same_batches(driver: CudaDriver, calls: Recorder) -> None:
    events: list[tuple[int, ...]] = []

    def answering(*arguments: int) -> int:
        events.append((*arguments, len(calls.batches)))
        return 0

    function = EVENT_CALL(answering)
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    # Its context is set by a function of the same form: the arguments that it is not given mean nothing
    thread = CudaIssuingThread(3, address, EventCalls(address, address), BatchCall(calls.address))
    del events[:]
    good, bad = (
        thread.job([Lane(stream, 20, driver.prepare(COPIES), 30), Lane(stream, 21, driver.prepare([]), 31)])
        for stream in (9, REFUSING)
    )
    thread.submit(good)
    good.result()
    assert [copy for batch, _, _ in calls.batches for copy in batch] == COPIES
    assert {(number, stream) for _, number, stream in calls.batches} == {(1, 9)}
    assert events == [(9, 20, 0, 0), (30, 9, 0, 3), (9, 21, 0, 3), (31, 9, 0, 3)]
    thread.submit(bad)
    with pytest.raises(DriverError, match="cuMemcpyBatchAsync failed with CUDA_ERROR_INVALID_VALUE"):
        bad.result()
    assert len(calls.batches) == 4
    thread.close()


SUCCESS, NOT_READY = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_READY
REFUSED = cuda.CUresult.CUDA_ERROR_INVALID_HANDLE


@pytest.fixture
def bare() -> CudaDriver:
    """A driver that has taken nothing: enough for calls that only pass their arguments on."""
    return object.__new__(CudaDriver)


def answer(monkeypatch: pytest.MonkeyPatch, call: str, *answers: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Let the driver's ``call`` answer so, one answer after another; the arguments that it gets."""
    remaining, given = iter(answers), []

    def answering(*arguments: Any) -> tuple[Any, ...]:
        given.append(arguments)
        return next(remaining)

    answering.__name__ = call
    monkeypatch.setattr(cuda_driver.cuda, call, answering)
    return given


def test_events_are_recorded_and_waited_for_inside_a_graph_or_across_its_border(bare: CudaDriver) -> None:
    given: dict[str, list[tuple[int, ...]]] = {"record": [], "wait": []}

    def function(name: str) -> Any:
        def answering(*arguments: int) -> int:
            given[name].append(arguments)
            return int(SUCCESS if len(given[name]) <= 2 else REFUSED)

        return EVENT_CALL(answering)

    functions = {name: function(name) for name in given}
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}
    bare._events = EventCalls(**addresses)
    bare.record(11, 12)
    bare.record(11, 12, external=True)
    bare.wait(12, 11)
    bare.wait(12, 11, external=True)
    external = cuda.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL, cuda.CUevent_wait_flags.CU_EVENT_WAIT_EXTERNAL
    assert given == {"record": [(11, 12, 0), (11, 12, external[0])], "wait": [(12, 11, 0), (12, 11, external[1])]}
    with pytest.raises(DriverError, match="INVALID_HANDLE while trying to record event 0xb on stream 0xc"):
        bare.record(11, 12)
    with pytest.raises(DriverError, match="INVALID_HANDLE while trying to let stream 0xc wait for event 0xb"):
        bare.wait(12, 11)


def test_an_event_is_complete_or_not_or_there_is_an_error(bare: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "cuEventQuery", (SUCCESS,), (NOT_READY,), (REFUSED,))
    assert bare.complete(11)
    assert not bare.complete(11)
    with pytest.raises(DriverError, match="look at event 0xb"):
        bare.complete(11)


def test_a_capture_has_its_number_and_the_default_stream_beside_one_is_refused(
    bare: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = cuda.CUstreamCaptureStatus
    implicit = cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
    answer(
        monkeypatch,
        "cuStreamIsCapturing",
        (SUCCESS, status.CU_STREAM_CAPTURE_STATUS_NONE),
        (SUCCESS, status.CU_STREAM_CAPTURE_STATUS_ACTIVE),
        (implicit, None),
    )
    answer(
        monkeypatch,
        "cuStreamGetCaptureInfo",
        (SUCCESS, status.CU_STREAM_CAPTURE_STATUS_ACTIVE, 42, None, None, None, 0),
        (implicit, None, None, None, None, None, None),
    )
    assert bare.capture(9) == 0
    assert bare.capture(9) == 42
    with pytest.raises(DriverError, match="CAPTURE_IMPLICIT while trying to see which capture stream 0x0 is in"):
        bare.capture(0)

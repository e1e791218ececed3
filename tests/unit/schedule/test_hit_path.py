"""What C does of a pass is what the state machine does, and where it does nothing it has changed nothing."""

from __future__ import annotations

import ctypes
import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drivers import NativeDriver
from support.explorer import Program, RecordingDriver, RecordingIssuer, rotating
from support.groups import add_layers, fill_shards, join, random_model, same_bytes

from vmm_dwdp import ConfigError, DriverError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.driver import NativeCalls, StreamId
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.schedule.issue import InlineIssuer
from vmm_dwdp.schedule.layer import StagedLayer
from vmm_dwdp.schedule.schedule import Schedule
from vmm_dwdp.schedule.staging import Staging

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="there is no C here")

MODEL = random_model({number: {"w": ((6, 300), torch.float32)} for number in range(5)}, seed=5)
CONFIG = DWDPConfig(group_size=1, host_experts=4)


# -- the state machine is the reference ------------------------------------------------------------------------------
class InPython(StagedLayer):
    """Goes through the state machine always."""

    def enter(self, stream: StreamId) -> bool:
        return False

    def leave(self, stream: StreamId) -> bool:
        return False


class StagingInPython(Staging):
    _layer = InPython


class Machine:
    """Layers over a driver that writes down what it is asked, for the launching and for the issuing thread."""

    def __init__(self, staging: type[Staging], num_layers: int, depth: int, streams: int, thread: bool) -> None:
        self.program = Program(num_layers, min(depth, num_layers), streams)
        driver = RecordingDriver(self.program)
        issuer = RecordingIssuer(driver) if thread else InlineIssuer()
        fetches = rotating(num_layers, depth, streams)
        self.staging = staging(driver, Ledger(), issuer, fetches, depth)  # type: ignore[arg-type]

    def does(self, step: tuple[str, int]) -> tuple[object, ...]:
        """What a step leads to: its exception, all that anybody can see afterwards, and what the driver was asked."""
        what, place = step
        staging, pipeline = self.staging, self.staging.pipeline
        layer = staging.layers[place % len(staging.layers)]
        told = ""
        try:
            if what == "acquire":
                layer.acquire(StreamId(0))
            elif what == "release":
                layer.release(StreamId(0))
            elif what == "reset":
                staging.reset(StreamId(0))
            elif what == "forget":
                staging.forget()
            else:
                pipeline.prompt = not pipeline.prompt
        except StateError as error:
            told = str(error)

        def number(of: StagedLayer | None) -> int | None:
            return None if of is None else of.number

        slots = [(number(slot.holds), number(slot.reader), slot.read) for slot in staging.slots]
        counts = [(each.hits, each.misses, each.fetched_bytes) for each in staging.layers]
        words = pipeline.latest, pipeline.timed, list(pipeline.timer.order)
        return told, slots, counts, words, list(self.program.launcher), [list(job) for job in self.program.jobs]


in_order = st.tuples(st.just("pass"), st.integers(0, 4))
any_step = st.tuples(st.sampled_from(["acquire", "release", "reset", "forget", "prompt"]), st.integers(0, 4))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.one_of(in_order, any_step), max_size=12),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)
def test_c_leads_to_what_the_state_machine_leads_to(
    steps: list[tuple[str, int]], num_layers: int, depth: int, streams: int, thread: bool
) -> None:
    machines = [Machine(kind, num_layers, depth, streams, thread) for kind in (Staging, StagingInPython)]
    for step in steps:
        singly = [step]
        if step[0] == "pass":
            singly = [(what, place) for place in range(num_layers) for what in ("acquire", "release")]
        for each in singly:
            in_c, in_python = (machine.does(each) for machine in machines)
            assert in_c == in_python, each


# -- what goes through C ---------------------------------------------------------------------------------------------
@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The acquires and releases that Python's schedule is asked for."""
    asked: list[tuple[str, int]] = []

    def listed(name: str, original: Any) -> Any:
        def asking(schedule: Schedule, number: int, *rest: Any) -> Any:
            asked.append((name, number))
            return original(schedule, number, *rest)

        return asking

    for name in "acquire", "release":
        monkeypatch.setattr(Schedule, name, listed(name, getattr(Schedule, name)))
    return asked


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, HostDriver(4096))
    yield runtime
    assert runtime.close().open() == []


def run_pass(runtime: DWDPRuntime) -> None:
    for number, weights in MODEL.items():
        whole: Any = runtime.acquire(number, tokens=3)["w"]
        assert same_bytes(whole, weights["w"])
        runtime.release(number)


def test_all_but_the_first_acquire_of_a_pass_need_no_python(
    runtime: DWDPRuntime, in_python: list[tuple[str, int]]
) -> None:
    for _ in range(20):  # timed and not
        run_pass(runtime)
    assert in_python == [("acquire", 0)] * 20
    assert runtime.stats().hits == 100


def test_what_is_asked_for_by_name_goes_through_python(runtime: DWDPRuntime, in_python: list[tuple[str, int]]) -> None:
    runtime.acquire(0)
    runtime.release(0)
    assert same_bytes(runtime.acquire(1, mode="staged")["w"], MODEL[1]["w"])  # type: ignore[arg-type]
    runtime.release(1)
    assert in_python == [("acquire", 0), ("acquire", 1)]


@pytest.mark.parametrize("name", ["acquire", "release"])
def test_the_methods_say_how_they_are_called(runtime: DWDPRuntime, name: str) -> None:
    def names(method: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(method).parameters.values()
        return [(each.name, each.kind, each.default) for each in parameters if each.name != "self"]

    assert names(getattr(runtime, name)) == names(getattr(DWDPRuntime, name))
    assert len(names(getattr(runtime, name))) > 1


def test_a_subclass_is_asked_for_every_layer(tmp_path: Path) -> None:
    asked: list[int] = []

    class Own(DWDPRuntime):
        def acquire(self, layer: int, **known: Any) -> Any:
            asked.append(layer)
            return super().acquire(layer, **known)

    with Own(CONFIG, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(4096)) as runtime:
        add_layers(runtime, MODEL)
        fill_shards(runtime, MODEL)
        runtime.publish()
        run_pass(runtime)
    assert asked == list(MODEL)


def test_a_trace_misses_nothing(runtime: DWDPRuntime) -> None:
    run_pass(runtime)
    with runtime.trace() as trace:
        run_pass(runtime)
    computed = [span.layer for span in trace.spans if span.track == "compute" and span.layer is not None]
    assert computed == list(MODEL)
    run_pass(runtime)


@pytest.mark.parametrize("wrong", [9, "1", [1], None])
def test_what_is_no_layer_is_told_as_ever(runtime: DWDPRuntime, wrong: Any) -> None:
    runtime.acquire(0)
    runtime.release(0)
    for call in runtime.acquire, runtime.release:
        with pytest.raises(TypeError if isinstance(wrong, list) else ConfigError):
            call(wrong)
    runtime.acquire(1)
    runtime.release(1)


def test_another_thread_is_refused_and_the_pass_goes_on(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    for call in (lambda: runtime.acquire(1), lambda: runtime.release(0)):
        assert "in the middle of a pass" in str(run_in_another_thread(call))
    runtime.release(0)
    assert same_bytes(runtime.acquire(1)["w"], MODEL[1]["w"])  # type: ignore[arg-type]
    runtime.release(1)


def run_in_another_thread(call: Callable[[], object]) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except StateError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_pass_that_ended_is_over_and_one_that_goes_on_after_reset_is_not(runtime: DWDPRuntime) -> None:
    run_pass(runtime)
    assert run_in_another_thread(lambda: run_pass(runtime)) is None
    runtime.acquire(0)
    runtime.release(0)
    runtime.reset()
    runtime.acquire(1)  # in the middle of a pass, after one that was given up
    assert "in the middle of a pass" in str(run_in_another_thread(lambda: runtime.acquire(0)))
    runtime.release(1)
    runtime.reset()
    run_pass(runtime)


def test_a_job_that_is_not_handed_over_leaves_a_slot_that_holds_nothing(
    runtime: DWDPRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: object) -> None:
        raise KeyboardInterrupt

    run_pass(runtime)
    runtime.acquire(0)
    assert runtime._schedule._staging is not None
    with monkeypatch.context() as patched:
        patched.setattr(runtime._schedule._staging.pipeline.issuer, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.release(0)
    assert runtime._schedule._staging.slots[0].holds is None
    runtime.reset()
    run_pass(runtime)


def test_nothing_is_hit_after_close(tmp_path: Path) -> None:
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, HostDriver(4096))
    runtime.acquire(0)
    runtime.release(0)
    runtime.close()
    for call in runtime.acquire, runtime.release:
        with pytest.raises(StateError, match="closed"):
            call(1)


def test_what_c_keeps_is_let_go(tmp_path: Path) -> None:
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, HostDriver(4096))
    run_pass(runtime)
    assert runtime._schedule._staging is not None
    staging = runtime._schedule._staging
    watched = [weakref.ref(each) for each in (*staging.layers, *staging.slots, staging.pipeline, runtime)]
    runtime.close()
    del staging, runtime
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


# -- the driver's calls, made from C -----------------------------------------------------------------------------------
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


# -- copies that the driver was not given yet --------------------------------------------------------------------------
def test_the_interpreter_is_free_while_copies_are_waited_for(tmp_path: Path, in_python: list[tuple[str, int]]) -> None:
    driver = NativeDriver()
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, driver)
    run_pass(runtime)
    copying, waited = threading.Event(), threading.Event()
    copy = driver.copy

    def held_up(*arguments: Any) -> None:  # in the native thread, which needs the interpreter for this
        copying.set()
        assert waited.wait(60)
        copy(*arguments)

    runtime.acquire(0)
    driver.copy = held_up  # type: ignore[method-assign]
    runtime.release(0)  # layer 2 is to be copied
    assert copying.wait(60)
    driver.copy = copy  # type: ignore[method-assign]
    runtime.acquire(1)
    runtime.release(1)
    begun = threading.Event()
    thread = threading.Thread(target=lambda: waited.set() if begun.wait(60) else None)  # needs it, too
    thread.start()
    begun.set()
    assert same_bytes(runtime.acquire(2)["w"], MODEL[2]["w"])  # type: ignore[arg-type]
    runtime.release(2)
    thread.join()
    assert [asked for asked in in_python if asked[1]] == []
    assert runtime.close().open() == []

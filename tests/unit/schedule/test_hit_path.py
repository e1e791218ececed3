"""What C does of a pass is what the state machine does, and where it does nothing it has changed nothing."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drivers import NativeDriver
from support.explorer import Program, RecordingDriver, RecordingIssuer, rotating
from support.groups import add_layers, fill_shards, join, same_bytes
from support.hits import CONFIG, MODEL, run_pass

from vmm_dwdp import ConfigError, DWDPRuntime, StateError
from vmm_dwdp.allocator.driver import StreamId
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.schedule.issue import InlineIssuer
from vmm_dwdp.schedule.layer import StagedLayer
from vmm_dwdp.schedule.staging import Staging

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="there is no C here")


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
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, HostDriver(4096))
    yield runtime
    assert runtime.close().open() == []


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

    for layer in (0, 1):  # both are there, so that only the next copies are held up
        runtime.acquire(layer)
    driver.copy = held_up  # type: ignore[method-assign]
    runtime.release(0)  # layer 2 is to be copied
    assert copying.wait(60)
    driver.copy = copy  # type: ignore[method-assign]
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


def test_who_waits_for_copies_while_another_thread_closes_is_told(tmp_path: Path) -> None:
    driver = NativeDriver()
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL, driver)
    copying, closing = threading.Event(), threading.Event()
    copy = driver.copy

    def held_up(*arguments: Any) -> None:
        copying.set()
        assert closing.wait(60)
        copy(*arguments)

    told: list[BaseException] = []

    def passes() -> None:
        for layer in (0, 1):
            runtime.acquire(layer)
        driver.copy = held_up  # type: ignore[method-assign]
        runtime.release(0)
        assert copying.wait(60)
        driver.copy = copy  # type: ignore[method-assign]
        runtime.release(1)
        ready.set()
        try:
            runtime.acquire(2)
        except StateError as error:
            told.append(error)

    ready = threading.Event()
    thread = threading.Thread(target=passes)
    thread.start()
    assert ready.wait(60)
    assert runtime._schedule._staging is not None
    issuer = runtime._schedule._staging.pipeline.issuer
    close = issuer.close

    def closes() -> None:
        closing.set()
        thread.join()  # before any event is gone
        close()

    issuer.close = closes  # type: ignore[method-assign]
    assert runtime.close().open() == []
    assert ["closed" in str(error) for error in told] == [True]

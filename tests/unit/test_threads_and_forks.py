"""Whose turn it is: passes of several threads, what other threads may ask meanwhile, and a child that was forked."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, add_layers, check_pass, in_threads, join, random_model, same_bytes

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

MODEL = random_model({number: {"w": ((8, 300), torch.float32)} for number in range(5)})
ALONE = DWDPConfig(group_size=1, host_experts=8)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    with join(ALONE, 0, tmp_path / "rendezvous", MODEL) as runtime:
        yield runtime
    assert runtime.ledger.open() == []


def in_another_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize(
    "call",
    [
        lambda runtime: runtime.acquire(1),
        lambda runtime: runtime.release(0),
        lambda runtime: runtime.reset(),
        lambda runtime: runtime.update({}),
        lambda runtime: runtime.check_integrity(),
        lambda runtime: runtime.tensor_list(0, "w"),
    ],
)
@pytest.mark.parametrize("acquired", [True, False])
def test_another_thread_is_refused_in_the_middle_of_a_pass(
    runtime: DWDPRuntime, call: Callable[[DWDPRuntime], object], acquired: bool
) -> None:
    weights = runtime.acquire(0)
    if not acquired:
        runtime.release(0)
    with pytest.raises(StateError, match=r"in the middle of a pass of thread 'MainThread'"):
        in_another_thread(lambda: call(runtime))
    if acquired:
        assert same_bytes(weights["w"], MODEL[0]["w"])
        runtime.release(0)
    for number in list(MODEL)[1:]:
        with runtime.layer(number) as weights:
            assert same_bytes(weights["w"], MODEL[number]["w"])
    in_another_thread(lambda: check_pass(runtime, MODEL))  # the pass is over: any thread may begin the next one
    check_pass(runtime, MODEL)


def test_a_pass_in_place_ends_with_its_last_layer(tmp_path: Path) -> None:
    """No call of C ends it, as it does a staged one."""
    config = DWDPConfig(group_size=1, host_experts=8, mode="in_place")
    with join(config, 0, tmp_path / "rendezvous", MODEL) as runtime:
        check_pass(runtime, MODEL)
        in_another_thread(lambda: check_pass(runtime, MODEL))
        in_another_thread(lambda: check_pass(runtime, MODEL, mode="staged"))
        check_pass(runtime, MODEL)


def test_what_is_refused_begins_no_pass(runtime: DWDPRuntime) -> None:
    with pytest.raises(Exception, match="there is no layer 99"):
        runtime.acquire(99)
    in_another_thread(lambda: check_pass(runtime, MODEL))


def test_the_pass_of_a_thread_that_has_ended_has_ended_too(runtime: DWDPRuntime) -> None:
    in_another_thread(lambda: runtime.acquire(2) and None)
    runtime.reset()
    check_pass(runtime, MODEL)


def test_a_pass_that_is_given_up_leaves_the_turn_to_others(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    runtime.reset()
    in_another_thread(lambda: check_pass(runtime, MODEL))


def test_threads_on_one_runtime_read_right_bytes_or_a_sentence(runtime: DWDPRuntime) -> None:
    told: Counter[str] = Counter()

    def passes(_: int) -> None:
        for _ in range(100):
            for number, tensors in MODEL.items():
                try:
                    weights = runtime.acquire(number)
                except StateError as error:
                    told["refused" if "in the middle of a pass" in str(error) else str(error)] += 1
                    break
                told["right" if same_bytes(weights["w"], tensors["w"]) else "wrong"] += 1
                runtime.release(number)

    in_threads(passes, 3)
    assert set(told) <= {"right", "refused"}
    assert told["right"] >= 100 * len(MODEL)
    assert told["right"] % len(MODEL) == 0
    check_pass(runtime, MODEL)


class AsksInOneThread(HostDriver):
    """Looks at events in the thread of the passes alone: any other would break a capture of that thread's."""

    runs_passes = threading.get_ident()

    def complete(self, event: int) -> bool:
        assert threading.get_ident() == self.runs_passes
        return super().complete(event)

    def elapsed(self, start: int, end: int) -> float:
        assert threading.get_ident() == self.runs_passes
        return super().elapsed(start, end)


@pytest.mark.parametrize("mode", ["staged", "auto"])
def test_statistics_are_told_to_any_thread_at_any_moment(tmp_path: Path, mode: str) -> None:
    config = DWDPConfig(group_size=1, host_experts=8, mode=mode)
    driver = AsksInOneThread(PAGE)
    runtime = join(config, 0, tmp_path / "rendezvous", MODEL, driver)
    over = threading.Event()

    def watch() -> int:
        asked = 0
        while not over.is_set():
            asked += 1
            assert set(runtime.stats().layers) == set(MODEL)
        return asked

    def one_pass(tokens: int) -> None:
        for number in MODEL:
            runtime.acquire(number, tokens=tokens, top_k=2)
            runtime.release(number)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(watch)
        try:
            for tokens in range(1, 200):
                one_pass(tokens)
        finally:
            over.set()
        assert asked.result() > 0
    before = runtime.stats()
    assert runtime.close().open() == []
    after = runtime.stats()
    assert after.layers == before.layers
    assert in_another_thread(runtime.stats) == after


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2)
    runtime, other = in_threads(lambda rank: join(config, rank, tmp_path / "group", MODEL), 2)
    told, tell = os.pipe()
    go_on, say_so = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was refused"
        try:
            runtime.acquire(0)
        except StateError as error:
            said = str(error)
        try:
            runtime.close()
            runtime.stats()
            del runtime
        except BaseException as error:
            said = repr(error)
        os.write(tell, said.encode())
        os.close(say_so)
        os.read(go_on, 1)
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as said:
        assert os.read(said.fileno(), 1000).decode().startswith("the runtime belongs to the process")
    for each in runtime, other:
        check_pass(each, MODEL)
    assert other.peers() == {0: True}
    assert runtime.close().open() == []
    assert other.peers() == {0: False}, "the child's copy of the socket still answers"
    assert other.close().open() == []
    os.close(say_so)
    assert os.waitpid(child, 0)[1] == 0


class Slow(HostDriver):
    """Another thread waits in the middle of a call, once it is told to."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.waits, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def record(self, event: int, stream: int, *, external: bool = False) -> None:
        if not self.goes_on.is_set():
            self.waits.set()
            self.goes_on.wait()
        super().record(event, stream, external=external)


@pytest.mark.timeout(60)
def test_a_child_that_is_forked_in_the_middle_of_another_threads_call(tmp_path: Path) -> None:
    driver = Slow()
    runtime = join(ALONE, 0, tmp_path / "group", MODEL, driver)

    def acquire_and_release() -> None:
        with runtime.layer(0):
            pass

    driver.goes_on.clear()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(acquire_and_release)
        assert driver.waits.wait(20)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                runtime.acquire(0)
            except StateError:
                runtime.close()
                os._exit(0)
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        driver.goes_on.set()
        call.result()
    assert status == 0, "the child ended by a signal: it has waited for what nobody there lets go of"
    assert runtime.close().open() == []


def test_a_child_does_not_stand_for_its_parent_that_has_died(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2)
    told, tell = os.pipe()
    go_on, say_so = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            os.close(say_so)
            runtime = join(config, 0, tmp_path / "group", MODEL)
            if os.fork() == 0:
                os.write(tell, b"here")
            os.read(go_on, 1)  # until the test is over
            del runtime
        finally:
            os._exit(0)
    os.close(tell)
    other = join(config, 1, tmp_path / "group", MODEL)
    assert os.read(told, 4) == b"here"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    again = DWDPRuntime(config, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE))
    add_layers(again, MODEL)
    again.rejoin()
    for each in other, again:
        check_pass(each, MODEL)
        assert each.close().open() == []
    for descriptor in (say_so, go_on, told):
        os.close(descriptor)

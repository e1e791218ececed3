"""The thread that gives copies to the driver without the interpreter, compiled here, with functions of our own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import random
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forks import in_child
from support.native import compiled, loaded

from vmm_dwdp.allocator.native import HAS_NATIVE

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

_POINTER, _UNSIGNED, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER)
_EVENT = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _UNSIGNED)
_BATCH = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER)
Batch = tuple[int, int, int, int, int, int, int]
Lane = tuple[int, int, tuple[Batch, ...], int]


class Refused(Exception):
    pass


def test_installation_compiles_it() -> None:
    try:
        importlib.metadata.distribution("vmm-dwdp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed: these are its files")
    assert HAS_NATIVE


@pytest.fixture(scope="session", params=["looks for work", "has to be woken"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Whose threads look for work by themselves at first, as they are, or sleep at once until they are woken."""
    options = ["-DLINGER_NS=0"] if request.param == "has to be woken" else []
    return loaded(compiled(tmp_path_factory.mktemp("native"), *options))


class Calls:
    """Functions that write down what they are called with, and refuse what `refuse` says."""

    def __init__(self, refuse: Callable[[tuple[Any, ...]], int] = lambda call: 0) -> None:
        self.made: list[tuple[Any, ...]] = []
        self._refuse = refuse
        self._functions = (
            _CONTEXT(lambda context: self._call("context", context)),
            _EVENT(lambda stream, event, flags: self._call("wait", stream, event, flags)),
            _BATCH(lambda *arguments: self._call("copy", *arguments)),
            _EVENT(lambda event, stream, flags: self._call("record", event, stream, flags)),
        )

    def _call(self, *call: Any) -> int:
        self.made.append(call)
        return self._refuse(call)

    def issuer(self, native: ModuleType) -> Any:
        addresses = [ctypes.cast(function, _POINTER).value for function in self._functions]
        return native.Issuer(*addresses, 99, Refused)


def stated(lanes: tuple[Lane, ...]) -> list[tuple[Any, ...]]:
    """The calls that give ``lanes`` to the driver."""
    calls: list[tuple[Any, ...]] = []
    for stream, after, batches, then in lanes:
        calls += [("wait", stream, after, 0), *(("copy", *batch, stream) for batch in batches)]
        calls.append(("record", then, stream, 0))
    return calls


numbers = st.integers(1, 2**63)
sizes = st.integers(1, 2**31)
batches = st.tuples(numbers, numbers, numbers, sizes, numbers, numbers, sizes)
lanes = st.tuples(numbers, numbers, st.lists(batches, max_size=3).map(tuple), numbers)
jobs = st.lists(st.lists(lanes, max_size=3).map(tuple), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(jobs, st.lists(st.integers(0, 3), max_size=8))
def test_lanes_are_given_in_the_order_of_submission(native: ModuleType, jobs: list[Any], order: list[int]) -> None:
    calls = Calls()
    issuer = calls.issuer(native)
    made = [issuer.job(lanes, None) for lanes in jobs]
    expected: list[tuple[Any, ...]] = [("context", 99)]
    for number in order:
        job, lanes = made[number % len(made)], jobs[number % len(made)]
        job.result()  # the time before is over
        issuer.submit(job)
        expected += stated(lanes)
    issuer.close()
    assert calls.made == expected
    assert all(made[number % len(made)].done for number in order)


LANES: tuple[Lane, ...] = (
    (10, 20, ((1, 2, 3, 4, 5, 6, 1), (7, 8, 9, 4, 5, 6, 1)), 30),
    (11, 20, ((1, 2, 3, 4, 5, 6, 1),), 31),
)
NAMES = {"wait": "cuStreamWaitEvent", "copy": "cuMemcpyBatchAsync", "record": "cuEventRecordWithFlags"}


@pytest.mark.parametrize("number", range(len(stated(LANES))))
def test_what_a_call_refused_is_told_and_nothing_is_given_after_it(native: ModuleType, number: int) -> None:
    refusing = True
    calls = Calls(lambda call: 7 if refusing and call == stated(LANES)[number] and len(calls.made) == number + 2 else 0)
    issuer = calls.issuer(native)
    job, other = issuer.job(LANES, None), issuer.job(LANES[1:], None)
    issuer.submit(job)
    issuer.submit(other)
    with pytest.raises(Refused) as refused:
        job.result()
    assert refused.value.args == (NAMES[stated(LANES)[number][0]], 7)
    assert not job.done
    other.result()
    refusing = False
    issuer.submit(job)
    job.result()
    assert job.done
    issuer.close()
    assert calls.made[1:] == [*stated(LANES)[: number + 1], *stated(LANES[1:]), *stated(LANES)]


def test_submit_does_not_wait(native: ModuleType) -> None:
    gate = threading.Event()
    calls = Calls(lambda call: int(call[0] == "wait" and not gate.wait(30)))
    issuer = calls.issuer(native)
    job = issuer.job(LANES, None)
    issuer.submit(job)
    assert not job.done
    with pytest.raises(RuntimeError, match="submitted already"):
        issuer.submit(job)
    gate.set()  # reached although the job cannot end without it
    job.result()
    issuer.close()


def test_it_needs_no_interpreter(native: ModuleType) -> None:
    keeps_the_lock = ctypes.PyDLL(None)
    semaphore = ctypes.create_string_buffer(64)
    assert keeps_the_lock.sem_init(semaphore, 0, 0) == 0
    nothing = ctypes.cast(keeps_the_lock.sched_yield, _POINTER).value  # returns 0
    post = ctypes.cast(keeps_the_lock.sem_post, _POINTER).value
    issuer = native.Issuer(nothing, nothing, nothing, post, 0, Refused)
    job = issuer.job(((1, 2, (), ctypes.addressof(semaphore)),), None)
    deadline = (ctypes.c_long * 2)(int(time.time()) + 60)
    for _ in range(100):
        issuer.submit(job)
        assert keeps_the_lock.sem_timedwait(semaphore, deadline) == 0  # which holds the interpreter's lock
        job.result()
    issuer.close()


@pytest.mark.parametrize("native", ["has to be woken"], indirect=True)
def test_no_job_is_lost_while_the_thread_falls_asleep(native: ModuleType) -> None:
    nothing = ctypes.cast(ctypes.CDLL(None).sched_yield, _POINTER).value  # returns 0
    issuer = native.Issuer(nothing, nothing, nothing, nothing, 0, Refused)
    job = issuer.job(((1, 2, (), 3),), None)
    chance = random.Random(0)
    for _ in range(20_000):
        issuer.submit(job)
        deadline = time.monotonic() + 60
        while not job.done:  # looked for and not waited for, to be there when the thread is about to sleep
            assert time.monotonic() < deadline, "the job is never done"
        for _ in range(chance.randrange(30)):
            pass
    issuer.close()


def test_a_thread_that_cannot_use_the_context_is_not_left_behind(native: ModuleType) -> None:
    with pytest.raises(Refused, match="201"):
        Calls(lambda call: 201).issuer(native)


def test_jobs_and_issuers_may_go_in_any_order(native: ModuleType) -> None:
    for _ in range(50):
        calls = Calls()
        issuer = calls.issuer(native)
        made = [issuer.job(LANES, None) for _ in range(5)]
        for job in made:
            issuer.submit(job)
        del issuer, job, made  # each waits for what is under way
        assert len(calls.made) == 1 + 5 * len(stated(LANES))


def test_bad_arguments_are_refused(native: ModuleType) -> None:
    issuer = Calls().issuer(native)
    for lanes in (5, ((1, 2),), ((1, 2, ((1, 2),), 3),), ((1, 2, "ab", 3),)):
        with pytest.raises(TypeError):
            issuer.job(lanes, None)
    with pytest.raises(TypeError, match="not a job"):
        issuer.submit(object())
    issuer.close()
    issuer.close()
    with pytest.raises(RuntimeError, match="closed"):
        issuer.submit(issuer.job(LANES, None))


def test_what_lanes_point_into_is_kept(native: ModuleType) -> None:
    class Kept:
        gone = False

        def __del__(self) -> None:
            Kept.gone = True

    issuer = Calls().issuer(native)
    job = issuer.job(LANES, Kept())
    assert not Kept.gone
    issuer.submit(job)
    del job
    assert Kept.gone
    issuer.close()


def test_flush_waits_for_all_that_was_submitted_and_raises_nothing(native: ModuleType) -> None:
    gate = threading.Event()
    calls = Calls(lambda call: int(call[0] == "wait" and not gate.wait(30)) or 7 * (call == stated(LANES[1:])[1]))
    issuer = calls.issuer(native)
    issuer.flush()
    jobs = [issuer.job(lanes, None) for lanes in (LANES[:1], LANES[1:], LANES[:1])]
    for job in jobs:
        issuer.submit(job)
    order: list[object] = []

    def flush() -> None:
        issuer.flush()
        order.append(list(calls.made[1:]))

    thread = threading.Thread(target=flush)
    thread.start()
    gate.set()
    thread.join(60)
    assert order == [[*stated(LANES[:1]), *stated(LANES[1:])[:2], *stated(LANES[:1])]]
    assert [job.done for job in jobs] == [True, False, True]
    issuer.close()
    issuer.flush()


def test_a_job_tells_of_its_latest_submission_as_often_as_it_is_asked(native: ModuleType) -> None:
    refusing = False
    issuer = Calls(lambda call: 7 * (refusing and call[0] == "copy")).issuer(native)
    job = issuer.job(LANES, None)
    for _ in range(2):
        job.result()  # which has nothing to wait for
        assert not job.done
    for refusing in (True, False, True):
        issuer.submit(job)
        for _ in range(3):
            with pytest.raises(Refused) if refusing else contextlib.nullcontext():
                job.result()
            assert job.done != refusing
    issuer.close()
    with pytest.raises(Refused):
        job.result()


class Semaphore:
    """Whose functions need no interpreter, so that the thread that calls them is soon where they were called from."""

    libc: ClassVar[ctypes.PyDLL] = ctypes.PyDLL(None)

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(64)
        self.at = ctypes.addressof(self._memory)
        assert self.libc.sem_init(self._memory, 0, 0) == 0

    def value(self) -> int:
        value = ctypes.c_int()
        assert self.libc.sem_getvalue(self._memory, ctypes.byref(value)) == 0
        return value.value


@pytest.fixture(scope="module")
def pausing(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Whose threads pause for hours between two batches, if they are let."""
    return loaded(compiled(tmp_path_factory.mktemp("pausing"), "-DPAUSE=INT64_C(10000000000)"))


def native_thread_sleeps() -> bool:
    states = []
    for task in Path("/proc/self/task").iterdir():
        name, rest = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        states += [rest.split()[0]] if name == "vmm-dwdp-issue" else []
    return states == ["S"]


CUTS: dict[str, Callable[[Any, list[Any]], object]] = {
    "result": lambda issuer, jobs: jobs[0].result(),
    "result of the next": lambda issuer, jobs: jobs[1].result(),
    "flush": lambda issuer, jobs: issuer.flush(),
    "close": lambda issuer, jobs: issuer.close(),
    "the job goes": lambda issuer, jobs: jobs.clear(),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_pause_ends_when_somebody_begins_to_wait(pausing: ModuleType, cut: str) -> None:
    given = Semaphore()
    succeed, post = (
        ctypes.cast(function, _POINTER).value for function in (given.libc.sched_yield, given.libc.sem_post)
    )
    issuer = pausing.Issuer(succeed, succeed, post, succeed, 0, Refused)
    batch = (given.at, 0, 0, 1, 0, 0, 1)
    jobs = [issuer.job(((0, 0, (batch,) * count, 0),), None) for count in (4, 1)]
    for job in jobs:
        issuer.submit(job)
    del job
    while not (given.value() and native_thread_sleeps()):
        pass
    assert given.value() == 1, "it pauses after the first batch"
    waiting = threading.Thread(target=CUTS[cut], args=(issuer, jobs), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive(), "the pause went on"
    issuer.close()
    assert given.value() == 5


def test_a_child_of_fork_waits_for_nothing(native: ModuleType) -> None:
    gate = Semaphore()
    succeed, take = (ctypes.cast(function, _POINTER).value for function in (gate.libc.sched_yield, gate.libc.sem_wait))
    issuer = native.Issuer(succeed, succeed, take, succeed, 0, Refused)
    jobs = [issuer.job(((0, 0, ((gate.at, 0, 0, 1, 0, 0, 1),), 0),), None) for _ in range(3)]
    for job in jobs[:2]:
        issuer.submit(job)

    def work() -> None:
        nonlocal issuer, job
        for call in (jobs[0].result, jobs[2].result, partial(issuer.submit, jobs[2]), partial(issuer.submit, jobs[0])):
            with pytest.raises(RuntimeError, match="of the process that this one was forked from"):
                call()
        assert not jobs[0].done
        issuer.flush()
        issuer.close()
        in_child(jobs.clear)  # of its own, too
        jobs.clear()
        del job, issuer
        calls = Calls()
        own = calls.issuer(native)  # which it can have
        again = own.job(LANES, None)
        own.submit(again)
        again.result()
        own.close()
        assert calls.made[1:] == stated(LANES)

    in_child(work)
    for _ in jobs:
        gate.libc.sem_post(ctypes.c_void_p(gate.at))
    issuer.submit(jobs[2])
    for job in jobs:
        job.result()
    issuer.close()

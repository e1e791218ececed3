"""The thread that gives copies to the driver without the interpreter, compiled here, with functions of our own."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_dwdp import allocator

SOURCE = Path(__file__).parents[2] / "allocator/_issue.c"
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
    assert allocator.HAS_NATIVE_THREAD


def compiled(folder: Path, *options: str) -> Path:
    library = folder / "_issue.so"
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    include = sysconfig.get_path("include")
    command = ["cc", "-O1", *strict, *options, "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session", params=["looks for work", "has to be woken"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Whose threads look for work by themselves at first, as they are, or sleep at once until they are woken."""
    options = ["-DLINGER_NS=0"] if request.param == "has to be woken" else []
    return loaded(compiled(tmp_path_factory.mktemp("native"), *options))


def loaded(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_issue", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


STRESS = """
import ctypes, random, sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("_issue", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
libc = ctypes.CDLL(None)
succeed, compare = (ctypes.cast(function, ctypes.c_void_p).value for function in (libc.sched_yield, libc.memcmp))
random.seed(0)
same, other = (ctypes.create_string_buffer(text) for text in (b"same", b"else"))
one, two = ctypes.addressof(same), ctypes.addressof(other)
given, refused = (one, one, 4, 1, 0, 0, 1), (one, two, 4, 1, 0, 0, 1)  # the driver's call is memcmp(dsts, srcs, sizes)

class Refused(Exception):
    pass

def made(issuer):
    lanes = range(random.randrange(4))
    batches = [tuple(random.choices([given, refused], [9, 1], k=random.randrange(4))) for _ in lanes]
    return issuer.job(tuple((1, 2, each, 3) for each in batches), [refused in each for each in batches])

failures = 0
for turn in range(20):
    issuer = native.Issuer(succeed, succeed, compare, succeed, 1, Refused)
    jobs = [made(issuer) for _ in range(5)]
    for _ in range(200):
        job = random.choice(jobs)
        try:
            if not job.done:
                job.result()
        except Refused:
            failures += 1
        issuer.submit(job)
        if random.random() < 0.1:  # whatever it is at
            jobs.remove(job)
            jobs.append(made(issuer))
            del job
    if turn % 2:
        issuer.close()
print(failures > 100)
"""


@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_sanitizers_find_nothing_while_jobs_and_issuers_come_and_go(sanitizer: str, tmp_path: Path) -> None:
    runtime = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}[sanitizer]
    found = subprocess.run(
        ["cc", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {runtime}")
    library = compiled(tmp_path, "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, "-c", STRESS, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel places memory where this compiler's sanitizer cannot watch it")
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr

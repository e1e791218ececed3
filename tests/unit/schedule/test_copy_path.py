"""Who issues copies, what is said of it, the timing of waits, and the warning that prefetching does not pay."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.groups import PAGE, check_pass, in_threads, join, published, random_model, same_bytes

from vmm_dwdp import DriverError, DWDPConfig
from vmm_dwdp.allocator.driver import Copy, Lane, LinesAt
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_context import HostContext
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.observe.guard import PASSES, Guard
from vmm_dwdp.observe.timing import EVERY, FIRST, PassTimer, PassTimes
from vmm_dwdp.schedule.issue import InlineIssuer, Issuer, ThreadIssuer, open_issuer

MODEL = random_model({number: {"w": ((8, 3000), torch.float32)} for number in range(3)})


# -- issuers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thread", [False, True])
def test_jobs_run_in_order_and_a_failure_is_told_to_whoever_asks(thread: bool, ledger: Ledger) -> None:
    issuer: Issuer = ThreadIssuer(HostDriver(PAGE), ledger) if thread else InlineIssuer()
    ran: list[int] = []

    def fail() -> None:
        raise DriverError("copy", "INJECTED", "test")

    tickets = [issuer.submit(issuer.job(partial(ran.append, n), [])) for n in range(50)]
    failed = issuer.submit(issuer.job(fail, []))
    after = issuer.submit(issuer.job(partial(ran.append, 50), []))
    for ticket in [*tickets, after]:
        ticket.result()
    assert ran == list(range(51))
    with pytest.raises(DriverError, match="INJECTED"):
        failed.result()
    again = issuer.job(partial(ran.append, 51), [])
    for _ in range(2):
        issuer.submit(again).result()
        assert again.done
    assert ran[-2:] == [51, 51]
    issuer.close()
    issuer.close()


def test_the_launching_thread_does_not_wait_for_jobs(ledger: Ledger) -> None:
    issuer = ThreadIssuer(HostDriver(PAGE), ledger)
    gate = threading.Event()
    ticket = issuer.submit(issuer.job(lambda: assert_true(gate.wait(10)), []))
    gate.set()  # reached although the job cannot end without it
    ticket.result()
    issuer.close()


def test_flush_waits_for_all_that_was_submitted(ledger: Ledger) -> None:
    """However it ends."""
    issuer = ThreadIssuer(HostDriver(PAGE), ledger)
    gate = threading.Event()
    ran: list[int] = []

    def fail() -> None:
        raise DriverError("copy", "INJECTED", "test")

    for work in (lambda: assert_true(gate.wait(10)), fail, *(partial(ran.append, n) for n in range(1000))):
        issuer.submit(issuer.job(work, []))
    gate.set()
    issuer.flush()
    assert len(ran) == 1000
    issuer.close()


def assert_true(value: bool) -> None:
    assert value


def test_a_thread_that_cannot_use_the_driver_is_not_left_behind(ledger: Ledger) -> None:
    class Refusing(HostDriver):
        def current(self) -> HostContext:
            if threading.current_thread() is not threading.main_thread():
                raise DriverError("current", "INJECTED", "test")
            return super().current()

    with pytest.raises(DriverError, match="INJECTED"):
        ThreadIssuer(Refusing(PAGE), ledger)


@pytest.mark.parametrize(("num_copies", "by"), [(0, "launching thread"), (12, "launching thread"), (400, "thread")])
def test_few_copies_are_not_worth_waking_a_thread_of_pythons(num_copies: int, by: str, ledger: Ledger) -> None:
    issuer = open_issuer(HostDriver(PAGE), ledger, num_copies)
    assert issuer.issued_by == by
    issuer.close()


class WithThread(HostDriver):
    """Has a thread that gives lanes to it: here the one that submits them."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.threads: list[FakeThread] = []

    def issuing_thread(self, lines: LinesAt | None = None) -> FakeThread | None:
        self.threads.append(FakeThread(self))
        return self.threads[-1]


class FakeThread:
    def __init__(self, driver: HostDriver) -> None:
        self._driver = driver
        self.submitted: list[FakeJob] = []
        self.closed = 0
        self.native_id = -1  # there is none
        self.choosing = SimpleNamespace(whole=False, seconds_per_byte=0.0)

    def job(self, lanes: Sequence[Lane]) -> FakeJob:
        return FakeJob(lanes)

    def submit(self, job: FakeJob) -> None:
        self.submitted.append(job)
        job.error = None
        try:
            for lane in job.lanes:
                self._driver.wait(lane.stream, lane.after)
                self._driver.copy(lane.copies, lane.stream)
                self._driver.record(lane.then, lane.stream)
        except DriverError as error:
            job.error = error

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class FakeJob:
    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.error: DriverError | None = None

    @property
    def done(self) -> bool:
        return self.error is None

    def result(self) -> None:
        if self.error is not None:
            raise self.error


def test_a_thread_of_the_drivers_gives_any_number_of_copies(ledger: Ledger) -> None:
    driver = WithThread()
    assert open_issuer(driver, ledger, 0).issued_by == "launching thread"
    assert not driver.threads
    issuer = open_issuer(driver, ledger, 1)
    assert issuer.issued_by == "native thread"
    assert ledger.counts()["threads"] == 1
    first, second = (issuer.job(pytest.fail, []) for _ in range(2))
    assert [issuer.submit(job) for job in (first, second, first)] == [first, second, first]
    assert driver.threads[0].submitted == [first, second, first]
    issuer.close()
    issuer.close()
    assert driver.threads[0].closed == 1


class Failing(WithThread):
    """Refuses the copies whose turn it is."""

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self.calls_to_refusal = 0
        self._native = native

    def issuing_thread(self, lines: LinesAt | None = None) -> FakeThread | None:
        return super().issuing_thread(lines) if self._native else None

    def copy(self, prepared: Sequence[Copy], stream: int) -> None:
        self.calls_to_refusal -= 1
        if self.calls_to_refusal == 0:
            raise DriverError("copy", "INJECTED", "test")
        super().copy(prepared, stream)


@pytest.mark.parametrize(
    ("slice_bytes", "issued_by"),
    [("auto", "launching thread"), (1024, "thread"), ("auto", "native thread"), (1024, "native thread")],
)
@pytest.mark.parametrize("refused", [1, 2, 3, 4])
def test_a_copy_that_cannot_be_issued_is_told_at_acquire_which_may_be_repeated(
    tmp_path: Path, slice_bytes: int | str, issued_by: str, refused: int
) -> None:
    config = DWDPConfig(group_size=2, host_experts=3, slice_bytes=slice_bytes)  # two owners, who take turns
    drivers = [Failing(native=issued_by == "native thread"), HostDriver(PAGE)]
    runtime, other = in_threads(lambda rank: join(config, rank, tmp_path / "group", MODEL, drivers[rank]), 2)
    drivers[0].calls_to_refusal = refused
    path = runtime.stats().copy_path
    assert path is not None
    assert path.issued_by == issued_by
    failures = []
    for number in [*MODEL] * 3:
        try:
            weights = runtime.acquire(number)
        except DriverError as error:
            failures.append(error.code)
            weights = runtime.acquire(number)
        assert isinstance(weights["w"], torch.Tensor)
        assert same_bytes(weights["w"], MODEL[number]["w"])
        runtime.release(number)
    assert failures == ["INJECTED"]
    del weights
    assert [each.close().open() for each in (runtime, other)] == [[], []]


def test_while_a_trace_is_recorded_the_launching_thread_gives_the_copies(tmp_path: Path) -> None:
    driver = WithThread()
    runtime = join(DWDPConfig(group_size=1, host_experts=6), 0, tmp_path / "rendezvous", MODEL, driver)
    (thread,) = driver.threads
    check_pass(runtime, MODEL)
    submitted = len(thread.submitted)
    assert submitted == 2 + 2  # at publish, and in a pass: of three layers one has a slot of its own
    with runtime.trace() as trace:
        check_pass(runtime, MODEL)
    assert len(thread.submitted) == submitted
    assert len([span for span in trace.spans if span.track.startswith("copies from")]) == 2
    check_pass(runtime, MODEL)
    assert len(thread.submitted) == submitted + 2
    assert runtime.close().open() == []


def test_a_slot_whose_job_was_not_handed_over_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the job of a layer that is missed is submitted: nobody may take the slot for that layer's."""
    config = DWDPConfig(group_size=1, host_experts=6, prefetch_depth=1)
    with join(config, 0, tmp_path / "rendezvous", MODEL) as runtime:
        staging = runtime._schedule._staging
        assert staging is not None
        issuer, last = staging.pipeline.issuer, max(MODEL)
        submit, interrupted = issuer.submit, []

        def interrupt(job: object) -> object:
            if interrupted:
                return submit(job)
            interrupted.append(job)
            raise KeyboardInterrupt

        monkeypatch.setattr(issuer, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.acquire(last)
        assert [slot.holds for slot in staging.slots] == [None]
        runtime.reset()
        check_pass(runtime, MODEL)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_stats_tell_the_plan_and_why(tmp_path: Path) -> None:
    with published(DWDPConfig(group_size=3, slice_bytes="streams"), tmp_path / "streams", MODEL) as runtimes:
        path = runtimes[0].stats().copy_path
        assert path is not None
        assert (path.plan, path.num_streams, path.num_copies) == ("streams", 2, 2)
        assert path.issued_by == "launching thread"
        assert "few copies do not hold up kernel launches" in path.why
    with published(DWDPConfig(group_size=3), tmp_path / "runs", MODEL) as runtimes:
        path = runtimes[0].stats().copy_path
        assert path is not None
        assert (path.plan, path.num_streams, path.num_copies) == ("runs", 2, 2)
        assert path.issued_by == "thread"
        assert "from which fewest others do" in path.why
    pair = DWDPConfig(group_size=2, host_experts=2)
    with published(pair, tmp_path / "pair", MODEL) as runtimes:
        path = runtimes[0].stats().copy_path
        assert path is not None
        assert (path.plan, path.issued_by) == ("streams", "launching thread"), "each has one rank to pull from"
    with published(DWDPConfig(group_size=3, slice_bytes=1024), tmp_path / "slices", MODEL) as runtimes:
        path = runtimes[0].stats().copy_path
        assert path is not None
        assert (path.plan, path.num_streams, path.issued_by) == ("slices", 1, "thread")
        assert path.num_copies > 20
        assert path.why == "slice_bytes is 1024"


def test_one_owner_has_nobody_to_take_turns_with(tmp_path: Path) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=6, slice_bytes=1024), 0, tmp_path / "rendezvous", MODEL)
    path = runtime.stats().copy_path
    runtime.close()
    assert path is not None
    assert path.num_copies == 1


# -- timing ------------------------------------------------------------------------------------------------------------


class Clock(HostDriver):
    """Events have the time that the test sets, and are complete up to `past`."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.now = 0.0
        self.past = float("inf")
        self.times: dict[int, float] = {}

    def record(self, event: int, stream: int, *, external: bool = False) -> None:
        self.times[event] = self.now

    def complete(self, event: int) -> bool:
        return self.times.get(event, 0.0) <= self.past

    def elapsed(self, start: int, end: int) -> float:
        return self.times[end] - self.times[start]


def run_pass(timer: PassTimer, clock: Clock, wait_s: float, compute_s: float, num_layers: int = 3) -> None:
    timed = timer.begin()
    for layer in range(num_layers):
        if timed:
            timer.arrive(layer, 0)
        clock.now += wait_s
        if timed:
            timer.resume(layer, 0)
        clock.now += compute_s


def test_waits_are_added_up_and_a_whole_pass_is_told(ledger: Ledger) -> None:
    clock = Clock()
    with PassTimer(clock, ledger, 3) as timer:
        for _ in range(2):
            run_pass(timer, clock, wait_s=2.0, compute_s=5.0)
        assert timer.waited_s == [2.0] * 3, "the second pass is read when the third begins"
        assert timer.latest == PassTimes(total_s=14.0, waited_s=4.0)
        assert timer.read()
        assert timer.waited_s == [4.0] * 3


def test_a_pass_that_the_device_has_not_reached_is_left_untimed(ledger: Ledger) -> None:
    clock = Clock()
    with PassTimer(clock, ledger, 3) as timer:
        run_pass(timer, clock, wait_s=1.0, compute_s=1.0)
        clock.past = 0.0
        run_pass(timer, clock, wait_s=100.0, compute_s=1.0)
        clock.past = float("inf")
        run_pass(timer, clock, wait_s=3.0, compute_s=1.0)
        assert timer.read()
        assert timer.waited_s == [4.0] * 3


def test_after_the_first_passes_one_of_several_stands_for_all(ledger: Ledger) -> None:
    clock = Clock()
    with PassTimer(clock, ledger, 3) as timer:
        for _ in range(FIRST):
            run_pass(timer, clock, wait_s=1.0, compute_s=1.0)
        for number in range(3 * EVERY):
            recorded = dict(clock.times)
            run_pass(timer, clock, wait_s=2.0, compute_s=1.0)
            assert (clock.times != recorded) == (number % EVERY == 0)
        assert timer.read()
        assert timer.waited_s == [FIRST * 1.0 + 3 * EVERY * 2.0] * 3
        assert timer.latest == PassTimes(total_s=6.0, waited_s=4.0)


def test_a_pass_out_of_order_has_waits_and_no_total(ledger: Ledger) -> None:
    clock = Clock()
    with PassTimer(clock, ledger, 3) as timer:
        for layer in (2, 1, 1):
            timer.begin()
            timer.arrive(layer, 0)
            clock.now += 1.0
            timer.resume(layer, 0)
        assert timer.read()
        assert timer.waited_s == [0.0, 2.0, 1.0]
        assert timer.latest is None


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_the_guard_speaks_once_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    with caplog.at_level(logging.WARNING, "vmm_dwdp"):
        for _ in range(PASSES + 3):
            guard.observe(PassTimes(total_s=0.100, waited_s=0.080), tokens=500)
    assert guard.advice == (
        "prefetching does not pay with 500 tokens a pass: compute takes 20 ms and copies take 100 ms, of which 80% are "
        "waited for; with about 2500 compute would hide them"
    )
    assert [record.message for record in caplog.records] == [guard.advice]


def test_the_guard_waits_for_several_passes_in_a_row() -> None:
    guard = Guard()
    held_up, hidden = PassTimes(0.100, 0.080), PassTimes(0.100, 0.001)
    for times in [held_up] * (PASSES - 1) + [hidden]:
        guard.observe(PassTimes(times.total_s, times.waited_s), tokens=None)
    for _ in range(10):
        guard.observe(held_up, tokens=None)  # the same pass, seen again at each of its layers
    assert guard.advice is None
    for _ in range(PASSES - 1):
        guard.observe(PassTimes(0.100, 0.080), tokens=None)
    assert guard.advice is not None
    assert "with 5.0 times as many" in guard.advice

"""Who gives copies to the driver: a thread of the driver's, one of Python's, or the one that launches kernels.

Giving the driver thousands of slices takes milliseconds, which the launching thread does not have. A thread of the
driver's own needs no interpreter, and is best for any number of copies. Where there is none, a thread of Python's gives
many; few take the launching thread less time than it loses to such a thread, which has to be woken and then takes the
interpreter's lock, again and again, from a thread that launches kernels. Where runs are chosen one by one, somebody has
to wait for each: a thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol

from vmm_dwdp.allocator.driver import Choosing, Driver, IssuingThread, Lane, Ticket
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.numa import keep_near
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import DriverError, StateError
from vmm_dwdp.layout.copies import LayerPlan
from vmm_dwdp.memory.lines import SharedLines
from vmm_dwdp.observe.stats import CopyPath, IssuedBy
from vmm_dwdp.schedule.pulls import Puller

# Copies that the launching thread gives the driver itself rather than wake a thread of Python's: six take it 0.1 ms (on
# an H200's host); where a thread gave them, acquire, release and 60 kernels took 0.5 ms longer than the kernels alone
# (on an H100's). See docs/copy-path.md.
_FEW: Final = 32


@dataclass
class _Choosing:
    """See `Choosing`."""

    whole: bool = False
    seconds_per_byte: float = 0.0


class Job:
    """Work of Python's that an issuer runs, and how it ended: a `Ticket`.

    Args:
        work: gives the lanes whole.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.whole = False
        self.done = False
        self.work = work
        self._error: Exception | None = None

    def run(self) -> None:
        self._error = None
        try:
            self._give()
        except DriverError as error:
            # Without its traceback: the caller's frames in it would hold on to the caller's tensors.
            self._error = error.with_traceback(None)
        else:
            self.done = True

    def _give(self) -> None:
        self.work()

    def result(self) -> None:
        if self._error is not None:
            raise self._error


class _Awaited(Job):
    """Work that another thread runs; ``choosing`` gives the lanes run by run, if they have runs."""

    def __init__(self, work: Callable[[], None], choosing: Callable[[], None] | None = None) -> None:
        super().__init__(work)
        self._choosing = choosing or work
        self._chooses = True
        self._over = threading.Event()

    def _give(self) -> None:
        (self._choosing if self._chooses else self.work)()

    def submit(self, jobs: queue.SimpleQueue[_Awaited | None], *, whole: bool) -> None:
        self._chooses = not (whole or self.whole)
        self.done = False
        self._over.clear()
        jobs.put(self)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # for whoever asks: nobody else will see it
            self._error = error.with_traceback(None)
        finally:
            self._over.set()

    def result(self) -> None:
        self._over.wait()
        super().result()


class Issuer(Protocol):
    """Runs jobs one after another, in the order in which they were submitted.

    Attributes:
        choosing: of runs; who has no thread of the driver's does not know how long one takes.
    """

    issued_by: IssuedBy
    choosing: Choosing

    def job(self, work: Callable[[], None], lanes: Sequence[Lane]) -> Any:
        """What gives ``lanes`` to the driver, as ``work`` does. Made once, because the launching thread, which submits
        it at every layer, is to make nothing anew."""

    def submit(self, job: Any) -> Ticket:
        """Run what `job` made, which is not under way already. Where this is interrupted, it may have been handed over
        or not: `flush` before it is submitted again."""

    def flush(self) -> None:
        """Wait until nothing that was submitted is under way, however it ended."""

    def close(self) -> None:
        """Finish what was submitted. A second call does nothing."""

    def free(self) -> None:
        """After `close`: free what copies that were given have needed. The device is idle."""


def open_issuer(driver: Driver, ledger: Ledger, num_copies: int, lines: SharedLines | None = None) -> Issuer:
    """The one from which the launching thread has least to wait for, where a layer has ``num_copies``.

    ``lines``: by which runs are chosen, if they are.
    """
    if num_copies and (thread := driver.issuing_thread(None if lines is None else lines.at)) is not None:
        keep_near(thread.native_id, driver.numa_node)
        return NativeIssuer(thread, ledger)
    return ThreadIssuer(driver, ledger, lines) if num_copies > _FEW or lines is not None else InlineIssuer()


def copy_path(
    plan: LayerPlan, slice_bytes: int | Literal["auto", "streams"], issuer: Issuer, *, chooses: bool
) -> CopyPath:
    """How the copies of ``plan``, which has most, get to the driver; ``chooses``: run by run."""
    if isinstance(slice_bytes, int):
        why = f"slice_bytes is {slice_bytes}"
    elif chooses:
        why = "several ranks pull, and each takes its next run from the owner from which fewest others do"
    elif len(plan.streams) > 1:
        why = "long copies on a stream for each owner are few, and few copies do not hold up kernel launches"
    else:
        why = "there is one owner to copy from" if plan.streams else "nothing is remote"
    return CopyPath(
        plan="runs" if chooses else "slices" if isinstance(slice_bytes, int) else "streams",
        why=why,
        num_streams=len(plan.streams),
        num_copies=plan.num_copies,
        issued_by=issuer.issued_by,
    )


class InlineIssuer:
    """Runs each job in the thread that submits it."""

    issued_by: IssuedBy = "launching thread"

    def __init__(self) -> None:
        self.choosing: Choosing = _Choosing()

    def job(self, work: Callable[[], None], lanes: Sequence[Lane]) -> Job:
        return Job(work)

    def submit(self, job: Job) -> Ticket:
        job.done = False
        job.run()
        return job

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def free(self) -> None:
        pass


class ThreadIssuer:
    """Runs jobs in a thread of its own, which the ledger counts."""

    issued_by: IssuedBy = "thread"

    def __init__(self, driver: Driver, ledger: Ledger, lines: SharedLines | None = None) -> None:
        self.choosing: Choosing = _Choosing()
        self._ledger = ledger
        self._puller = None if lines is None else Puller(driver, ledger, lines)
        self._jobs: queue.SimpleQueue[_Awaited | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vmm-dwdp-issue", daemon=True)
        self._thread.start()
        self._token: int | None = ledger.add("threads", _LABEL)
        try:
            assert self._thread.native_id is not None
            keep_near(self._thread.native_id, driver.numa_node)
            self._run_now(lambda: driver.current().__enter__())  # for the life of the thread
            if lines is not None:
                self._run_now(driver.ignore_captures)  # it asks events while others may capture
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        for job in iter(self._jobs.get, None):
            job.run()

    def job(self, work: Callable[[], None], lanes: Sequence[Lane]) -> _Awaited:
        if self._puller is None or not any(lane.runs for lane in lanes):
            return _Awaited(work)
        return _Awaited(work, partial(self._puller.give, lanes))

    def submit(self, job: _Awaited) -> Ticket:
        job.submit(self._jobs, whole=self.choosing.whole)
        if self._token is None:  # closed, below a signal's handler perhaps: nobody will run it
            raise StateError("the runtime is closed")
        return job

    def flush(self) -> None:
        self._run_now(lambda: None)

    def _run_now(self, work: Callable[[], None]) -> None:
        """Run ``work`` after all that was submitted, and wait for it."""
        self.submit(_Awaited(work)).result()

    def close(self) -> None:
        if self._token is not None:
            self._jobs.put(None)
            self._thread.join()
            with uninterrupted():
                self._ledger.remove(self._token)
                self._token = None

    def free(self) -> None:
        if self._puller is not None:
            self._puller.close()


class NativeIssuer:
    """Has the lanes of jobs given by a thread that needs no interpreter, which the ledger counts."""

    issued_by: IssuedBy = "native thread"

    def __init__(self, thread: IssuingThread, ledger: Ledger) -> None:
        """Takes over ``thread``."""
        self.choosing = thread.choosing
        self._thread = thread
        self._ledger = ledger
        self._token: int | None = ledger.add("threads", _LABEL)

    def job(self, work: Callable[[], None], lanes: Sequence[Lane]) -> Ticket:
        return self._thread.job(lanes)

    def submit(self, job: Ticket) -> Ticket:
        try:
            self._thread.submit(job)
        except RuntimeError as error:
            if self._token is None:
                raise StateError("the runtime is closed") from error
            raise
        return job

    def flush(self) -> None:
        self._thread.flush()

    def close(self) -> None:
        if self._token is not None:
            self._thread.close()
            with uninterrupted():
                self._ledger.remove(self._token)
                self._token = None

    def free(self) -> None:
        pass


_LABEL: Final = "the thread that issues copies"

"""Who gives copies to the driver: the thread that launches kernels, or one of our own.

Giving the driver thousands of slices takes milliseconds, which the launching thread does not have; giving it a few
copies takes less time than it loses to another thread, which has to be woken and then takes the interpreter's lock,
again and again, from a thread that launches kernels.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final, Protocol

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger

# Copies that the launching thread gives the driver itself: six take it 0.1 ms (on an H200's host); where a thread gave
# them, acquire, release and 60 kernels took 0.5 ms longer than the kernels alone (on an H100's). See docs/copy-path.md.
_FEW: Final = 32


class Ticket(Protocol):
    """A job that was submitted.

    Attributes:
        done: whether the driver has been given everything: then `result` has nothing to wait for and nothing to raise.
    """

    done: bool

    def result(self) -> None:
        """Wait until the driver has been given everything, and raise what it raised."""


class Job:
    """Work that is submitted again and again, each time after the time before is over, and how it ended: a `Ticket`.

    Made once, because the launching thread, which submits it at every layer, is to make nothing anew.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.done = False
        self.running = threading.Lock()  # held from `submit` until the work is over
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self.work()
            self._error = None
            self.done = True
        except Exception as error:
            # Without its traceback: the caller's frames in it would hold on to the caller's tensors.
            self._error = error.with_traceback(None)
        finally:
            self.running.release()

    def result(self) -> None:
        with self.running:
            if self._error is not None:
                raise self._error


class Issuer(Protocol):
    """Runs jobs one after another, in the order in which they were submitted."""

    def submit(self, job: Job) -> Ticket: ...

    def close(self) -> None:
        """Finish what was submitted. A second call does nothing."""


def pays_to_wake_a_thread(num_copies: int) -> bool:
    """Whether the launching thread gets on sooner if another thread gives the driver a layer's ``num_copies``."""
    return num_copies > _FEW


class InlineIssuer:
    """Runs each job in the thread that submits it."""

    def submit(self, job: Job) -> Ticket:
        job.done = False
        job.running.acquire()
        job.run()
        return job

    def close(self) -> None:
        pass


class ThreadIssuer:
    """Runs jobs in a thread of its own, which the ledger counts."""

    def __init__(self, driver: Driver, ledger: Ledger) -> None:
        self._ledger = ledger
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vmm-dwdp-issue", daemon=True)
        self._thread.start()
        self._token: int | None = ledger.add("threads", "the thread that issues copies")
        try:
            self.submit(Job(driver.activate)).result()
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        for job in iter(self._jobs.get, None):
            job.run()

    def submit(self, job: Job) -> Ticket:
        job.done = False
        job.running.acquire()
        self._jobs.put(job)
        return job

    def close(self) -> None:
        if self._token is not None:
            self._jobs.put(None)
            self._thread.join()
            self._ledger.remove(self._token)
            self._token = None

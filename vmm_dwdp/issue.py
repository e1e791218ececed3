"""Who gives copies to the driver: the thread that launches kernels, or one of our own.

Giving the driver thousands of slices takes milliseconds, which the launching thread does not have; giving it a few long
copies takes less time than waking another thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger

Job = Callable[[], None]


class Ticket(Protocol):
    """A job that was submitted."""

    def result(self) -> None:
        """Wait until the driver has been given everything, and raise what it raised."""


class Issuer(Protocol):
    """Runs jobs one after another, in the order in which they were submitted."""

    def submit(self, job: Job) -> Ticket: ...

    def close(self) -> None:
        """Finish what was submitted. A second call does nothing."""


class InlineIssuer:
    """Runs each job in the thread that submits it."""

    def submit(self, job: Job) -> Ticket:
        ticket: Future[None] = Future()
        try:
            job()
        except Exception as error:
            ticket.set_exception(error)
        else:
            ticket.set_result(None)
        return ticket

    def close(self) -> None:
        pass


class ThreadIssuer:
    """Runs jobs in a thread of its own, which the ledger counts."""

    def __init__(self, driver: Driver, ledger: Ledger) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vmm-dwdp-issue", initializer=driver.activate)
        self._ledger = ledger
        self._token: int | None = ledger.add("threads", "the thread that issues copies")

    def submit(self, job: Job) -> Ticket:
        return self._pool.submit(job)

    def close(self) -> None:
        if self._token is not None:
            self._pool.shutdown(wait=True)
            self._ledger.remove(self._token)
            self._token = None

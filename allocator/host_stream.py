"""Streams and events of the host driver: a thread with a queue, or the calling one, and marks in that queue."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable

from vmm_dwdp.errors import DriverError


class Record:
    """One recording of an event: complete once the stream has worked off what it was given before."""

    def __init__(self) -> None:
        self.time = 0.0  # of completion, on the clock of time.perf_counter
        self._complete = threading.Event()
        self._error: DriverError | None = None

    def complete(self, error: DriverError | None = None) -> None:
        """Completes it; ``error`` is what ended the stream's work before it came to this point."""
        self.time = time.perf_counter()
        self._error = error
        self._complete.set()

    def is_complete(self) -> bool:
        """Raises what ended the stream's work."""
        if not self._complete.is_set():
            return False
        if self._error is not None:
            raise DriverError(self._error.call, self._error.code, self._error.attempt) from self._error
        return True

    def wait(self) -> None:
        """Blocks the calling thread; raises what ended the stream's work."""
        self._complete.wait()
        self.is_complete()


class CallingThread:
    """The stream on which kernels run: what it is given is over when the call returns."""

    def submit(self, work: Callable[[], object]) -> None:
        """Runs ``work``, and raises what it raises."""
        work()

    def record(self, record: Record) -> None:
        """Completes ``record``."""
        record.complete()

    def synchronize(self) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Raises `DriverError`: nobody created it."""
        raise DriverError("destroy_stream", "CUDA_ERROR_INVALID_HANDLE", "destroy the default stream")


class HostStream:
    """Works off what it is given, in order, in a thread of its own.

    After an error nothing more is run, and every later record carries the error, as on a CUDA device.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: DriverError | None = None
        self._giving = threading.Lock()  # so that nothing is given after the last
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        """Run ``work`` after all that was given so far. What it raises ends this stream's work."""
        if not self._give(functools.partial(self._attempt, work)):
            raise DriverError("submit", "CUDA_ERROR_INVALID_HANDLE", "give work to a stream that was destroyed")

    def record(self, record: Record) -> None:
        """Complete ``record`` after all that was given so far."""
        if not self._give(lambda: record.complete(self._error)):
            record.complete(self._error)  # another thread has closed it: there is nothing before

    def _give(self, step: Callable[[], None]) -> bool:
        """Whether it will be run."""
        with self._giving:
            if not self._is_closed:
                self._queue.put(step)
            return not self._is_closed

    def synchronize(self) -> None:
        """Wait for all that was given so far; raises what ended this stream's work."""
        record = Record()
        self.record(record)
        record.wait()

    def close(self) -> None:
        """Work off the rest and end the thread."""
        with self._giving:
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        for step in iter(self._queue.get, None):
            step()

    def _attempt(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except DriverError as error:
                self._error = error

"""Processes that start side by side and are then asked one after another, each of which may fail or hang.

Each leads a process group, with which it is killed, and writes all that it and its children say into a log.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from cuts import uncut

Serve = Callable[[Callable[[], Any]], Generator[dict[str, Any]]]
"""Gives rows. When it is ready to, it calls what it is given, which waits for its turn and gives what it is asked.
Closed, it ends."""

DONE = "done"
SECONDS_TO_END = 30.0


class Failed(Exception):
    """In one sentence."""


class Killed(Protocol):
    """What ends at once, with all that it started."""

    def kill(self) -> None:
        """May be called again."""


K = TypeVar("K", bound=Killed)


class NoneLeft:
    """Starts processes, and kills all of them at the end of a ``with``.

    A benchmark that is cut (cuts.py) while one is started or killed leaves none either. For the main thread.
    """

    def __init__(self) -> None:
        self._begun = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def start(self, make: Callable[[], K]) -> K:
        """What ``make`` has started."""
        with uncut():
            made = make()
            self._begun.callback(made.kill)
        return made

    def __exit__(self, *_: object) -> None:
        with uncut():
            self._begun.close()


class EngineProcess:
    """A process that runs a `Serve`.

    Args:
        serve: can be pickled.
        log: a file, for what the process prints.
    """

    def __init__(self, serve: Serve, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._begin = time.monotonic()
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_run, args=(theirs, serve, log))
        self._process.start()
        assert self._process.pid is not None
        self._group = self._process.pid
        theirs.close()  # so that the end of a process that dies is seen

    def wait_until_ready(self, seconds: float) -> float:
        """The seconds that it took to start. Raises `Failed` if it died, or was not ready so many after its start."""
        ready: float = self._receive(self._begin + seconds, "ready", seconds)
        return ready - self._begin

    def rows(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Its rows, as they come. Raises `Failed` if it dies, or has not given all of them after so many seconds."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it died, which is seen when it is waited for
            self._pipe.send(None)
        while (row := self._receive(end, "done", seconds)) != DONE:
            yield row

    def turn(self, asked: Any, seconds: float) -> Any:
        """The one row of a turn of a `Serve` that waits for another turn then. Raises as `rows`."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._pipe.send(asked)
        row = self._receive(end, "done", seconds)
        self._receive(end, "done", seconds)  # it is ready again
        return row

    def end(self) -> None:
        """Its process ends by itself, or is killed after a while, and with it those that it started."""
        self._pipe.close()
        self._process.join(SECONDS_TO_END)
        self.kill()

    def kill(self) -> None:
        """It and those that it started end at once. May be called again, and after `end`."""
        self._pipe.close()
        with contextlib.suppress(ProcessLookupError):  # all of them have ended, or none was started yet
            os.killpg(self._group, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def _receive(self, end: float, what: str, seconds: float) -> Any:
        try:
            if self._pipe.poll(max(0.0, end - time.monotonic())):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise Failed(reason(self._log)) from None
        raise Failed(f"not {what} after {seconds:.0f} s")


def reason(log: Path) -> str:
    """The first exception in ``log`` that has a sentence, or port in use, of which those that follow come; else the
    first exception, or the last line."""
    telling = re.compile(r"[\w.]*(Error|Exception|Failed)(: |$)|.*: address already in use$")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if telling.match(line)]
    with_sentence = [line for line in named if ": " in line]
    return (with_sentence[:1] or named[:1] or lines[-1:] or ["it died and said nothing"])[0]


def _run(pipe: Connection, serve: Serve, log: Path) -> None:
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def wait_for_turn() -> Any:
        pipe.send(time.monotonic())  # all processes have this clock
        return pipe.recv()

    try:
        with contextlib.closing(serve(wait_for_turn)) as rows:
            for row in rows:
                pipe.send(row)
            pipe.send(DONE)
            with contextlib.suppress(EOFError):
                pipe.recv()  # until the benchmark is done with it
    except SystemExit:  # it has said why
        raise
    except BaseException:  # the log is where it is looked for
        traceback.print_exc()
    finally:
        pipe.close()

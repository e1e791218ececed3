"""An exception at any point of the library, as a signal handler or Ctrl-C raises it there; and what went wrong then.

The driver's calls are atomic, as CUDA's are to the interpreter: nothing is raised inside the host driver.
"""

from __future__ import annotations

import dis
import functools
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, Literal, Protocol, Self

import vmm_dwdp
from vmm_dwdp.allocator import uninterrupted

How = Literal["line", "signal"]

EVERY: Final = os.environ.get("EVERY_POINT", "")  # "1": every place, the first time and the last, instead of a sample
PATIENCE: Final = float(os.environ.get("PATIENCE", "10"))  # seconds, after which one attempt is stuck
FAILURES: Final = 4  # after which a sweep ends
_LIBRARY: Final = str(Path(vmm_dwdp.__file__).parent) + os.sep
_DEVICE: Final = {
    "host_context.py",
    "host_driver.py",
    "host_pages.py",
    "host_ranges.py",
    "host_stream.py",
}  # what stands for the device
_CALLS: Final = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD"}


class Interrupted(BaseException):
    """Raised by the interrupter, as `KeyboardInterrupt` is."""


class Alarm(Exception):
    """Raised by the interrupter, as the handler of a time limit does: an ``except Exception`` catches it."""


class Stuck(BaseException):
    """The main thread waits for something that does not come."""


class Interruption(Protocol):
    """Something that happens once while a body runs.

    Attributes:
        seen: points at which it could have happened so far.
        where: the point at which it did; ``None`` if it did not.
        passed: for each place in the code, the first and the last point at which it was passed; empty if each point is
            a place of its own.
    """

    seen: int
    where: str | None
    passed: dict[Any, tuple[int, int]]

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Interrupter:
    """Raises ``error`` at point ``at`` of what the library does in this thread.

    ``how="line"``: at the beginning of a line, directly, but not where the library puts signals off. ``how="signal"``:
    by the handler of a signal that is sent at a point where the interpreter looks for signals: at the begin of a
    function, after a call, at the end of a loop's body. Where the library puts signals off, it comes later. In the main
    thread only.
    """

    def __init__(self, at: int, how: How = "line", error: type[BaseException] = Interrupted) -> None:
        self.seen = 0
        self.where: str | None = None
        self.passed: dict[Any, tuple[int, int]] = {}
        self._at = at
        self._how = how
        self._error = error
        self._after_call: dict[FrameType, bool] = {}

    def __enter__(self) -> Self:
        if self._how == "signal":
            self._handler = signal.signal(signal.SIGUSR1, self._handle)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        self._after_call.clear()
        if self._how == "signal":
            signal.signal(signal.SIGUSR1, self._handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise self._error("a signal")

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not _is_ours(frame.f_code):
            return None
        if self._how == "line":
            return self._line
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._point(frame)
        return self._opcode

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line" and not _puts_off(frame.f_code) and frame.f_lasti not in _ends_of_with(frame.f_code):
            self._point(frame)
        return self._line

    def _opcode(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "opcode":
            if self._after_call.get(frame):
                self._point(frame)
            self._after_call[frame] = frame.f_lasti in _calls(frame.f_code)
        elif event == "return":
            self._after_call.pop(frame, None)
        return self._opcode

    def _point(self, frame: FrameType) -> None:
        place = frame.f_code, frame.f_lasti
        self.passed[place] = self.passed.get(place, (self.seen, 0))[0], self.seen
        self.seen += 1
        if self.seen != self._at + 1:
            return
        file = frame.f_code.co_filename.removeprefix(_LIBRARY)
        self.where = f"{file}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        if self._how == "signal":
            signal.raise_signal(signal.SIGUSR1)
        else:
            raise self._error(self.where)


@functools.cache
def _is_ours(code: CodeType) -> bool:
    path = code.co_filename
    return path.startswith(_LIBRARY) and os.path.basename(path) not in _DEVICE


def _puts_off(code: CodeType) -> bool:
    """Whether the library puts signals off at the moment, or is about to: nothing comes directly there."""
    return uninterrupted._deferring or code.co_filename == uninterrupted.__file__


@functools.cache
def _ends_of_with(code: CodeType) -> frozenset[int]:
    """Where a ``with`` begins to leave its body in peace. No signal comes there, and whatever is raised there would
    skip ``__exit__``, so that no program could be right."""
    found = list(dis.get_instructions(code))
    return frozenset(
        first.offset
        for first, *nones in zip(found, found[1:], found[2:], strict=False)
        if all(each.opname == "LOAD_CONST" and each.argval is None for each in (first, *nones))
    )


@functools.cache
def _calls(code: CodeType) -> frozenset[int]:
    return frozenset(each.offset for each in dis.get_instructions(code) if each.opname in _CALLS)


@contextmanager
def watched(seconds: float = PATIENCE) -> Iterator[None]:
    """Raise `Stuck` in the main thread, whose waits a signal ends, if the body takes longer."""

    def stuck(number: int, frame: FrameType | None) -> None:
        raise Stuck("".join(traceback.format_stack(frame)[-4:]))

    handler = signal.signal(signal.SIGUSR2, stuck)
    over = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        if not over.wait(seconds):
            signal.pthread_kill(main, signal.SIGUSR2)

    watch_dog = threading.Thread(target=watch, daemon=True)
    watch_dog.start()
    try:
        yield
    finally:
        over.set()
        watch_dog.join()
        signal.signal(signal.SIGUSR2, handler)


class Subject(Protocol):
    """What a sweep interrupts, again and again."""

    def prepare(self) -> None:
        """Before each interruption."""

    def operate(self) -> None:
        """What is interrupted."""

    def recover(self) -> None:
        """Do what the documentation says after an exception, and compare every byte."""

    def close(self) -> None:
        """At the end: nothing may be left."""


def sweep(make: Callable[[], Subject], interruption: Callable[[int], Interruption], most: int) -> None:
    """Interrupt what ``make`` gives at ``most`` points, drawn once and for all, or as `EVERY` says; all that goes wrong
    is told at the end. After something went wrong, ``make`` gives another."""
    subject = make()
    subject.prepare()
    with interruption(sys.maxsize) as clean:
        subject.operate()
    assert clean.where is None
    assert clean.seen, "there is nothing to interrupt"
    subject.recover()
    points: Sequence[int] = range(clean.seen)
    if EVERY and clean.passed:
        points = sorted({point for first_and_last in clean.passed.values() for point in first_and_last})
        part, _, parts = EVERY.partition("/")
        points = points[int(part) - 1 :: int(parts or 1)]  # "3/8": the third of eight parts
    elif not EVERY and most < clean.seen:
        points = sorted(random.Random(0).sample(points, most))
    failures: list[str] = []
    for at in points:
        failure = _attempt(subject, interruption(at))
        if failure:
            failures.append(f"point {at} of {clean.seen}, {failure}")
            if len(failures) == FAILURES:
                break
            with suppress(BaseException), watched():
                subject.close()
            subject = make()
    if failure := _closing(subject):
        failures.append(failure)
    assert not failures, "\n".join(failures)


def _closing(subject: Subject) -> str | None:
    """What went wrong at the end."""
    try:
        with watched():
            subject.close()
    except (Exception, Stuck) as error:
        return f"at the end: {type(error).__name__}: {error}"
    return None


def _attempt(subject: Subject, interruption: Interruption) -> str | None:
    """What went wrong with one interruption."""
    try:
        with watched():
            subject.prepare()
            with interruption:
                _operate(subject, interruption)
            subject.recover()
    except (Exception, Stuck, Interrupted) as error:
        path = [f"{os.path.basename(at.filename)}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)[1:]]
        return f"interrupted at {interruption.where}: {type(error).__name__}: {error} ({' '.join(path)})"
    return None


def _operate(subject: Subject, interruption: Interruption) -> None:
    try:
        subject.operate()
    except (Interrupted, Alarm, KeyboardInterrupt):
        assert interruption.where is not None
    except vmm_dwdp.DWDPError as error:
        if "INJECTED" not in str(error):
            raise AssertionError(f"the caller's exception was replaced by {error}") from error

"""Signals that arrive in the middle of a step that is to be whole."""

from __future__ import annotations

import signal
import threading
import traceback
import weakref
from collections.abc import Iterator
from types import FrameType

import pytest

from vmm_dwdp.allocator.handles import Failures, Ledger, Owned, ResourceStack, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted


class Interrupted(Exception):
    pass


@pytest.fixture
def raising() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("raising")
def test_a_handler_runs_after_the_body() -> None:
    steps = []

    def body() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            steps.append("inside")
            with uninterrupted():
                steps.append("deeper")
            steps.append("still inside")

    for _ in range(2):
        with pytest.raises(Interrupted):
            body()
    assert steps == ["inside", "deeper", "still inside"] * 2
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGUSR1)


def test_a_handler_is_told_the_frame_that_it_runs_in() -> None:
    """What the one that it was kept from refers to would be in use still: tensors over memory that a handler frees."""
    told: list[list[str]] = []
    held: list[weakref.ref[Interrupted]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        assert held[0]() is None
        told.append([each.f_code.co_name for each, _ in traceback.walk_stack(frame)])

    def body() -> None:
        of_the_body = Interrupted()
        held.append(weakref.ref(of_the_body))
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with uninterrupted():
            body()
    finally:
        signal.signal(signal.SIGUSR1, before)
    [names] = told
    assert "body" not in names
    assert "test_a_handler_is_told_the_frame_that_it_runs_in" in names


@pytest.mark.usefixtures("raising")
def test_what_the_body_raises_is_not_lost() -> None:
    def body() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            raise ZeroDivisionError

    with pytest.raises(Interrupted) as raised:
        body()
    assert isinstance(raised.value.__context__, ZeroDivisionError)


@pytest.mark.usefixtures("raising")
def test_every_signal_is_handled_although_the_handler_of_one_raises() -> None:
    handled = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: handled.append(number))

    def body() -> None:
        with uninterrupted():
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.raise_signal(number)
            assert handled == []

    try:
        with pytest.raises(Interrupted):
            body()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert handled == [signal.SIGUSR2]


def test_other_threads_are_not_concerned() -> None:
    handlers = []

    def look() -> None:
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


class Once(Owned):
    """Interrupted while it is undone, and refuses to be undone twice."""

    def __init__(self) -> None:
        self.undone = 0

    def close(self) -> None:
        self.undone += 1
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.usefixtures("raising")
def test_what_an_interrupt_leaves_in_a_stack_is_closed_once() -> None:
    stack = ResourceStack()
    parts = [stack.push(Once()) for _ in range(3)]
    with pytest.raises(Interrupted):
        stack.close()
    stack.close()
    assert [part.undone for part in parts] == [1, 1, 1]


def test_an_undoing_call_that_fails_is_a_note_on_what_came_before() -> None:
    def fail() -> None:
        raise ValueError("second")

    first = ZeroDivisionError("first")
    undo_after(first, fail)
    assert first.__notes__ == ["and then: second"]
    with pytest.raises(ValueError, match="second"):
        undo_after(None, fail)


def test_no_step_stops_the_others() -> None:
    failures = Failures()
    ran = []
    for number in range(3):
        with failures.noted():
            ran.append(number)
            raise ValueError(number)
    assert ran == [0, 1, 2]
    with pytest.raises(ValueError, match="0") as raised:
        failures.raise_first("left open: 1 handle")
    assert raised.value.__notes__ == ["and then: 1", "and then: 2", "left open: 1 handle"]
    Failures().raise_first("never said")
    assert Ledger().open() == []

"""Steps of which half is worse than none: taking something and noting that it was taken."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

_Handler = Callable[[int, FrameType | None], Any]

_NUMBERS: Final = tuple(map(int, signal.valid_signals()))
_arrived: Final[list[int]] = []
_deferring = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Python's handlers of signals, Ctrl-C's among them, run after the body instead of in its middle, and are told the
    frame that they run in: one of the body would keep alive what it refers to, such as tensors over our memory.

    For bodies that do not wait for others. Only the main thread runs handlers, so in others this does nothing.
    """
    global _deferring
    if _deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _NUMBERS if callable(handler := signal.getsignal(number))}
    try:
        _deferring = True
        for number in handlers:
            signal.signal(number, _defer)
        yield
    finally:
        _deferring = False  # until the first handler is back, nothing is raised
        try:
            _restore(handlers, list(handlers))
        finally:
            arrived = list(_arrived)
            _arrived.clear()
            _call(handlers, arrived)


def _defer(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)


def _restore(handlers: Mapping[int, _Handler], rest: list[int]) -> None:
    """All of them, although one that is back may raise meanwhile."""
    try:
        while rest:
            signal.signal(rest[-1], handlers[rest[-1]])
            rest.pop()
    except BaseException:
        _restore(handlers, rest)
        raise


def _call(handlers: Mapping[int, _Handler], arrived: list[int]) -> None:
    """All of them, although one may raise."""
    while arrived:
        number = arrived.pop(0)
        try:
            handlers[number](number, inspect.currentframe())
        except BaseException:
            _call(handlers, arrived)
            raise

"""Steps of which half is worse than none: taking something and noting that it was taken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_NUMBERS: Final = tuple(map(int, signal.valid_signals()))
_handled: Final[list[tuple[int, FrameType | None]]] = []
_deferring = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Python's handlers of signals, Ctrl-C's among them, run after the body instead of in its middle.

    For bodies that do not wait for others. Only the main thread runs handlers, so in others this does nothing.
    """
    global _deferring
    if _deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _NUMBERS if callable(handler := signal.getsignal(number))}
    _deferring = True
    try:
        for number in handlers:
            signal.signal(number, _defer)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _deferring = False
        arrived, _handled[:] = list(_handled), []
        for number, frame in arrived:
            handlers[number](number, frame)


def _defer(number: int, frame: FrameType | None) -> None:
    _handled.append((number, frame))

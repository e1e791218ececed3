"""Benchmarks that are cut before their end: `timeout` sends SIGTERM, and Ctrl-C SIGINT."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Cut(SystemExit):
    """One of `SIGNALS` has come."""


def raise_when_cut() -> None:
    """Let `SIGNALS` raise `Cut` in the main thread, once: what is done then is not cut again."""

    def cut(number: int, _: object) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Cut(f"cut by {signal.Signals(number).name}: not all was measured")

    for each in SIGNALS:
        signal.signal(each, cut)


@contextlib.contextmanager
def uncut() -> Iterator[None]:
    """`SIGNALS` that come meanwhile do at its end what they would have done. For the main thread."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)

"""Which calls are allowed when, and in which thread.

[Note: One thread at a time]
A pass belongs to the thread that acquires its first layer, until it releases the last one or gives the pass up by
`reset`. In between another thread is refused, whatever it asks for that belongs to a pass: the two would take each
other's slots. Between passes any thread may begin one. Where the thread of a pass has ended, the pass has too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from vmm_dwdp.errors import StateError

_State = Literal["set-up", "running", "closed", "forked"]


class Lifecycle:
    """Set-up until `publish`, passes and what they need from then on, `close` at any time.

    Attributes:
        runner: which thread is in the middle of a pass, as `threading.get_ident` numbers them; 0 if none is.
        latest_runner: which one was, the last time.
    """

    def __init__(self) -> None:
        self.runner = 0
        self.latest_runner = 0
        self._state: _State = "set-up"
        self._thread: threading.Thread | None = None  # of `runner`
        self._claims = threading.Lock()  # guards `runner` where it is claimed

    @property
    def is_running(self) -> bool:
        """Whether passes may run."""
        return self._state == "running"

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that opened the runtime."""
        return self._state == "forked"

    def require_setup(self, call: str) -> None:
        """Raise `StateError` unless layers may still be stated."""
        self._require_here()
        if self._state == "closed":
            raise StateError(f"{call} after close")
        if self._state == "running":
            raise StateError(f"{call} after publish")

    def require_running(self) -> None:
        """Raise `StateError` unless passes may run."""
        self._require_here()
        if self._state == "closed":
            raise StateError("the runtime is closed")
        if self._state == "set-up":
            raise StateError("the runtime is not published yet")

    def _require_here(self) -> None:
        if self._state == "forked":
            raise StateError("the runtime belongs to the process that forked this one; open one in each process")

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """No other thread begins a pass while the body runs.

        Raises `StateError` if another thread is in the middle of one.
        """
        claimed = self.claim()
        try:
            yield
        finally:
            if claimed:
                self.end_pass()

    def end_pass(self) -> None:
        """The pass is over: any thread may begin the next one."""
        self.runner = 0

    def claim(self) -> bool:
        """The calling thread is in a pass until `end_pass`. Tells whether it was not before.

        Raises `StateError` if another thread is in the middle of one.
        """
        this = threading.current_thread()
        with self._claims:
            if self.runner == threading.get_ident():
                return False
            if self.runner and self._thread is not None and self._thread.is_alive():
                raise StateError(
                    f"thread {this.name!r} asks in the middle of a pass of thread {self._thread.name!r}: let passes "
                    "take turns, and have the thread whose pass ended early call reset"
                )
            self._thread = this
            self.runner = self.latest_runner = threading.get_ident()
            return True

    def publish(self) -> None:
        """Set-up is complete."""
        self._state = "running"

    def close(self) -> None:
        """No call is allowed any more. A pass that another thread is in the middle of is refused its next call."""
        self._state = "closed"
        self.end_pass()

    def fork(self) -> None:
        """This process is a child of the one that opened the runtime."""
        self._state = "forked"
        self.end_pass()

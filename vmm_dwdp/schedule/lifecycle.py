"""Which calls are allowed when, and in which thread.

[Note: One thread at a time]
A pass belongs to the thread that acquires its first layer, until it releases the last one or gives the pass up by
`reset`. In between another thread is refused, whatever it asks for that belongs to a pass: the two would take each
other's slots. Between passes any thread may begin one. Where the thread of a pass has ended, the pass has too.

The thread that ran the latest pass begins the next without a lock: it says that it is in a pass, and then looks whether
it is still the runner. Whoever takes its place says so first, and then looks whether a pass has begun: so one of the
two sees the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from vmm_dwdp.errors import StateError
from vmm_dwdp.schedule.hit_path import Turn, this_thread

_State = Literal["set-up", "running", "asleep", "closed", "forked"]


class Lifecycle(Turn):
    """Set-up until `publish`, passes and what they need from then on, but not while asleep, `close` at any time.

    Attributes:
        runner: the number, by `this_thread`, of the thread that may go on with passes, which is the one that ran the
            latest; 0: nobody may without asking, by `claim`. No thread inherits a number, as it may an identifier.
        in_pass: whether the runner is in the middle of a pass.
        latest_runner: the number of the thread that was `runner` the last time.
        calls: held by a call of a pass while it lasts; what C does of one nothing comes into the middle of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest_runner = 0
        self.calls = threading.RLock()  # a signal's handler may close in the middle of one
        self._state: _State = "set-up"
        self._thread: threading.Thread | None = None  # of `runner`
        self._claims = threading.Lock()  # guards where `runner` is claimed
        self._turns = threading.RLock()
        self._busy: str | None = None  # with what, so that nothing else can be

    @property
    def is_running(self) -> bool:
        """Whether it is published, and not closed."""
        return self._state in ("running", "asleep")

    @property
    def is_asleep(self) -> bool:
        """Whether passes have to wait until the group is woken."""
        return self._state == "asleep"

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._state == "closed"

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that opened the runtime."""
        return self._state == "forked"

    def require_setup(self, call: str) -> None:
        """Raise `StateError` unless layers may still be stated."""
        self._require_here()
        if self._state == "closed":
            raise StateError(f"{call} after close")
        if self._state != "set-up":
            raise StateError(f"{call} after publish")

    def require_running(self) -> None:
        """Raise `StateError` unless passes may run."""
        self.require_published()
        if self._state == "asleep":
            raise StateError("the group sleeps: wake comes first, on all ranks")

    def require_published(self) -> None:
        """Raise `StateError` unless it is published, and not closed."""
        self._require_here()
        if self._state == "closed":
            raise StateError("the runtime is closed")
        if self._state == "set-up":
            raise StateError("the runtime is not published yet")

    def _require_here(self) -> None:
        if self._state == "forked":
            raise StateError("the runtime belongs to the process that forked this one; open one in each process")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time is in the body of such a block; others wait. Raises `StateError` within another."""
        if self._turns._is_owned():  # type: ignore[attr-defined]  # what it tells cannot be left behind by an interrupt
            raise StateError("a pass is stated within a pass of the same thread")
        with self._turns:
            yield

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Nothing that `require_not_busy` guards is allowed while the body runs."""
        self._busy = what
        try:
            yield
        finally:
            self._busy = None

    def require_idle(self) -> None:
        """Raise `StateError` unless passes may run, and nothing bars them just now."""
        self.require_running()
        self.require_not_busy()

    def require_not_busy(self) -> None:
        """Raise `StateError` in the block of what allows nothing else."""
        if self._busy is not None:
            raise StateError(f"{self._busy} is under way: nothing else is allowed in its block")

    @contextmanager
    def undisturbed(self) -> Iterator[bool]:
        """No other thread begins a pass while the body runs. Tells whether the calling one was in none before.

        Raises `StateError` if another thread is in the middle of one.
        """
        claimed = self.claim(goes_on=False)
        try:
            yield claimed
        finally:
            if claimed:
                self.end_pass()
                self.ask_again()  # what `acquire` sees to in a thread was not done in this one
            self._busy = None  # if its own end was interrupted

    def end_pass(self) -> None:
        """The pass is over: any thread may begin the next one."""
        self.in_pass = False

    def ask_again(self) -> None:
        """Whoever goes on with passes has to `claim` first."""
        self.runner = 0

    def claim(self, *, goes_on: bool) -> bool:
        """The calling thread is in a pass until `end_pass`. Tells whether it was not before.

        Args:
            goes_on: it has asked for all that `acquire` wants to know, and may go on without.

        Raises `StateError` if another thread is in the middle of one.
        """
        this = threading.current_thread()
        with self._claims:
            begins = self._take_over(this, goes_on)
        return begins  # noqa: RET504  # when the lock is free: a way out of its block that nothing can interrupt

    def _take_over(self, this: threading.Thread, goes_on: bool) -> bool:
        before = self._thread
        self._require_free(before, this)
        runner, number = self.runner, this_thread()
        self.runner = number if goes_on or runner == number else 0
        if before is not this:
            try:
                self._require_free(before, this)  # see [Note: One thread at a time]
            except StateError:
                self.runner = runner
                raise
        self._thread, self.latest_runner = this, number
        begins, self.in_pass = not self.in_pass or before is not this, True
        return begins

    def _require_free(self, runner: threading.Thread | None, this: threading.Thread) -> None:
        if self.in_pass and runner is not None and runner is not this and runner.is_alive():
            raise StateError(
                f"thread {this.name!r} asks in the middle of a pass of thread {runner.name!r}: let passes take turns, "
                "and have the thread whose pass ended early call reset"
            )

    def publish(self) -> None:
        """Set-up is complete."""
        if self._state == "set-up":  # a signal's handler may have closed it
            self._state = "running"

    def fall_asleep(self) -> None:
        """Passes are refused until `wake_up`."""
        if self._state == "running":  # another thread may have closed it
            self._state = "asleep"
        self.ask_again()

    def wake_up(self) -> None:
        """Passes may run again."""
        if self._state == "asleep":
            self._state = "running"

    def close(self) -> None:
        """No call is allowed any more. A pass that another thread is in the middle of is refused its next call; this
        waits for one that is under way."""
        self._state = "closed"
        self.ask_again()
        with self.calls:
            pass

    def fork(self) -> None:
        """This process is a child of the one that opened the runtime."""
        self._state = "forked"
        self.calls = threading.RLock()  # nobody here will let go of the parent's
        self.ask_again()

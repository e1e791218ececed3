"""Sleep and wake of a group: all ranks give their devices' memory back together, and take it again.

See [Note: Asleep] in `vmm_dwdp.memory.sleep` for what is where, and [Note: What an attempt is for] for why nobody is in
doubt about bytes that were only moved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmm_dwdp.allocator.handles import undo_after
from vmm_dwdp.errors import ExchangeError
from vmm_dwdp.group.agreement import LAST_STEP, Purpose
from vmm_dwdp.group.exchange import Exchange
from vmm_dwdp.group.membership import Membership


class SleepingMembership(Membership):
    """A rank's part in a group that can sleep. No layer is acquired meanwhile, and nothing runs on the device."""

    def sleep(self, keep: bool, timeout: float) -> None:
        """See `Rank.sleep`. Where it raises and this rank is not asleep, all is as it was."""
        assembly = self._assembly
        try:
            if keep:
                assembly.save()
            self._leave_descriptors()
            deadline = time.monotonic() + timeout
            with self._attempt("sleep" if keep else "give up", "sleep: this rank reads nothing", deadline) as exchange:
                self._state.fall_asleep()
                if not keep:
                    self.shards.begun.update(key for key in self.shards.held() if key[2] == self._rank)
                    assembly.give_up()
                assembly.give_back()
                exchange.step(1, "sleep: this rank has given its memory back", deadline)
                for owner in self._other_ranks():
                    if keep:
                        self._take(exchange, owner, owner, deadline, ("host",))
                    assembly.drop(owner, "device")
                exchange.step(LAST_STEP, "sleep: this rank has let go of the others' memory", deadline)
        except BaseException as error:
            if not self._state.is_asleep:
                undo_after(error, assembly.forget_saved)
            raise
        self._settle_limits()

    def wake(self, timeout: float) -> None:
        """See `Rank.wake`. Where it raises and this rank has slept, it sleeps on."""
        assembly = self._assembly
        slept = not assembly.is_there(self._rank, "device")
        try:
            assembly.take_again()
            self._leave_descriptors()
            deadline = time.monotonic() + timeout
            with self._attempt("wake", "wake: this rank has taken its memory", deadline) as exchange:
                self._state.fall_asleep()  # one that was awake is refused what it reads of others, too
                assembly.let_go()
                exchange.step(1, "wake: this rank has its memory to hand over", deadline)
                for owner in self._other_ranks():
                    self._take(exchange, owner, owner, deadline)
                with assembly.touching():
                    assembly.build()
                exchange.step(LAST_STEP, "wake: this rank has the others' memory", deadline)
            self._state.wake_up()
        except BaseException as error:
            if slept and self._state.is_asleep:
                undo_after(error, assembly.give_back)
            raise
        for owner in self._other_ranks():
            assembly.drop(owner, "host")
        assembly.forget_saved()
        self._settle_limits()

    @contextmanager
    def _attempt(self, purpose: Purpose, what: str, deadline: float) -> Iterator[Exchange]:
        """`Exchange.attempt`; the error says so where no rank has begun."""
        assert self._exchange is not None
        try:
            with self._exchange.attempt(purpose, what, deadline):
                yield self._exchange
        except ExchangeError as error:
            if self._exchange.was_relied_on:
                raise
            raise ExchangeError(f"nothing was given back or taken: {error}") from error

    def _other_ranks(self) -> list[int]:
        """Those whose memory this rank uses; the pool of host memory stays."""
        return [owner for owner in self._other_owners() if isinstance(owner, int)]

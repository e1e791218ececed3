"""`close` by the handler of a signal, as a server's on SIGTERM, at any point of any call of the thread that it stops.

A sample of the points. The handler goes on with `SystemExit`, as most do, or returns: then the call that it came into
the middle of ends, with an exception of this library at most.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import FrameType

import pytest
from support.drivers import FailingDriver, NativeDriver
from support.groups import PAGE
from support.interrupter import Interrupted, Interrupter, watched
from support.subjects import (
    GiveUp,
    Group,
    LookUp,
    Pass,
    Publish,
    Rebalance,
    Refresh,
    Reset,
    Sleep,
    StatedPass,
    Traced,
    Update,
    Updating,
    Wake,
)

from vmm_dwdp import DWDPConfig, DWDPError

POINTS = 12  # of each call
ORDER = [1, 0, 4, 2, 3]
HOST = DWDPConfig(group_size=1, host_experts=4, checksums=True)
IN_PLACE = replace(HOST, mode="in_place")
CACHED = replace(HOST, mode="auto", resident_cache=4 * PAGE)
PAIR = DWDPConfig(group_size=2, num_local_experts=4, host_experts=1, slice_bytes=64)
CALLS: dict[str, Callable[[], Group | Publish]] = {
    "a pass": lambda: Pass(HOST, FailingDriver, ORDER, None),
    "a pass, of which a native thread gives the copies": lambda: Pass(HOST, NativeDriver, ORDER, None),
    "a pass, of which a thread gives them": lambda: Pass(PAIR, FailingDriver, ORDER, None),
    "look_up": lambda: LookUp(replace(IN_PLACE, expert_bank=5 * 3 * PAGE), FailingDriver, ORDER, None),
    "reset": lambda: Reset(IN_PLACE, FailingDriver, (), "staged"),
    "forward_pass": lambda: StatedPass(IN_PLACE, FailingDriver, [0, 1, 2], "staged"),
    "trace": lambda: Traced(HOST, FailingDriver, ORDER, None),
    "update": lambda: Update(CACHED, FailingDriver),
    "updating": lambda: Updating(IN_PLACE, FailingDriver),
    "sleep": lambda: Sleep(HOST, FailingDriver),
    "sleep, and nothing is kept": lambda: GiveUp(HOST, FailingDriver),
    "wake": lambda: Wake(HOST, FailingDriver),
    "rebalance": lambda: Rebalance(replace(CACHED, movable_experts=True), FailingDriver),
    "refresh_cache": lambda: Refresh(CACHED, FailingDriver),
    "publish": lambda: Publish(HOST, FailingDriver),
}


class Closing(Interrupter):
    """Closes the runtime of ``subject`` at point ``at``; and then raises `Interrupted`, or does not."""

    def __init__(self, at: int, subject: Group | Publish, *, raises: bool) -> None:
        super().__init__(at, "signal")
        self._subject = subject
        self._raises = raises

    def _handle(self, number: int, frame: FrameType | None) -> None:
        trace = sys.gettrace()
        sys.settrace(None)  # once is enough
        assert self._subject.runtime is not None
        self._subject.runtime.close()
        if self._raises:
            super()._handle(number, frame)
        sys.settrace(trace)


@pytest.mark.parametrize("raises", [True, False], ids=["it raises", "it returns"])
@pytest.mark.parametrize("call", CALLS)
def test_close_in_a_handler(call: str, raises: bool) -> None:
    make = CALLS[call]
    subject = make()
    subject.prepare()
    with Closing(sys.maxsize, subject, raises=raises) as clean:
        subject.operate()
    subject.recover()
    subject.close()
    assert clean.seen > POINTS
    came = 0
    for at in sorted(random.Random(0).sample(range(clean.seen), POINTS)):
        subject = make()
        with watched():  # a lock that its own thread waits for
            subject.prepare()
            with Closing(at, subject, raises=raises) as closing, suppress(Interrupted, DWDPError):
                subject.operate()
            came += closing.where is not None
            assert subject.runtime is not None
            assert subject.runtime.close().open() == [], closing.where
            subject.close()
    assert came > POINTS / 2, "beside other threads the number of points differs, but not by that much"

"""Children of fork, as data loaders and servers make them of a process that has threads."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Final

SECONDS: Final = 60  # after which a child counts as hung: the kernel ends it, whatever it waits for


def in_child(work: Callable[[], object]) -> None:
    """Do ``work`` in a child of fork; raises `AssertionError` if it raised or hung there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads, which is the point
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGALRM, "the child hung"
    assert status == 0, "the child raised"

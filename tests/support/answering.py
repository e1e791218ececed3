"""What the interrupter interrupts of the transport alone, at every point: a rank that begins to answer others."""

from __future__ import annotations

import os
import tempfile
import time

from support.subjects import LATE, in_use, nothing_left
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.group.doors import open_door
from vmm_dwdp.group.transport import Transport


class Answering:
    """A rank that begins to answer others, and stops: after an exception, too, it can stop, and leaves nothing."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.before = in_use()

    def prepare(self) -> None:
        self.ledger = Ledger()
        self.transport = Transport(
            open_door(self.directory.name, 0, 1), self.ledger, 0, 1, LATE, lambda message: ({}, [])
        )

    def operate(self) -> None:
        self.transport.serve(time.monotonic() + LATE)

    def recover(self) -> None:
        self.transport.close()
        assert self.ledger.open() == [], f"left: {self.ledger.open()}"
        files = os.listdir(self.directory.name)
        assert not files, f"left in the rendezvous: {files}"
        del self.transport
        nothing_left(self.before)

    def close(self) -> None:
        self.directory.cleanup()

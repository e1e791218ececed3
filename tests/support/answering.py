"""What the interrupter interrupts of the transport alone, at every point: a rank that begins to answer others."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from support.doors import TCPPlace
from support.subjects import LATE, in_use, nothing_left
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.group.addresses import bind
from vmm_dwdp.group.doors import Where, open_door
from vmm_dwdp.group.transport import Transport


class Answering:
    """A rank that begins to answer others, and stops: after an exception, too, it can stop, and leaves nothing."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.before = in_use()

    def rendezvous(self) -> Where:
        return self.directory.name

    def prepare(self) -> None:
        self.ledger = Ledger()
        door = open_door(self.rendezvous(), 0, 1)
        self.transport = Transport(door, self.ledger, 0, 1, LATE, lambda message: ({}, []))

    def operate(self) -> None:
        self.transport.serve(time.monotonic() + LATE)

    def recover(self) -> None:
        self.transport.close()
        assert self.ledger.open() == [], f"left: {self.ledger.open()}"
        files = set(os.listdir(self.directory.name)) - {"secret"}
        assert not files, f"left in the rendezvous: {files}"
        del self.transport
        nothing_left(self.before)

    def close(self) -> None:
        self.directory.cleanup()


class AnsweringOverTCP(Answering):
    """The same at an address, which is free again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.place = TCPPlace(Path(self.directory.name), group_size=1)

    def rendezvous(self) -> Where:
        return self.place.rendezvous

    def recover(self) -> None:
        super().recover()
        bind(self.place.addresses[0]).close()

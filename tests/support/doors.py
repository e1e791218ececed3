"""One rank's exchange without a runtime behind it, and whoever knocks at it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import receive, send
from vmm_dwdp.group.exchange import PROTOCOL_VERSION, Exchange
from vmm_dwdp.group.rendezvous import Rendezvous
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.memory.assembly import Place, Share

GROUP_SIZE = 3
PATIENCE = 60.0  # seconds
FINGERPRINT = "what all ranks agree in"
GROUP = "a group that is published"
NOTHING = [[0, ""]] * GROUP_SIZE  # what a rank knows of the others that has heard nothing
TOKEN = b"a token of an owner's memory"
CHECKSUMS = [7, 8, 9]


def soon() -> float:
    """A deadline that nothing comes to which goes well."""
    return time.monotonic() + 60


def exchange(rendezvous: Rendezvous, ledger: Ledger, rank: int) -> Exchange:
    """A rank of a published group that serves one descriptor and one token for every owner."""

    def shares(owner: Owner, place: Place) -> tuple[Place, list[Share]]:
        return place, [Descriptor(ledger, os.memfd_create(f"of {owner}", os.MFD_CLOEXEC)), TOKEN]

    made = Exchange(
        *(rendezvous, ledger, rank, GROUP_SIZE, PATIENCE, FINGERPRINT, None, shares),
        lambda owner: CHECKSUMS,
        lambda: False,
    )
    made._group = GROUP
    return made


@contextmanager
def serving(directory: Path, ledger: Ledger, rank: int = 0) -> Iterator[Exchange]:
    """A rank that is there; gone at the end."""
    served = exchange(Rendezvous(directory), ledger, rank)
    served.serve(time.monotonic() + PATIENCE)
    try:
        yield served
    finally:
        served.close()


def request(directory: Path, **changes: Any) -> dict[str, Any]:
    """What rank 1 asks; keys whose change is `...` are left out."""
    asked: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "token": (directory / "token").read_bytes().hex(),
        "fingerprint": FINGERPRINT,
        "revision": None,
        "rank": 1,
        "group": GROUP,
        "ask": "alive",
        "owner": None,
        "vector": NOTHING,
        "step": 0,
        "place": "device",
        **changes,
    }
    return {key: value for key, value in asked.items() if value is not ...}


def knock(directory: Path, rank: int = 0) -> socket.socket:
    """A connection to the rank's door."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(directory / f"rank-{rank}"))
    return sock


def answer_to(directory: Path, payload: bytes, ledger: Ledger) -> dict[str, Any]:
    """What a well-formed message is answered; descriptors that come with it are closed."""
    deadline = time.monotonic() + PATIENCE
    with knock(directory) as sock:
        send(sock, payload, deadline=deadline)
        answer, descriptors = receive(sock, max_bytes=1 << 16, max_fds=9, deadline=deadline, ledger=ledger)
    for descriptor in descriptors:
        descriptor.close()
    told: dict[str, Any] = json.loads(answer)
    return told

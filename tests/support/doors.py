"""One rank's exchange without a runtime behind it, and whoever knocks at it: by Unix sockets, or by TCP."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vmm_dwdp import TCPRendezvous
from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import receive, send
from vmm_dwdp.group.addresses import bind
from vmm_dwdp.group.door import Door
from vmm_dwdp.group.doors import open_door
from vmm_dwdp.group.exchange import PROTOCOL_VERSION, Exchange
from vmm_dwdp.group.tcp_door import NONCE_NBYTES, PROOF_NBYTES, Conversation, TCPDoor
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.memory.assembly import Place as PlaceOfMemory
from vmm_dwdp.memory.assembly import Share

GROUP_SIZE = 3
PATIENCE = 60.0  # seconds
FINGERPRINT = "what all ranks agree in"
GROUP = "a group that is published"
NOTHING = [[0, ""]] * GROUP_SIZE  # what a rank knows of the others that has heard nothing
TOKEN = b"a token of an owner's memory"
CHECKSUMS = [7, 8, 9]
SECRET = b"a secret of a group of tests"


def soon() -> float:
    """A deadline that nothing comes to which goes well."""
    return time.monotonic() + 60


class Place(Protocol):
    """Where the ranks of a test meet.

    Attributes:
        rendezvous: what a runtime is given.
    """

    rendezvous: Any

    def door(self, rank: int) -> Door:
        """Of a rank, in this process."""

    def connect(self, rank: int) -> socket.socket:
        """A connection to the rank's door, as anybody can have one; raises `OSError` where nobody listens."""

    def listener(self, rank: int, backlog: int) -> socket.socket:
        """Somebody else who listens in the rank's place."""

    def vouched(self, sock: socket.socket, payload: bytes, rank: int) -> bytes:
        """What a member sends over a connection to ``rank``, so that the request ``payload`` is heard."""

    def opened(self, answer: bytes) -> bytes:
        """What such a member reads in an answer."""


class UnixPlace:
    """A directory; requests have its token."""

    def __init__(self, directory: Path) -> None:
        self.rendezvous = self.directory = directory

    def door(self, rank: int) -> Door:
        return open_door(self.directory, rank, GROUP_SIZE)

    def connect(self, rank: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.directory / f"rank-{rank}"))
        except BaseException:
            sock.close()
            raise
        return sock

    def listener(self, rank: int, backlog: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / f"rank-{rank}"))
        listener.listen(backlog)
        return listener

    def vouched(self, sock: socket.socket, payload: bytes, rank: int) -> bytes:
        return payload

    def opened(self, answer: bytes) -> bytes:
        return answer


class TCPPlace:
    """An address for each rank, ``127.0.0.2`` and so on, where nobody is when this is made."""

    def __init__(self, directory: Path, group_size: int = GROUP_SIZE) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.secret_file = directory / "secret"
        self.secret_file.touch(mode=0o600)
        self.secret_file.write_bytes(SECRET)
        self.addresses = [free_address(f"127.0.0.{2 + rank}") for rank in range(group_size)]
        self.rendezvous = TCPRendezvous(self.addresses, secret_file=self.secret_file)

    def door(self, rank: int) -> TCPDoor:
        door = open_door(self.rendezvous, rank, len(self.addresses))
        assert isinstance(door, TCPDoor)
        return door

    def connect(self, rank: int) -> socket.socket:
        host, port = self.addresses[rank].split(":")
        sock = socket.socket()
        try:
            sock.connect((host, int(port)))
        except BaseException:
            sock.close()
            raise
        return sock

    def listener(self, rank: int, backlog: int) -> socket.socket:
        listener = bind(self.addresses[rank])
        listener.listen(backlog)
        return listener

    def vouched(self, sock: socket.socket, payload: bytes, rank: int) -> bytes:
        nonce, _ = receive(sock, max_bytes=NONCE_NBYTES, max_fds=0, deadline=soon(), ledger=Ledger())
        own = secrets.token_bytes(NONCE_NBYTES)
        return own + Conversation(self.door(rank)._key, rank, nonce + own).asks(payload) + payload

    def opened(self, answer: bytes) -> bytes:
        return answer[PROOF_NBYTES:]


def free_address(host: str) -> str:
    """At which nobody listens now."""
    with bind(f"{host}:0") as sock:
        return f"{host}:{sock.getsockname()[1]}"


def exchange(door: Door, ledger: Ledger, rank: int) -> Exchange:
    """A rank of a published group that serves a token for every owner, and a descriptor where the door takes it."""

    def shares(owner: Owner, place: PlaceOfMemory) -> tuple[PlaceOfMemory, list[Share]]:
        if not door.takes_descriptors:
            return place, [TOKEN]
        return place, [Descriptor(ledger, os.memfd_create(f"of {owner}", os.MFD_CLOEXEC)), TOKEN]

    def lines() -> Descriptor:
        return Descriptor(ledger, os.memfd_create("lines", os.MFD_CLOEXEC))

    stated = (door, ledger, rank, GROUP_SIZE, PATIENCE, FINGERPRINT)
    made = Exchange(*stated, shares, lambda what, owner: CHECKSUMS, lambda: False, lines)
    made.state(None, PATIENCE)
    made._group = GROUP
    return made


@contextmanager
def serving(place: Place, ledger: Ledger, rank: int = 0) -> Iterator[Exchange]:
    """A rank that is there; gone at the end."""
    served = exchange(place.door(rank), ledger, rank)
    served.serve(time.monotonic() + PATIENCE)
    try:
        yield served
    finally:
        served.close()


def request(place: Place, /, **changes: Any) -> dict[str, Any]:
    """What rank 1 asks; keys whose change is `...` are left out."""
    token = {"token": (place.directory / "token").read_bytes().hex()} if isinstance(place, UnixPlace) else {}
    asked: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "fingerprint": FINGERPRINT,
        "revision": None,
        "rank": 1,
        "group": GROUP,
        "ask": "alive",
        "owner": None,
        "vector": NOTHING,
        "step": 0,
        "place": "device",
        **token,
        **changes,
    }
    return {key: value for key, value in asked.items() if value is not ...}


def answer_to(place: Place, asked: dict[str, Any], ledger: Ledger, rank: int = 0) -> dict[str, Any]:
    """What a request of a member is answered; descriptors that come with it are closed."""
    deadline = time.monotonic() + PATIENCE
    with place.connect(rank) as sock:
        send(sock, place.vouched(sock, json.dumps(asked).encode(), rank), deadline=deadline)
        answer, descriptors = receive(sock, max_bytes=1 << 16, max_fds=9, deadline=deadline, ledger=ledger)
    for descriptor in descriptors:
        descriptor.close()
    told: dict[str, Any] = json.loads(place.opened(answer))
    return told

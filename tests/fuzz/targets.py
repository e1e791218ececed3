"""What is read of what others wrote, each as a function of bytes that returns, whatever the bytes are.

An exception that leaves one of them is a finding: everything that cannot be must be refused by an error of this
library's own.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import json
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import torch
from support.doors import GROUP_SIZE, PATIENCE, Place, TCPPlace, UnixPlace, exchange, request

from vmm_dwdp import ConfigError, DWDPConfig, ExchangeError, WeightSpec
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.sharing import MAGIC
from vmm_dwdp.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from vmm_dwdp.group import tcp_door
from vmm_dwdp.group.agreement import Word
from vmm_dwdp.group.exchange import Exchange
from vmm_dwdp.group.order import order_of
from vmm_dwdp.group.tcp_door import NONCE_NBYTES, PROOF_NBYTES, Conversation
from vmm_dwdp.group.transport import Transport
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.memory.assembly import close_shares

Target = Callable[[bytes], None]

_HEADER: Final = struct.Struct("!4sII")
_LARGEST: Final = 1 << 16  # bytes: a socket takes as many at once
_directory: Final = Path(tempfile.mkdtemp(prefix="vmm-dwdp-fuzz-", dir="/dev/shm"))
_ledger: Final = Ledger()
_TWO_EXPERTS: Final = describe_layer(0, {"w": WeightSpec((2, 8), torch.uint8)}, DWDPConfig(group_size=2), 0, 4096)
_unix: Final = UnixPlace(_directory / "rendezvous")
_tcp: Final = TCPPlace(_directory / "tcp")
_exchange: Final = exchange(_unix.door(0), _ledger, 0)
_tcp_exchange: Final = exchange(_tcp.door(0), _ledger, 0)


def _member(place: Place) -> bytes:
    """The beginning of what a member asks."""
    return json.dumps(request(place, rank=...))[:-1].encode()


def _framed(payload: bytes, fds: int = 0) -> bytes:
    return _HEADER.pack(MAGIC, fds, len(payload)) + payload


def _pairs(data: bytes) -> bytes:
    """More keys and values for the object of a request or an answer; the latest of equal keys counts."""
    return b", " + data + b"}"


@contextlib.contextmanager
def _sent(data: bytes, num_fds: int, says_so: bool) -> Iterator[socket.socket]:
    """A socket at which ``data`` and the end of the connection have arrived."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()] * num_fds))]
        if says_so:
            theirs.send(data[: _HEADER.size])
            theirs.sendmsg([b"."], rights)
            theirs.send(data[_HEADER.size :])
        elif data:
            theirs.sendmsg([data], rights if num_fds else [])
        theirs.shutdown(socket.SHUT_WR)
        yield ours


_members: Final = {place: _member(place) for place in (_unix, _tcp)}
_NONCES: Final = bytes(2 * NONCE_NBYTES)


_ZEROS: Final = SimpleNamespace(token_bytes=bytes)


@contextlib.contextmanager
def _known_nonces(send: Callable[..., None] = tcp_door.send) -> Iterator[None]:
    """Zeros, so that proofs can be made beforehand; and what is sent is given to ``send``."""
    before = tcp_door.secrets, tcp_door.send
    tcp_door.secrets, tcp_door.send = _ZEROS, send  # type: ignore[assignment]
    try:
        yield
    finally:
        tcp_door.secrets, tcp_door.send = before


def server(data: bytes) -> None:
    """A request: as it is, in a frame, or as part of what a member says; with descriptors or without."""
    kind, data = data[:1], data[1:_LARGEST]
    if kind >= b"\x80":
        data = _framed(_members[_unix] + _pairs(data))
    elif kind >= b"\x40":
        data = _framed(data)
    with _sent(data, num_fds=kind[0] % 3 if kind else 0, says_so=False) as sock:
        _exchange._transport._answer(sock)
    assert _ledger.open() == []


def tcp_server(data: bytes) -> None:
    """What comes over TCP: as it is, in a frame, or with a proof, as a whole request or as part of one."""
    kind, data = data[:1], data[1:_LARGEST]
    if kind >= b"\xc0":
        data = _members[_tcp] + _pairs(data)
    if kind >= b"\x80":
        proof = Conversation(_tcp_exchange._transport._door._key, 0, _NONCES).asks(data)
        data = bytes(NONCE_NBYTES) + proof + data
    if kind >= b"\x40":
        data = _framed(data)
    with _known_nonces(), _sent(data, num_fds=0, says_so=False) as sock:
        _tcp_exchange._transport._answer(sock)
    assert _ledger.open() == []


class _Answered(Transport):
    """Is answered by bytes."""

    data = b""
    num_fds = 0

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        with _sent(self.data, self.num_fds, says_so=self.num_fds > 0) as sock:
            yield sock


class _TCPAnswered(Transport):
    """Is answered by bytes, once it has asked: before that nobody can make a proof for it."""

    data = b""
    proves = False

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        ours, theirs = socket.socketpair()
        with ours, theirs, _known_nonces(functools.partial(self._asked, theirs)):
            theirs.send(_framed(bytes(NONCE_NBYTES)))
            yield ours

    def _asked(self, theirs: socket.socket, ours: socket.socket, message: bytes, *, deadline: float) -> None:
        data = self.data
        if self.proves:
            asked = message[NONCE_NBYTES:][:PROOF_NBYTES]
            data = _framed(Conversation(self._door._key, 1, _NONCES).told(asked, data) + data)
        if data:
            theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)


_asking: Final = exchange(_unix.door(0), _ledger, 0)
_answered: Final = _Answered(_unix.door(0), _ledger, 0, GROUP_SIZE, PATIENCE, lambda request: ({"error": None}, []))
_asking._transport = _answered
_tcp_asking: Final = exchange(_tcp.door(0), _ledger, 0)
_tcp_answered: Final = _TCPAnswered(_tcp.door(0), _ledger, 0, GROUP_SIZE, PATIENCE, _answered._answer_to)
_tcp_asking._transport = _tcp_answered


def client(data: bytes) -> None:
    """An answer: as it is, in a frame, or as part of an object; with as many descriptors as it says, or without."""
    kind, data = data[:1], data[1:_LARGEST]
    num_fds = kind[0] % 3 if kind else 0
    if kind >= b"\x80":
        data = _framed(b'{"error": null' + _pairs(data), num_fds)
    elif kind >= b"\x40":
        data = _framed(data, num_fds)
    _answered.data, _answered.num_fds = data, num_fds
    _ask(_asking)


def tcp_client(data: bytes) -> None:
    """An answer over TCP: as it is, in a frame, or with a proof, as a whole or as part of an object."""
    kind, data = data[:1], data[1:_LARGEST]
    if kind >= b"\xc0":
        data = b'{"error": null' + _pairs(data)
    elif b"\x40" <= kind < b"\x80":
        data = _framed(data)
    _tcp_answered.data, _tcp_answered.proves = data, kind >= b"\x80"
    _ask(_tcp_asking)


def _ask(asking: Exchange) -> None:
    deadline = time.monotonic() + 60
    with contextlib.suppress(ExchangeError):
        close_shares(asking.collect(1, 1, {"device": 2}, deadline)[1])
    with contextlib.suppress(ExchangeError):
        asking.collect_numbers("checksums", 1, 1, 2, deadline)
    with contextlib.suppress(ExchangeError):
        assert sorted(order_of(asking, 1, [_TWO_EXPERTS], deadline).rows_of(_TWO_EXPERTS)) == [0, 1]
    with contextlib.suppress(ExchangeError):
        asking._send(1, Word("say", ((0, ""),) * GROUP_SIZE), deadline)
    assert _ledger.open() == []


def config(data: bytes) -> None:
    """A YAML file; what is accepted survives being written and read again."""
    path = _directory / "dwdp.yaml"
    path.write_bytes(data)
    try:
        accepted = DWDPConfig.from_yaml(path)
    except ConfigError:
        return
    accepted.to_yaml(path)
    assert DWDPConfig.from_yaml(path) == accepted


def checkpoint(data: bytes) -> None:
    """A safetensors file as it is or behind a true length of its header; or the index of a file that is there."""
    kind, data = data[:1], data[1:]
    directory = _directory / "checkpoint"
    directory.mkdir(exist_ok=True)
    single, index, named = directory / SINGLE_FILE, directory / INDEX_FILE, directory / "a"
    if kind >= b"\x80":
        end = data.rfind(b"}") + 1
        single.write_bytes(struct.pack("<Q", end) + data)
    elif kind >= b"\x40":
        single.write_bytes(data)
    else:
        single.unlink(missing_ok=True)
        named.write_bytes(
            struct.pack("<Q", 60) + b'{"t":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}'.ljust(60) + b"data"
        )
        index.write_bytes(data)
    with contextlib.suppress(ConfigError), Checkpoint(directory) as opened:
        for name in opened.names:
            for row in (None, 0, 1):
                with contextlib.suppress(ConfigError):
                    opened.read(name, row)


TARGETS: Final[dict[str, Target]] = {
    "server": server,
    "client": client,
    "tcp_server": tcp_server,
    "tcp_client": tcp_client,
    "config": config,
    "checkpoint": checkpoint,
}
CORPUS: Final = Path(__file__).parent / "corpus"


def open_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


@atexit.register
def forget() -> None:
    """Remove the files of this process."""
    shutil.rmtree(_directory, ignore_errors=True)

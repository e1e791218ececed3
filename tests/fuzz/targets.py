"""What is read of what others wrote, each as a function of bytes that returns, whatever the bytes are.

An exception that leaves one of them is a finding: everything that cannot be must be refused by an error of this
library's own.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from support.doors import GROUP_SIZE, PATIENCE, exchange, request

from vmm_dwdp import ConfigError, DWDPConfig, ExchangeError
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.sharing import MAGIC
from vmm_dwdp.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from vmm_dwdp.group.agreement import Word
from vmm_dwdp.group.rendezvous import Rendezvous
from vmm_dwdp.group.transport import Transport
from vmm_dwdp.memory.assembly import close_shares

Target = Callable[[bytes], None]

_HEADER: Final = struct.Struct("!4sII")
_LARGEST: Final = 1 << 16  # bytes: a socket takes as many at once
_directory: Final = Path(tempfile.mkdtemp(prefix="vmm-dwdp-fuzz-", dir="/dev/shm"))
_ledger: Final = Ledger()
_exchange: Final = exchange(Rendezvous(_directory / "rendezvous"), _ledger, 0)
_member: Final = json.dumps(request(_directory / "rendezvous", rank=...))[:-1].encode()


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


def server(data: bytes) -> None:
    """A request: as it is, in a frame, or as part of what a member says; with descriptors or without."""
    kind, data = data[:1], data[1:_LARGEST]
    if kind >= b"\x80":
        data = _framed(_member + _pairs(data))
    elif kind >= b"\x40":
        data = _framed(data)
    with _sent(data, num_fds=kind[0] % 3 if kind else 0, says_so=False) as sock:
        _exchange._transport._answer(sock)
    assert _ledger.open() == []


class _Answered(Transport):
    """Is answered by bytes."""

    data = b""
    num_fds = 0

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        with _sent(self.data, self.num_fds, says_so=self.num_fds > 0) as sock:
            yield sock


_asking: Final = exchange(Rendezvous(_directory / "rendezvous"), _ledger, 0)
_answered: Final = _Answered(
    Rendezvous(_directory / "rendezvous"), _ledger, 0, GROUP_SIZE, PATIENCE, lambda request: ({"error": None}, [])
)
_asking._transport = _answered


def client(data: bytes) -> None:
    """An answer: as it is, in a frame, or as part of an object; with as many descriptors as it says, or without."""
    kind, data = data[:1], data[1:_LARGEST]
    num_fds = kind[0] % 3 if kind else 0
    if kind >= b"\x80":
        data = _framed(b'{"error": null' + _pairs(data), num_fds)
    elif kind >= b"\x40":
        data = _framed(data, num_fds)
    _answered.data, _answered.num_fds = data, num_fds
    deadline = time.monotonic() + 60
    with contextlib.suppress(ExchangeError):
        close_shares(_asking.collect(1, 1, {"device": 2}, deadline)[1])
    with contextlib.suppress(ExchangeError):
        _asking.collect_checksums(1, 1, 2, deadline)
    with contextlib.suppress(ExchangeError):
        _asking._send(1, Word("say", ((0, ""),) * GROUP_SIZE), deadline)
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


TARGETS: Final[dict[str, Target]] = {"server": server, "client": client, "config": config, "checkpoint": checkpoint}
CORPUS: Final = Path(__file__).parent / "corpus"


def open_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


def forget() -> None:
    """Remove the files of this process."""
    for path in sorted(_directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    _directory.rmdir()

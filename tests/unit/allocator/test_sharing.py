"""Messages with descriptors over Unix sockets, from well-meaning senders and others."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vmm_dwdp.allocator import sharing
from vmm_dwdp.allocator.handles import Descriptor, Ledger, ResourceStack
from vmm_dwdp.errors import ExchangeError

pytestmark = pytest.mark.usefixtures("open_descriptors")
HEADER = struct.Struct("!4sII")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def files(ledger: Ledger) -> Iterator[list[Descriptor]]:
    """600 descriptors of files that hold their own number."""
    with ResourceStack() as stack:
        files = [stack.push(Descriptor(ledger, os.memfd_create(f"file {number}"))) for number in range(600)]
        for number, file in enumerate(files):
            os.pwrite(file.fd, str(number).encode(), 0)
        yield files


def soon() -> float:
    return time.monotonic() + 60


def now() -> float:
    """A deadline that leaves time for what is there already, and for nothing else."""
    return time.monotonic() + 0.05


def receive(sock: socket.socket, ledger: Ledger, deadline: float | None = None) -> tuple[bytes, list[Descriptor]]:
    return sharing.receive(sock, max_bytes=1 << 20, max_fds=1000, deadline=deadline or soon(), ledger=ledger)


def header(magic: bytes = sharing.MAGIC, fds: int = 0, nbytes: int = 0) -> bytes:
    return HEADER.pack(magic, fds, nbytes)


def send_with_rights(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@pytest.mark.parametrize("count", [0, 1, 2, 253, 254, 506, 600])
def test_descriptors_arrive_in_order(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger, count: int
) -> None:
    sharing.send(ends[0], b"payload", [file.fd for file in files[:count]], deadline=soon())
    sharing.send(ends[0], b"next", deadline=soon())
    payload, received = receive(ends[1], ledger)
    assert payload == b"payload"
    assert [os.pread(descriptor.fd, 9, 0) for descriptor in received] == [
        str(number).encode() for number in range(count)
    ]
    assert not any(os.get_inheritable(descriptor.fd) for descriptor in received)
    assert ledger.counts()["descriptors"] == len(files) + count
    for descriptor in received:
        descriptor.close()
    assert receive(ends[1], ledger) == (b"next", [])


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20])
def test_a_payload_of_any_size_arrives(ends: tuple[socket.socket, socket.socket], ledger: Ledger, nbytes: int) -> None:
    payload = os.urandom(nbytes)
    sender = threading.Thread(target=sharing.send, args=(ends[0], payload), kwargs={"deadline": soon()})
    sender.start()
    assert receive(ends[1], ledger) == (payload, [])
    sender.join()


def test_the_peer_is_known_to_the_kernel(ends: tuple[socket.socket, socket.socket]) -> None:
    assert sharing.peer_uid(ends[0]) == os.getuid()


@pytest.mark.parametrize("magic", [b"HTTP", b"VMD0", b"\0\0\0\0"])
def test_another_program_or_version(ends: tuple[socket.socket, socket.socket], ledger: Ledger, magic: bytes) -> None:
    ends[0].send(header(magic))
    with pytest.raises(ExchangeError, match="another program or version"):
        receive(ends[1], ledger)


@pytest.mark.parametrize(
    ("announced", "sentence"),
    [
        (header(nbytes=(1 << 20) + 1), "announces 1048577 bytes where at most 1048576"),
        (header(nbytes=(1 << 32) - 1), "announces 4294967295 bytes where at most 1048576"),
        (header(fds=1001), "announces 1001 descriptors where at most 1000"),
    ],
)
def test_more_than_is_allowed(
    ends: tuple[socket.socket, socket.socket], ledger: Ledger, announced: bytes, sentence: str
) -> None:
    ends[0].send(announced)
    with pytest.raises(ExchangeError, match=sentence):
        receive(ends[1], ledger)


@pytest.mark.parametrize("sent", [b"", header(nbytes=9)[:5], header(nbytes=9) + b"12345678", header(fds=1)])
@pytest.mark.parametrize("closing", [True, False])
def test_a_message_that_is_cut_short(
    ends: tuple[socket.socket, socket.socket], ledger: Ledger, sent: bytes, closing: bool
) -> None:
    ends[0].send(sent)
    if closing:
        ends[0].close()
    with pytest.raises(ExchangeError, match="closed the connection" if closing else "did not send a message in time"):
        receive(ends[1], ledger, soon() if closing else now())


def test_descriptors_of_a_message_that_is_cut_short_are_closed(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger
) -> None:
    ends[0].send(header(fds=300, nbytes=4))
    send_with_rights(ends[0], b".", [file.fd for file in files[:253]])
    send_with_rights(ends[0], b".", [file.fd for file in files[253:300]])
    ends[0].close()
    with pytest.raises(ExchangeError, match="closed the connection"):
        receive(ends[1], ledger)
    assert ledger.counts()["descriptors"] == len(files)


@pytest.mark.parametrize("sent", [0, 1, 3, 4, 253])
def test_another_number_of_descriptors_than_announced(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger, sent: int
) -> None:
    ends[0].send(header(fds=2))
    if sent:
        send_with_rights(ends[0], b".", [file.fd for file in files[:sent]])
    else:
        ends[0].send(b".")
    with pytest.raises(ExchangeError, match="descriptors arrived where 2 were announced"):
        receive(ends[1], ledger)
    assert ledger.counts()["descriptors"] == len(files)


@pytest.mark.parametrize("place", ["header", "payload"])
def test_descriptors_where_none_were_announced(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger, place: str
) -> None:
    if place == "payload":
        ends[0].send(header(nbytes=4))
    send_with_rights(ends[0], header() if place == "header" else b"1234", [file.fd for file in files[:3]])
    with pytest.raises(ExchangeError, match="had not announced"):
        receive(ends[1], ledger)


def test_more_descriptors_than_this_process_may_open(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger
) -> None:
    sharing.send(ends[0], b"", [file.fd for file in files[:20]], deadline=soon())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(file.fd for file in files) + 11, hard))
    try:
        with pytest.raises(ExchangeError, match=r"10 descriptors arrived where 20 .* may not open more files"):
            receive(ends[1], ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ledger.counts()["descriptors"] == len(files)


def test_a_sender_of_single_bytes_gains_no_time(ends: tuple[socket.socket, socket.socket], ledger: Ledger) -> None:
    """A deadline for each read, instead of the message, would let this sender go on for ever."""
    stop = threading.Event()

    def trickle() -> None:
        ends[0].send(header(nbytes=1 << 20))
        while not stop.wait(0.01):
            ends[0].send(b"x")

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        with pytest.raises(ExchangeError, match="did not send a message in time"):
            receive(ends[1], ledger, time.monotonic() + 0.3)
    finally:
        stop.set()
        sender.join()


def test_a_peer_that_takes_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ExchangeError, match="did not take a message in time"):
        sharing.send(ends[0], bytes(16 << 20), deadline=now())


def test_a_peer_that_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].close()
    with pytest.raises(ExchangeError, match="could not be sent: Broken pipe"):
        sharing.send(ends[0], b"payload", deadline=soon())


class CrowdedSocket(socket.socket):
    """Refuses a number of calls with descriptors, as the kernel does while the user has too many on their way."""

    refusals = 0

    def sendmsg(self, buffers: Any, ancdata: Any = (), *arguments: Any) -> int:
        if ancdata and self.refusals:
            self.refusals -= 1
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return super().sendmsg(buffers, ancdata, *arguments)


@pytest.mark.parametrize("refusals", [2, 1 << 30])
def test_too_many_descriptors_on_their_way(
    ends: tuple[socket.socket, socket.socket], files: list[Descriptor], ledger: Ledger, refusals: int
) -> None:
    with CrowdedSocket(fileno=os.dup(ends[0].fileno())) as crowded:
        crowded.refusals = refusals
        if refusals > 2:
            with pytest.raises(ExchangeError, match="did not take a message in time"):
                sharing.send(crowded, b"", [files[0].fd], deadline=now())
            return
        sharing.send(crowded, b"", [files[0].fd], deadline=soon())
    _, (descriptor,) = receive(ends[1], ledger)
    with descriptor:
        assert os.pread(descriptor.fd, 9, 0) == b"0"


def test_a_deadline_that_has_passed(ends: tuple[socket.socket, socket.socket], ledger: Ledger) -> None:
    ends[0].send(header())
    with pytest.raises(ExchangeError, match="in time"):
        receive(ends[1], ledger, time.monotonic() - 1)


def test_the_socket_keeps_its_own_timeout(ends: tuple[socket.socket, socket.socket], ledger: Ledger) -> None:
    ends[1].settimeout(12.5)
    sharing.send(ends[0], b"payload", deadline=soon())
    receive(ends[1], ledger)
    assert ends[1].gettimeout() == 12.5

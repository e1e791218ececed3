"""Messages over stream sockets, and with them file descriptors where the sockets are Unix's.

A message is a header, one byte for every `DESCRIPTORS_PER_CALL` descriptors, and the payload:

    | magic, version | descriptors | payload bytes |  . . .  | payload |
    |------------- header, 12 bytes --------------|  ^ each of these bytes carries descriptors (SCM_RIGHTS)

The kernel takes at most 253 descriptors a call and hands them out with the byte that they were sent with; such a byte
is read on its own. Deadlines are values of `time.monotonic` and hold for the whole message: a peer that sends a byte
now and then gains nothing.
"""

from __future__ import annotations

import array
import errno
import math
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ExchangeError

DESCRIPTORS_PER_CALL: Final = 253  # SCM_MAX_FD in the kernel
MAGIC: Final = b"VMD1"  # the digit is the version of the format
_HEADER: Final = struct.Struct("!4sII")
_MARK: Final = b"."
_RETRY_SECONDS: Final = 0.002
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class HungUp(ExchangeError):
    """The other end is gone."""


def peer_uid(sock: socket.socket) -> int:
    """The user who connected the other end, as the kernel knows it."""
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError as error:
        raise ExchangeError(f"the kernel does not tell who the peer is: {error.strerror}") from error
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return int(uid)


def send(sock: socket.socket, payload: bytes, fds: Sequence[int] = (), *, deadline: float) -> None:
    """Send one message. The caller still owns ``fds``, and may close them when this returns.

    Raises `ExchangeError` if the peer is gone or has not taken the message by the deadline; the socket is then of no
    further use, as part of the message may have been sent.
    """
    _send_bytes(sock, _HEADER.pack(MAGIC, len(fds), len(payload)), deadline)
    for first in range(0, len(fds), DESCRIPTORS_PER_CALL):
        _send_some(sock, _MARK, fds[first : first + DESCRIPTORS_PER_CALL], deadline)
    _send_bytes(sock, payload, deadline)


def receive(
    sock: socket.socket, *, max_bytes: int, max_fds: int, deadline: float, ledger: Ledger
) -> tuple[bytes, list[Descriptor]]:
    """Receive one message: its payload, and its descriptors, which the caller owns.

    Raises `ExchangeError` if the message is not ours, larger than allowed, cut short, or not complete by the deadline;
    descriptors that came with it are closed, and the socket is of no further use.
    """
    magic, num_fds, num_bytes = _HEADER.unpack(_receive_bytes(sock, _HEADER.size, deadline))
    if magic != MAGIC:
        raise ExchangeError(f"a message begins with {magic!r}, not {MAGIC!r}: the sender is another program or version")
    if num_bytes > max_bytes:
        raise ExchangeError(f"a message announces {num_bytes} bytes where at most {max_bytes} are allowed")
    if num_fds > max_fds:
        raise ExchangeError(f"a message announces {num_fds} descriptors where at most {max_fds} are allowed")
    descriptors: list[Descriptor] = []
    try:
        while len(descriptors) < num_fds:
            expected = min(DESCRIPTORS_PER_CALL, num_fds - len(descriptors))
            descriptors += _receive_descriptors(sock, expected, deadline, ledger)
        return _receive_bytes(sock, num_bytes, deadline), descriptors
    except BaseException:
        _close_all(descriptors)
        raise


def _send_bytes(sock: socket.socket, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[_send_some(sock, rest, (), deadline) :]


def _send_some(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int], deadline: float) -> int:
    """Send at least one byte of ``data``, with ``fds``; returns how many."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    while True:
        _await(sock, select.POLLOUT, deadline)
        try:
            return sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            continue  # the buffer has less room than the kernel wants for this message
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise ExchangeError(f"a message could not be sent: {error.strerror}") from error
            # This user has as many descriptors on their way as RLIMIT_NOFILE allows. Receivers, perhaps of other
            # processes, take them off; nothing announces it.
            time.sleep(_RETRY_SECONDS)


def _receive_bytes(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly ``count`` bytes, which must bring no descriptors: without room for them, the kernel drops what comes."""
    data = bytearray()
    while len(data) < count:
        part, _, flags = _receive_some(sock, count - len(data), 0, deadline)
        if flags & socket.MSG_CTRUNC:
            raise ExchangeError("a message brought descriptors that it had not announced")
        data += part
    return bytes(data)


def _receive_descriptors(sock: socket.socket, expected: int, deadline: float, ledger: Ledger) -> list[Descriptor]:
    """The ``expected`` descriptors that come with the next byte."""
    room = socket.CMSG_SPACE(expected * array.array("i").itemsize)
    while True:
        _await(sock, select.POLLIN, deadline)
        with uninterrupted():  # what the kernel has opened is counted
            received = _receive_now(sock, len(_MARK), room)
            if received is None:
                continue
            _, ancillary, flags = received
            fds = array.array("i")
            for level, kind, body in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
            descriptors = [Descriptor(ledger, fd, "a received descriptor") for fd in fds]
            break
    if flags & socket.MSG_CTRUNC or len(descriptors) != expected:
        _close_all(descriptors)
        raise ExchangeError(
            f"{len(descriptors)} descriptors arrived where {expected} were announced"
            + (", perhaps because this process may not open more files" if flags & socket.MSG_CTRUNC else "")
        )
    return descriptors


_Received = tuple[bytes, list[tuple[int, int, bytes]], int]


def _receive_some(sock: socket.socket, num_bytes: int, room: int, deadline: float) -> _Received:
    """At least one byte and at most ``num_bytes``, what came with them in ``room``, and the flags of recvmsg(2)."""
    while True:
        _await(sock, select.POLLIN, deadline)
        if (received := _receive_now(sock, num_bytes, room)) is not None:
            return received


def _receive_now(sock: socket.socket, num_bytes: int, room: int) -> _Received | None:
    """`_receive_some`, or ``None`` where there is nothing: for another reader's sake, or a wake-up without cause."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(num_bytes, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except OSError as error:
        kind = HungUp if error.errno == errno.ECONNRESET else ExchangeError
        raise kind(f"a message could not be received: {error.strerror}") from error
    if not data:
        raise HungUp("the peer closed the connection before its message was complete")
    return data, ancillary, flags


def _await(sock: socket.socket, condition: int, deadline: float) -> None:
    """Wait until the socket can be read or written, which an error or a hang-up also counts as."""
    remaining = deadline - time.monotonic()
    poll = select.poll()
    poll.register(sock, condition)
    if remaining <= 0 or not poll.poll(math.ceil(remaining * 1000)):
        action = "send" if condition == select.POLLIN else "take"
        raise ExchangeError(f"the peer did not {action} a message in time")


def _close_all(descriptors: list[Descriptor]) -> None:
    for descriptor in descriptors:
        descriptor.close()

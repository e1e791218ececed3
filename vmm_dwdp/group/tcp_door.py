"""The door of ranks on several hosts: TCP, and a proof of the secret in both directions on every connection.

[Note: Proofs]
Over a connection go three messages, of which none has the secret:

    answerer   its nonce
    asker      its nonce | HMAC("asks", nonces, answerer's rank, zeros, request)         | request, which has its rank
    answerer               HMAC("told", nonces, answerer's rank, the asker's HMAC, answer) | answer

Both draw their nonce anew. So what was said on another connection proves nothing on this one, nor does what a rank said
itself, or said to another rank; and nobody between the two can change a word. They can read it: nothing is encrypted.
The key is made of the secret and the addresses of all ranks, so that groups with one secret keep apart.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import math
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import HungUp, receive, send
from vmm_dwdp.errors import ExchangeError
from vmm_dwdp.group.addresses import Meeting, bind, socket_address
from vmm_dwdp.group.door import (
    MAX_CLIENTS,
    MAX_REQUEST_NBYTES,
    Absent,
    Door,
    Heard,
    Limits,
    Message,
    Silent,
    parse,
    reason,
)

NONCE_NBYTES: Final = 32
PROOF_NBYTES: Final = hashlib.sha256().digest_size
_NO_PROOF: Final = bytes(PROOF_NBYTES)
_RANK: Final = struct.Struct("!I")
_ATTEMPT_SECONDS: Final = 5.0  # then a new one: the kernel asks a host that was down ever more seldom
_AT_ONCE: Final = struct.pack("ii", 1, 0)  # struct linger
_NOT_HEARD_OF: Final = {
    *(errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN),
}


class Conversation(NamedTuple):
    """Of one connection, what is in all its proofs. See [Note: Proofs]."""

    key: bytes
    answerer: int
    nonces: bytes  # the answerer's and the asker's

    def asks(self, request: bytes) -> bytes:
        """The asker's proof."""
        return self._proof(b"asks", _NO_PROOF, request)

    def told(self, asked: bytes, answer: bytes) -> bytes:
        """The answerer's, to somebody whose proof was ``asked``."""
        return self._proof(b"told", asked, answer)

    def _proof(self, direction: bytes, before: bytes, payload: bytes) -> bytes:
        fixed = direction + self.nonces + _RANK.pack(self.answerer) + before  # of one length, so nothing is ambiguous
        return hmac.digest(self.key, fixed + payload, "sha256")


class TCPDoor(Door):
    """Through which no descriptors go.

    Args:
        meeting: whose socket becomes the door's.
    """

    takes_descriptors = False
    look_seconds = 1.0
    stranger_seconds = 10.0  # any host may knock, and takes the place of a member as long

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.place = ", ".join(meeting.addresses)
        self._addresses = meeting.addresses
        self._bound = meeting.bound
        self._rank = rank
        self._key = hmac.digest(meeting.secret, json.dumps(["vmm-dwdp", *meeting.addresses]).encode(), "sha256")
        self._strangers = False  # whether somebody came whose proof was wrong

    def address(self, rank: int) -> str:
        return self._addresses[rank]

    def connect(self, rank: int, deadline: float) -> socket.socket:
        family, address = socket_address(self._addresses[rank])
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise ExchangeError(f"no socket to connect to rank {rank}: {error.strerror}") from error
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
            _await_connection(sock, min(deadline, time.monotonic() + _ATTEMPT_SECONDS))
            if sock.getsockname() == sock.getpeername():  # of a port that nobody has, the kernel may take both ends
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)  # the port is to be free for its owner
                raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody but this very socket")
        except BaseException as error:
            sock.close()
            if isinstance(error, ConnectionRefusedError):
                raise Absent from error
            if isinstance(error, OSError):
                raise self._unconnected(rank, error) from error
            raise
        return sock

    def _unconnected(self, rank: int, error: OSError) -> ExchangeError:
        why = f"at {self._addresses[rank]}: {reason(error)}"
        if error.errno in _NOT_HEARD_OF:
            return Silent(
                f"rank {rank} takes no connections {why} (its host is gone, packets are dropped, or it is busy)"
            )
        return ExchangeError(f"cannot connect to rank {rank} {why}")

    def ask(
        self, sock: socket.socket, rank: int, request: Message, limits: Limits, deadline: float, ledger: Ledger
    ) -> tuple[bytes, list[Descriptor]]:
        nonce, _ = receive(sock, max_bytes=NONCE_NBYTES, max_fds=0, deadline=deadline, ledger=ledger)
        if len(nonce) != NONCE_NBYTES:
            raise ExchangeError(f"its nonce has {len(nonce)} bytes instead of {NONCE_NBYTES}")
        own = secrets.token_bytes(NONCE_NBYTES)
        conversation = Conversation(self._key, rank, nonce + own)
        payload = json.dumps(request).encode()
        proof = conversation.asks(payload)
        send(sock, own + proof + payload, deadline=deadline)
        most = PROOF_NBYTES + limits.nbytes
        try:
            told, _ = receive(sock, max_bytes=most, max_fds=0, deadline=deadline, ledger=ledger)
        except HungUp as error:
            raise ExchangeError(f"{error}: it was ended, or knows another secret or other addresses") from error
        if not hmac.compare_digest(told[:PROOF_NBYTES], conversation.told(proof, told[PROOF_NBYTES:])):
            raise ExchangeError("its answer does not prove that it knows the secret")
        return told[PROOF_NBYTES:], []

    def hear(self, client: socket.socket, deadline: float, ledger: Ledger) -> Heard | None:
        nonce = secrets.token_bytes(NONCE_NBYTES)
        send(client, nonce, deadline=deadline)
        most = NONCE_NBYTES + PROOF_NBYTES + MAX_REQUEST_NBYTES
        message, _ = receive(client, max_bytes=most, max_fds=0, deadline=deadline, ledger=ledger)
        conversation = Conversation(self._key, self._rank, nonce + message[:NONCE_NBYTES])
        proof, payload = message[NONCE_NBYTES:][:PROOF_NBYTES], message[NONCE_NBYTES + PROOF_NBYTES :]
        if not hmac.compare_digest(proof, conversation.asks(payload)):
            self._strangers = True
            return None
        request = parse(payload)
        if request is None:
            return None

        def reply(answer: bytes, fds: Sequence[int], by: float) -> None:
            send(client, conversation.told(proof, answer) + answer, fds, deadline=by)

        return Heard(request, reply)

    def listen(self, rank: int, deadline: float, is_taken: Callable[[], bool]) -> socket.socket:
        """The kernel knows whether it is taken."""
        try:
            listener = self._bound or bind(self._addresses[rank])
            self._bound = listener
            listener.listen(MAX_CLIENTS)
        except OSError as error:
            self.leave()
            raise ExchangeError(f"rank {rank} cannot listen at {self._addresses[rank]}: {reason(error)}") from error
        self._bound = None
        return listener

    def why_not(self, rank: int, error: ExchangeError) -> str:
        return str(error)

    def strangers(self) -> str:
        return "; but a process came that knows another secret, or other addresses" if self._strangers else ""

    def leave(self) -> None:
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def forget(self) -> None:
        self.leave()


def _await_connection(sock: socket.socket, deadline: float) -> None:
    """Wait until an attempt to connect has ended; raises the `OSError` with which it failed."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
        raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))

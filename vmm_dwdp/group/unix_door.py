"""The door of ranks on one machine: a Unix socket for each in a private directory.

The kernel says whose process is at the other end, and every request has the token of the directory with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hmac
import json
import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import peer_uid, receive, send
from vmm_dwdp.errors import ExchangeError
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
from vmm_dwdp.group.rendezvous import Rendezvous


class UnixDoor(Door):
    """Through which descriptors go."""

    takes_descriptors = True
    look_seconds = 0.0  # the kernel knows
    stranger_seconds = float("inf")  # processes of this user

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rendezvous = rendezvous
        self.place = str(rendezvous.directory)
        self._strangers = False  # whether somebody came with another token

    def address(self, rank: int) -> str:
        return str(self.rendezvous.socket_path(rank))

    def connect(self, rank: int, deadline: float) -> socket.socket:
        path = self.rendezvous.socket_path(rank)
        sock = _unix_socket(f"connect to rank {rank}")
        try:
            sock.setblocking(False)  # where too many wait to be answered, `connect` would wait beyond the deadline
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ExchangeError(f"cannot connect to rank {rank}: {path} is not a socket")
            sock.connect(str(path))
            if (uid := peer_uid(sock)) != os.getuid():
                raise ExchangeError(f"cannot connect to rank {rank}: user {uid} listens at {path}")
        except BaseException as error:
            sock.close()
            match error:
                case FileNotFoundError() | ConnectionRefusedError():  # not there yet, or a dead rank's socket
                    raise Absent from error
                case BlockingIOError():
                    raise Silent(f"rank {rank} takes no connections at {path}") from error
                case OSError():
                    raise ExchangeError(f"cannot connect to rank {rank} at {path}: {reason(error)}") from error
            raise
        return sock

    def ask(
        self, sock: socket.socket, rank: int, request: Message, limits: Limits, deadline: float, ledger: Ledger
    ) -> tuple[bytes, list[Descriptor]]:
        send(sock, json.dumps({"token": self.rendezvous.token.hex(), **request}).encode(), deadline=deadline)
        return receive(sock, max_bytes=limits.nbytes, max_fds=limits.descriptors, deadline=deadline, ledger=ledger)

    def hear(self, client: socket.socket, deadline: float, ledger: Ledger) -> Heard | None:
        if peer_uid(client) != os.getuid():
            return None
        payload, _ = receive(client, max_bytes=MAX_REQUEST_NBYTES, max_fds=0, deadline=deadline, ledger=ledger)
        request = parse(payload)
        try:
            token = bytes.fromhex((request or {})["token"])
        except (ValueError, TypeError, KeyError):
            return None
        if request is not None and hmac.compare_digest(token, self.rendezvous.token):
            return Heard(request, functools.partial(_reply, client))
        self._strangers = True
        return None

    def listen(self, rank: int, deadline: float, is_taken: Callable[[], bool]) -> socket.socket:
        path = self.rendezvous.socket_path(rank)
        # Bound under another name and then renamed: whoever finds the socket can connect to it, and one that a dead
        # process left behind is replaced.
        bound = path.with_name(f".{path.name}-{os.getpid()}")
        listener = _unix_socket(f"listen as rank {rank}")
        claimed: tuple[Path, ...] = ()
        try:
            with self.rendezvous.locked(deadline):  # of two that come as one rank, the second finds the first
                if is_taken():
                    raise FileExistsError(errno.EEXIST, "another process does")
                claimed = bound, path
                bound.unlink(missing_ok=True)  # of a process that died here, and had this one's number
                listener.bind(str(bound))
                listener.listen(MAX_CLIENTS)
                os.replace(bound, path)
                self.rendezvous.listens_at(path)
        except BaseException as error:
            for made in claimed:
                with contextlib.suppress(OSError):
                    made.unlink(missing_ok=True)
            listener.close()
            if not isinstance(error, OSError):
                raise
            raise ExchangeError(f"rank {rank} cannot listen at {path}: {reason(error)}") from error
        return listener

    def why_not(self, rank: int, error: ExchangeError) -> str:
        if self.rendezvous.token_is_there():
            return str(error)
        return (
            f"a process listens there that does not know this rank's token: {self.place} was emptied, "
            "or made anew, since this rank came"
        )

    def strangers(self) -> str:
        if not self._strangers:
            return ""
        return (
            f"; but a process came that knows another token: {self.place} was emptied, or made anew, "
            "since it was started"
        )

    def leave(self) -> None:
        self.rendezvous.leave()

    def forget(self) -> None:
        """The rendezvous does by itself: see [Note: Presence]."""


def _reply(client: socket.socket, answer: bytes, fds: Sequence[int], deadline: float) -> None:
    send(client, answer, fds, deadline=deadline)


def _unix_socket(purpose: str) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise ExchangeError(f"no socket to {purpose}: {error.strerror}") from error

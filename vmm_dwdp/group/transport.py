"""Requests between the ranks of a group: every rank listens on a Unix socket of a private directory.

A request is a JSON object with the token of the rendezvous. The answer is a JSON object, with the sentence of a refusal
or ``None`` under ``error``, and descriptors beside it. What is asked and answered is the business of `Exchange`.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import peer_uid, receive, send
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import DWDPError, ExchangeError
from vmm_dwdp.group.rendezvous import Rendezvous
from vmm_dwdp.memory.assembly import Share, close_shares

MAX_REQUEST_NBYTES: Final = 4096
MAX_CLIENTS: Final = 64  # at one time; more wait in the kernel's queue
_RETRY_SECONDS: Final = 0.01

Message = dict[str, Any]


class Refused(ExchangeError):
    """The other rank is there, and says why it does not do what it was asked."""


class Transport:
    """One rank's door, and its way to the doors of others.

    Args:
        patience: seconds; a client that takes longer to ask, or to take the answer, is dropped.
        answer: gives the answer to a request of somebody who knows the token, and the shares to send with it, which
            become the transport's. It runs in a thread of its own for each request.

    Attributes:
        complaints: by rank, why the latest request of a process that came as this rank was refused. If it is not there
            any more, that is likely to be why.
        failure: why this rank cannot go on, whatever others do: found in answering one of them.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        ledger: Ledger,
        rank: int,
        group_size: int,
        patience: float,
        answer: Callable[[Message], tuple[Message, list[Share]]],
    ) -> None:
        self.complaints: dict[int, str] = {}
        self.failure: DWDPError | None = None
        self._rendezvous = rendezvous
        self._ledger = ledger
        self._rank = rank
        self._ranks = range(group_size)
        self._patience = patience
        self._answer_to = answer
        self._clients: dict[_CountedThread, socket.socket] = {}
        self._replying: set[socket.socket] = set()  # of clients that are told a few words, without waiting for them
        self._changed = threading.Condition()  # guards both
        self._met: set[int] = set()  # ranks that have answered: if one is not there any more, it has left
        self._strangers = False  # whether somebody came with another token

    # -- asking ------------------------------------------------------------------------------------------------------
    def ask(
        self,
        rank: int,
        request: Message,
        deadline: float,
        *,
        more_bytes: int = 0,
        max_shares: int = 0,
        retry: bool = True,
    ) -> tuple[Message, list[Descriptor]]:
        """What ``rank`` answers, in at most `MAX_REQUEST_NBYTES` and ``more_bytes``; descriptors are the caller's.

        With ``retry``, a rank that has not come yet is waited for. Raises `Refused` with the rank's own words.
        """
        payload = json.dumps({"token": self._rendezvous.token.hex(), **request}).encode()
        with self._connect(rank, deadline, retry) as sock:
            try:
                send(sock, payload, deadline=deadline)
                max_bytes = MAX_REQUEST_NBYTES + more_bytes
                told, descriptors = receive(
                    sock, max_bytes=max_bytes, max_fds=max_shares, deadline=deadline, ledger=self._ledger
                )
            except ExchangeError as error:
                self.raise_failure()  # this rank's own is why the other left
                why = self._why_not(error) + self.complaint(rank)
                raise ExchangeError(f"asking rank {rank} for {request['ask']!r}: {why}") from error
        self._met.add(rank)
        try:
            answer = json.loads(told)
            refusal = answer.get("error")
        except (ValueError, AttributeError, RecursionError):
            answer, refusal = {}, "its answer is not a JSON object"
        if refusal is not None:
            close_shares(descriptors)
            self.raise_failure()  # because of which the other may have given up
            raise Refused(f"rank {rank} refused: {refusal}")
        return answer, descriptors

    def listens(self, rank: int) -> bool:
        """Whether a process listens as ``rank``, which the kernel knows; it may be too busy to answer."""
        try:
            with self._connect(rank, time.monotonic(), retry=False):
                return True
        except _QueueFull:
            return True
        except ExchangeError:
            return False

    def complaint(self, rank: int) -> str:
        """The end of a sentence which says that ``rank`` is not there."""
        return f"; what it asked was refused: {self.complaints[rank]}" if rank in self.complaints else ""

    def raise_failure(self) -> None:
        """Raise what this rank has failed by meanwhile."""
        if self.failure is not None:
            raise self.failure

    def _why_not(self, error: ExchangeError) -> str:
        if self._rendezvous.token_is_there():
            return str(error)
        return (
            f"a process listens there that does not know this rank's token: {self._rendezvous.directory} was emptied, "
            "or made anew, since this rank came"
        )

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        """A connection to ``rank``, which may not have come yet."""
        path = self._rendezvous.socket_path(rank)
        with _unix_socket(f"connect to rank {rank}") as sock:
            sock.setblocking(False)  # where too many wait to be answered, `connect` would wait beyond the deadline
            while True:
                try:
                    if not stat.S_ISSOCK(path.lstat().st_mode):
                        raise ExchangeError(f"cannot connect to rank {rank}: {path} is not a socket")
                    sock.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError) as error:  # not there yet, or a dead rank's socket
                    self.raise_failure()
                    if rank in self._met or rank in self.complaints:
                        gone = f"rank {rank} left: nobody listens at {path} any more"
                        raise ExchangeError(gone + self.complaint(rank)) from error
                    if not retry or time.monotonic() > deadline:
                        absent = f"rank {rank} did not come: nobody listens at {path}"
                        raise ExchangeError(absent + self._of_strangers()) from error
                except BlockingIOError as error:
                    if not retry or time.monotonic() > deadline:
                        raise _QueueFull(f"rank {rank} takes no connections at {path}") from error
                except OSError as error:
                    raise ExchangeError(f"cannot connect to rank {rank} at {path}: {_reason(error)}") from error
                time.sleep(_RETRY_SECONDS)
            if (uid := peer_uid(sock)) != os.getuid():
                raise ExchangeError(f"cannot connect to rank {rank}: user {uid} listens at {path}")
            yield sock

    def _of_strangers(self) -> str:
        if not self._strangers:
            return ""
        there = self._rendezvous.directory
        return f"; but a process came that knows another token: {there} was emptied, or made anew, since it was started"

    # -- answering ---------------------------------------------------------------------------------------------------
    def serve(self, deadline: float) -> None:
        """Start answering others. Raises `ExchangeError` if this rank cannot, and has left nothing behind then."""
        path = self._rendezvous.socket_path(self._rank)
        # Bound under another name and then renamed: whoever finds the socket can connect to it, and one that a dead
        # process left behind is replaced.
        bound = path.with_name(f".{path.name}-{os.getpid()}")
        listener = _unix_socket(f"listen as rank {self._rank}")
        claimed: tuple[Path, ...] = ()
        try:
            with self._rendezvous.locked(deadline):  # of two that come as one rank, the second finds the first
                if self.listens(self._rank):
                    raise FileExistsError(errno.EEXIST, "another process does")
                claimed = bound, path
                bound.unlink(missing_ok=True)  # of a process that died here, and had this one's number
                listener.bind(str(bound))
                listener.listen(MAX_CLIENTS)
                os.replace(bound, path)
                self._rendezvous.listens_at(path)
            self._start(self._accept, listener)
        except BaseException as error:
            for made in claimed:
                with contextlib.suppress(OSError):
                    made.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it never listened
                listener.shutdown(socket.SHUT_RDWR)
            if listener not in self._clients.values():  # or the thread that has it ends now, and closes it
                listener.close()
            if not isinstance(error, OSError | RuntimeError):  # RuntimeError: no more threads
                raise
            raise ExchangeError(f"rank {self._rank} cannot listen at {path}: {_reason(error)}") from error

    def _start(self, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = _CountedThread(self._ledger, lambda: self._run(thread, run, sock))
        # `close`, which joins what it finds, is to find no thread that does not run yet, and every one that does.
        with uninterrupted(), self._changed:
            thread.start()
            self._clients[thread] = sock

    def _run(self, thread: _CountedThread, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        try:
            with sock:
                run(sock)
        finally:
            with self._changed:
                self._clients.pop(thread, None)
                self._changed.notify_all()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._clients) <= MAX_CLIENTS)
            try:
                client, _ = listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # `close` has shut it down
                time.sleep(_RETRY_SECONDS)  # the client is gone, or this process has no descriptor left for now
                continue
            try:
                self._start(self._answer, client)
            except RuntimeError:  # no more threads for now; the client is told by the end of the connection
                client.close()

    def _answer(self, client: socket.socket) -> None:
        """One request. A client that is slow, foreign or mistaken costs its own connection and nothing else."""
        shares: list[Share] = []
        try:
            if peer_uid(client) != os.getuid():
                return
            payload, _ = receive(
                client,
                max_bytes=MAX_REQUEST_NBYTES,
                max_fds=0,
                deadline=time.monotonic() + self._patience,
                ledger=self._ledger,
            )
            request = self._checked(payload)
            if request is None:
                return
            with self._changed:
                self._replying.add(client)
            answer, shares = self._answer_to(request)
            self._complain(request.get("rank"), answer["error"])
            if shares:  # more than the kernel may take at once
                with self._changed:
                    self._replying.discard(client)
            fds = [share.fd for share in shares if isinstance(share, Descriptor)]
            send(client, json.dumps(answer).encode(), fds, deadline=time.monotonic() + self._patience)
        except ExchangeError:
            return
        finally:
            with self._changed:
                self._replying.discard(client)
            close_shares(shares)

    def _complain(self, rank: object, refusal: str | None) -> None:
        if type(rank) is not int or rank not in self._ranks:
            return
        if refusal is None:
            self.complaints.pop(rank, None)
        else:
            self.complaints[rank] = refusal

    def _checked(self, payload: bytes) -> Message | None:
        """The request, if it is one and its sender knows the token; strangers are not answered."""
        try:
            request: Message = json.loads(payload)
            token = bytes.fromhex(request["token"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if hmac.compare_digest(token, self._rendezvous.token):
            return request
        self._strangers = True
        return None

    def close(self) -> None:
        """Stop answering. A second call goes on where one failed.

        Clients are dropped, except those that are about to be told that their word counts: what this rank has gone on
        because of, its sender must know.
        """
        try:
            self._rendezvous.leave()
        finally:
            while self._clients:
                with self._changed:
                    running = dict(self._clients)
                    for thread, sock in running.items():
                        if sock not in self._replying and thread.is_alive():  # in a forked child, it is the parent's
                            with contextlib.suppress(OSError):  # the other end, or the thread itself, was faster
                                sock.shutdown(socket.SHUT_RDWR)
                for thread in running:
                    thread.join(_RETRY_SECONDS)
                    if not thread.is_alive():
                        self._clients.pop(thread, None)

    def forget(self) -> None:
        """In a forked child, which answers nobody: whoever looks for this rank is not to find the child's sockets."""
        for sock in self._clients.values():
            sock.close()


class _QueueFull(ExchangeError):
    """A process listens, and the kernel's queue of those who wait for it is full."""


def _unix_socket(purpose: str) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise ExchangeError(f"no socket to {purpose}: {error.strerror}") from error


def _reason(error: Exception) -> str:
    """What went wrong, in words; of an address that is too long for a socket, the kernel never hears."""
    return getattr(error, "strerror", None) or str(error)


class _CountedThread(threading.Thread):
    """A thread that the ledger counts while it runs."""

    def __init__(self, ledger: Ledger, run: Callable[[], None]) -> None:
        super().__init__(name="vmm-dwdp-exchange", daemon=True)
        self._counted_run = run
        self._ledger = ledger

    def run(self) -> None:
        token = self._ledger.add("threads", self.name)
        try:
            self._counted_run()
        finally:
            self._ledger.remove(token)

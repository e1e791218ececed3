"""Requests between the ranks of a group, through whatever door they have, and the threads that answer them.

A request is a JSON object, and so is the answer, with the sentence of a refusal or ``None`` under ``error``; where the
door takes descriptors, they come beside it. What is asked and answered is the business of `Exchange`, and how a rank is
reached, and how it proves who it is, that of the `Door`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import DWDPError, ExchangeError
from vmm_dwdp.group.door import MAX_CLIENTS, MAX_REQUEST_NBYTES, Absent, Door, Limits, Message, Silent, parse
from vmm_dwdp.memory.assembly import Share, close_shares

_RETRY_SECONDS: Final = 0.01


class Refused(ExchangeError):
    """The other rank is there, and says why it does not do what it was asked."""


class Transport:
    """One rank's door, and its way to the doors of others.

    Args:
        patience: seconds; a client that takes longer to ask, or to take the answer, is dropped.
        answer: gives the answer to a request of a member of the group, and the shares to send with it, which
            become the transport's. It runs in a thread of its own for each request.

    Attributes:
        complaints: by rank, why the latest request of a process that came as this rank was refused. If it is not there
            any more, that is likely to be why.
        patience: as it was given; whoever owns it may change it.
        failure: why this rank cannot go on, whatever others do: found in answering one of them.
    """

    def __init__(
        self,
        door: Door,
        ledger: Ledger,
        rank: int,
        group_size: int,
        patience: float,
        answer: Callable[[Message], tuple[Message, list[Share]]],
    ) -> None:
        self.complaints: dict[int, str] = {}
        self.failure: DWDPError | None = None
        self._door = door
        self._ledger = ledger
        self._rank = rank
        self._ranks = range(group_size)
        self.patience = patience
        self._answer_to = answer
        self._clients: dict[_CountedThread, socket.socket] = {}
        self._replying: set[socket.socket] = set()  # of clients that are told a few words, without waiting for them
        self._changed = threading.Condition()  # guards both
        self._met: set[int] = set()  # ranks that have answered: if one is not there any more, it has left

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
        limits = Limits(MAX_REQUEST_NBYTES + more_bytes, max_shares if self._door.takes_descriptors else 0)
        with self._connect(rank, deadline, retry) as sock:
            try:
                told, descriptors = self._door.ask(sock, rank, request, limits, deadline, self._ledger)
            except ExchangeError as error:
                self.raise_failure()  # this rank's own is why the other left
                why = self._door.why_not(rank, error) + self.complaint(rank)
                raise ExchangeError(f"asking rank {rank} for {request['ask']!r}: {why}") from error
        self._met.add(rank)
        answer = parse(told)
        refusal = "its answer is not a JSON object" if answer is None else answer.get("error")
        if refusal is not None or answer is None:
            close_shares(descriptors)
            self.raise_failure()  # because of which the other may have given up
            raise Refused(f"rank {rank} refused: {refusal}")
        return answer, descriptors

    def require_connects(self, rank: int) -> None:
        """Raise `ExchangeError` if ``rank`` refuses a connection, or does not take one in the moment that it needs."""
        with self._connect(rank, time.monotonic() + self._door.look_seconds, retry=False):
            pass

    def listens(self, rank: int) -> bool:
        """Whether a process listens as ``rank``; it may be too busy to answer, or its host not to be heard of."""
        try:
            self.require_connects(rank)
        except Silent:
            return True
        except ExchangeError:
            return False
        return True

    def complaint(self, rank: int) -> str:
        """The end of a sentence which says that ``rank`` is not there."""
        return f"; what it asked was refused: {self.complaints[rank]}" if rank in self.complaints else ""

    def raise_failure(self) -> None:
        """Raise what this rank has failed by meanwhile."""
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        """A connection to ``rank``, which may not have come yet."""
        while True:
            try:
                sock = self._door.connect(rank, deadline)
                break
            except Absent as error:
                self.raise_failure()
                address = self._door.address(rank)
                if rank in self._met or rank in self.complaints:
                    gone = f"rank {rank} left: nobody listens at {address} any more"
                    raise ExchangeError(gone + self.complaint(rank)) from error
                if not retry or time.monotonic() > deadline:
                    absent = f"rank {rank} did not come: nobody listens at {address}"
                    raise ExchangeError(absent + self._door.strangers()) from error
            except Silent:
                self.raise_failure()
                if not retry or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_SECONDS)
        with sock:
            yield sock

    # -- answering ---------------------------------------------------------------------------------------------------
    def serve(self, deadline: float) -> None:
        """Start answering others. Raises `ExchangeError` if this rank cannot; `close` undoes what there is by then."""
        listener = self._door.listen(self._rank, deadline, lambda: self.listens(self._rank))
        try:
            self._start(self._accept, listener)
        except BaseException as error:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            if listener not in self._clients.values():  # or the thread that has it ends now, and closes it
                listener.close()
            if not isinstance(error, RuntimeError):  # no more threads
                raise
            address = self._door.address(self._rank)
            raise ExchangeError(f"rank {self._rank} cannot listen at {address}: {error}") from error

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
            by = time.monotonic() + min(self.patience, self._door.stranger_seconds)
            heard = self._door.hear(client, by, self._ledger)
            if heard is None:
                return
            with self._changed:
                self._replying.add(client)
            answer, shares = self._answer_to(heard.request)
            self._complain(heard.request.get("rank"), answer["error"])
            if shares:  # more than the kernel may take at once
                with self._changed:
                    self._replying.discard(client)
            fds = [share.fd for share in shares if isinstance(share, Descriptor)]
            heard.reply(json.dumps(answer).encode(), fds, time.monotonic() + self.patience)
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

    def close(self) -> None:
        """Stop answering. A second call goes on where one failed.

        Clients are dropped, except those that are about to be told that their word counts: what this rank has gone on
        because of, its sender must know.
        """
        try:
            self._door.leave()
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

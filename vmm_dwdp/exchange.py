"""Who holds what, and handing over the memory: every rank serves its shares on a Unix socket of a private directory.

There is no collective. A rank asks each holder for what it needs, waits until a deadline, and names the rank that did
not answer. When it has all it needs it says so to every other rank, and waits to hear the same from them: from then on
it may leave or die without harm to anybody.

A request is a JSON object with the token of the rendezvous. The answer is a JSON object with the shares as descriptors
beside it, or as hexadecimal bytes inside it, or with the sentence of a refusal.
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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import peer_uid, receive, send
from vmm_dwdp.assembly import Share, close_shares
from vmm_dwdp.errors import DWDPError, ExchangeError
from vmm_dwdp.placement import HOST, Owner
from vmm_dwdp.rendezvous import Rendezvous

PROTOCOL_VERSION: Final = 1
MAX_REQUEST_NBYTES: Final = 4096
MAX_CLIENTS: Final = 64  # at one time; more wait in the kernel's queue
_SHARE_NBYTES: Final = 1024  # generous for one token in an answer
_VALUE_NBYTES: Final = 32  # for one checksum
_RETRY_SECONDS: Final = 0.01
_LOOK_SECONDS: Final = 0.25  # how often a rank that waits for others looks whether they are alive

Ask = Literal["shares", "checksums", "say", "unsay", "bind", "alive"]


class Exchange:
    """One rank's door: what it serves to others, and what it asks of them.

    Args:
        fingerprint: equal on two ranks exactly if their configs and layers are.
        group_size: how many ranks there are, this one included.
        patience: seconds; a client that takes longer to ask, or to take the answer, is dropped.
        shares: gives the shares of an owner whose memory this rank holds; descriptors in them become the exchange's.
        checksums: gives what `collect_checksums` of an owner returns to others.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        ledger: Ledger,
        rank: int,
        group_size: int,
        patience: float,
        fingerprint: str,
        shares: Callable[[Owner], list[Share]],
        checksums: Callable[[Owner], list[int]],
    ) -> None:
        self._rendezvous = rendezvous
        self._ledger = ledger
        self._rank = rank
        self._ranks = range(group_size)
        self._patience = patience
        self._fingerprint = fingerprint
        self._shares = shares
        self._checksums = checksums
        self._listener: socket.socket | None = None
        self._clients: dict[_CountedThread, socket.socket] = {}
        self._changed = threading.Condition()  # guards `_clients` and the three fields of an agreement
        self._complete = False  # whether the group is published
        self._failure: DWDPError | None = None  # why another rank cannot publish with this one, nor this one with it
        self._heard: dict[str, set[int]] = {}  # who has said what
        self._waiting = False  # for others, to do together what nobody may do alone
        self._bound = False  # another rank relies on this one's going on
        self._met: set[int] = set()  # ranks that have answered: if one is not there any more, it has left

    # -- asking ------------------------------------------------------------------------------------------------------
    def collect(self, owner: Owner, holder: int, count: int, deadline: float) -> list[Share]:
        """The ``count`` shares of ``owner``, served by rank ``holder``; descriptors in them are the caller's."""
        answer, descriptors = self._ask(holder, "shares", deadline, owner=owner, max_shares=count)
        try:
            shares: list[Share] = [*descriptors, *map(bytes.fromhex, answer.get("tokens", ()))]
            if len(shares) != count:
                raise ExchangeError(f"rank {holder} sent {len(shares)} shares of {owner} instead of {count}")
        except (TypeError, ValueError) as error:
            close_shares(descriptors)
            raise ExchangeError(f"rank {holder} sent tokens that are not hexadecimal: {error}") from error
        except ExchangeError:
            close_shares(descriptors)
            raise
        return shares

    def collect_checksums(self, owner: Owner, holder: int, count: int, deadline: float) -> list[int]:
        """The ``count`` checksums of the shards of ``owner``, as rank ``holder`` knows them."""
        answer, _ = self._ask(holder, "checksums", deadline, owner=owner, max_values=count)
        checksums = answer.get("checksums")
        if not isinstance(checksums, list) or len(checksums) != count or not all(type(sum) is int for sum in checksums):
            raise ExchangeError(f"rank {holder} did not send {count} checksums of {owner}")
        return checksums

    def agree(self, what: str, ranks: Collection[int], deadline: float) -> None:
        """Say ``what`` to ``ranks``, and wait until each of them has said it since the last time."""
        for rank in ranks:
            self._ask(rank, "say", deadline, what=what)
        while missing := self._missing(what, ranks):
            self._raise_failure()
            for rank in missing:
                if not self.listens(rank):
                    raise ExchangeError(f"rank {rank} left while others waited for it ({what})")
            if time.monotonic() > deadline:
                ranks_missing = ", ".join(map(str, missing))
                raise ExchangeError(f"not ready before the deadline, though there: rank {ranks_missing} ({what})")
        with self._changed:
            del self._heard[what]

    def agree_to_begin(self, what: str, ranks: Collection[int], deadline: float) -> None:
        """`agree` by all ranks or by none: when it returns, every one of ``ranks`` is sure to go on.

        Raises `ExchangeError` naming the rank that did not come; `bound` then tells whether others may have gone on.
        """
        with self._changed:
            self._waiting, self._bound = True, False
        try:
            self.agree(what, ranks, deadline)
            for rank in ranks:
                self._ask(rank, "bind", deadline)
        except BaseException:
            with self._changed:
                self._waiting = False
                self._heard.pop(what, None)
            for rank in ranks:
                with contextlib.suppress(ExchangeError):
                    self._ask(rank, "unsay", time.monotonic() + _LOOK_SECONDS, what=what, retry=False)
            raise

    @property
    def bound(self) -> bool:
        """Whether another rank was told, in the latest `agree_to_begin`, that this one goes on."""
        with self._changed:
            return self._bound

    def complete(self) -> None:
        """The group is published: from now on, a request that cannot be answered concerns only whoever made it."""
        self._complete = True
        self._failure = None

    def _fail(self, failure: DWDPError) -> None:
        if not self._complete:
            self._failure = failure

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _missing(self, what: str, ranks: Collection[int]) -> list[int]:
        """Those who have not said ``what`` yet, after waiting for a moment for them to do so."""
        with self._changed:
            heard = self._heard.setdefault(what, set())
            self._changed.wait_for(lambda: heard.issuperset(ranks), _LOOK_SECONDS)
            return sorted(set(ranks) - heard)

    def alive(self, rank: int, deadline: float) -> bool:
        """Whether ``rank`` is there and answers by the deadline."""
        try:
            self._ask(rank, "alive", deadline, retry=False)
        except ExchangeError:
            return False
        return True

    def listens(self, rank: int) -> bool:
        """Whether a process listens as ``rank``, which the kernel knows; it may be too busy to answer."""
        try:
            with self._connect(rank, time.monotonic(), retry=False):
                return True
        except _QueueFull:
            return True
        except ExchangeError:
            return False

    def _ask(
        self,
        rank: int,
        ask: Ask,
        deadline: float,
        *,
        owner: Owner | None = None,
        what: str = "",
        max_shares: int = 0,
        max_values: int = 0,
        retry: bool = True,
    ) -> tuple[dict[str, Any], list[Descriptor]]:
        request = {
            "version": PROTOCOL_VERSION,
            "token": self._rendezvous.token.hex(),
            "fingerprint": self._fingerprint,
            "rank": self._rank,
            "ask": ask,
            "owner": owner,
            "what": what,
        }
        with self._connect(rank, deadline, retry) as sock:
            try:
                send(sock, json.dumps(request).encode(), deadline=deadline)
                max_bytes = MAX_REQUEST_NBYTES + max_shares * _SHARE_NBYTES + max_values * _VALUE_NBYTES
                payload, descriptors = receive(
                    sock, max_bytes=max_bytes, max_fds=max_shares, deadline=deadline, ledger=self._ledger
                )
            except ExchangeError as error:
                self._raise_failure()  # this rank's own is why the other left
                raise ExchangeError(f"asking rank {rank} for {ask!r}: {error}") from error
        self._met.add(rank)
        try:
            answer = json.loads(payload)
            refusal = answer.get("error")
        except (ValueError, AttributeError, RecursionError):
            answer, refusal = {}, "its answer is not a JSON object"
        if refusal is not None:
            close_shares(descriptors)
            raise ExchangeError(f"rank {rank} refused: {refusal}")
        return answer, descriptors

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
                    self._raise_failure()
                    if rank in self._met:
                        raise ExchangeError(f"rank {rank} left: nobody listens at {path} any more") from error
                    if not retry or time.monotonic() > deadline:
                        raise ExchangeError(f"rank {rank} did not come: nobody listens at {path}") from error
                except BlockingIOError as error:
                    if not retry or time.monotonic() > deadline:
                        raise _QueueFull(f"rank {rank} takes no connections at {path}") from error
                except OSError as error:
                    raise ExchangeError(f"cannot connect to rank {rank} at {path}: {_reason(error)}") from error
                time.sleep(_RETRY_SECONDS)
            if (uid := peer_uid(sock)) != os.getuid():
                raise ExchangeError(f"cannot connect to rank {rank}: user {uid} listens at {path}")
            yield sock

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
            self._start(self._accept, listener)
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
            for made in claimed:
                with contextlib.suppress(OSError):
                    made.unlink(missing_ok=True)
            listener.close()
            raise ExchangeError(f"rank {self._rank} cannot listen at {path}: {_reason(error)}") from error
        self._listener = listener

    def _start(self, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = _CountedThread(self._ledger, lambda: self._run(thread, run, sock))
        with self._changed:  # so that `close`, which joins what it finds, finds no thread that does not run yet
            thread.start()
            self._clients[thread] = sock

    def _run(self, thread: _CountedThread, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        try:
            with sock:
                run(sock)
        finally:
            with self._changed:
                del self._clients[thread]
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
            answer: dict[str, Any] = {"error": self._refusal(request)}
            if answer["error"] is not None:
                self._fail(ExchangeError(f"rank {request.get('rank')} cannot be answered: {answer['error']}"))
            else:
                try:
                    match request["ask"]:
                        case "shares":
                            shares = self._shares(request["owner"])
                            answer["tokens"] = [share.hex() for share in shares if isinstance(share, bytes)]
                        case "checksums":
                            answer["checksums"] = self._checksums(request["owner"])
                        case "bind":
                            self._bind()
                except DWDPError as error:
                    answer["error"] = str(error)
                    self._fail(error)
            fds = [share.fd for share in shares if isinstance(share, Descriptor)]
            send(client, json.dumps(answer).encode(), fds, deadline=time.monotonic() + self._patience)
            if answer["error"] is None and request["ask"] in ("say", "unsay"):
                self._hear(request["rank"], request["what"], takes_back=request["ask"] == "unsay")
        except ExchangeError:
            return
        finally:
            close_shares(shares)

    def _hear(self, rank: int, what: str, takes_back: bool) -> None:
        with self._changed:
            heard = self._heard.setdefault(what, set())
            heard.discard(rank) if takes_back else heard.add(rank)
            self._changed.notify_all()

    def _bind(self) -> None:
        with self._changed:
            if not self._waiting:
                raise ExchangeError(f"rank {self._rank} has given up waiting")
            self._bound = True

    def _checked(self, payload: bytes) -> dict[str, Any] | None:
        """The request, if it is one and its sender knows the token; strangers are not answered."""
        try:
            request = json.loads(payload)
            token = bytes.fromhex(request["token"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return request if hmac.compare_digest(token, self._rendezvous.token) else None

    def _refusal(self, request: dict[str, Any]) -> str | None:
        """Why the request of a member cannot be answered."""
        if request.get("version") != PROTOCOL_VERSION:
            return f"it speaks version {PROTOCOL_VERSION} of the protocol, not {request.get('version')!r}"
        if request.get("fingerprint") != self._fingerprint:
            return "the configs or the layers of the two ranks differ"
        if request.get("rank") not in self._ranks:
            return f"the group has {len(self._ranks)} ranks, and none of them is {request.get('rank')!r}"
        if request.get("ask") not in get_args(Ask):
            return f"it does not know how to answer {request.get('ask')!r}"
        if not isinstance(request.get("what"), str):
            return f"it does not say what it says, but {request.get('what')!r}"
        if request["ask"] in ("shares", "checksums") and request.get("owner") not in (*self._ranks, HOST):
            return f"there is no owner {request.get('owner')!r}"
        return None

    def close(self) -> None:
        """Stop answering; drop clients that are being answered. A second call does nothing."""
        self._rendezvous.leave(None if self._listener is None else self._rank)
        while self._clients:
            with self._changed:
                running = dict(self._clients)
            for sock in running.values():
                with contextlib.suppress(OSError):  # the other end, or the thread itself, was faster
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in running:
                thread.join()
        self._listener = None

    def forget(self) -> None:
        """In a forked child, which does not answer: whoever looks for this rank is not to find the child's socket."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


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

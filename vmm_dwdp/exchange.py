"""Who holds what, and handing over the memory: every rank serves its shares on a Unix socket of a private directory.

There is no collective. A rank asks each holder for what it needs, waits until a deadline, and names the rank that did
not answer. When it has all it needs it says so to every other rank, and waits to hear the same from them: from then on
it may leave or die without harm to anybody.

A request is a JSON object with the token of the rendezvous. The answer is a JSON object with the shares as descriptors
beside it, or as hexadecimal bytes inside it, or with the sentence of a refusal.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, Literal, get_args

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import peer_uid, receive, send
from vmm_dwdp.assembly import Share, close_shares
from vmm_dwdp.errors import DWDPError, ExchangeError
from vmm_dwdp.placement import Owner
from vmm_dwdp.rendezvous import Rendezvous

PROTOCOL_VERSION: Final = 1
MAX_REQUEST_NBYTES: Final = 4096
REQUEST_SECONDS: Final = 5.0  # a client that takes longer to ask, or to take the answer, is dropped
MAX_CLIENTS: Final = 64  # at one time; more wait in the kernel's queue
_SHARE_NBYTES: Final = 1024  # generous for one token in an answer
_RETRY_SECONDS: Final = 0.01
_LOOK_SECONDS: Final = 0.25  # how often a rank that waits for others looks whether they are alive

Ask = Literal["shares", "checksums", "say", "unsay", "bind", "alive"]


class Exchange:
    """One rank's door: what it serves to others, and what it asks of them.

    Args:
        fingerprint: equal on two ranks exactly if their configs and layers are.
        shares: gives the shares of an owner whose memory this rank holds; descriptors in them become the exchange's.
        checksums: gives what `collect_checksums` of an owner returns to others.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        ledger: Ledger,
        rank: int,
        fingerprint: str,
        shares: Callable[[Owner], list[Share]],
        checksums: Callable[[Owner], list[int]],
    ) -> None:
        self._rendezvous = rendezvous
        self._ledger = ledger
        self._rank = rank
        self._fingerprint = fingerprint
        self._shares = shares
        self._checksums = checksums
        self._listener: socket.socket | None = None
        self._clients: dict[_CountedThread, socket.socket] = {}
        self._changed = threading.Condition()  # guards `_clients` and the three fields of an agreement
        self._failure: DWDPError | None = None  # why another rank cannot publish with this one, nor this one with it
        self._heard: dict[str, set[int]] = {}  # who has said what
        self._waiting = False  # for others, to do together what nobody may do alone
        self._bound = False  # another rank relies on this one's going on
        self._met: set[int] = set()  # ranks that have answered: if one is not there any more, it has left

    # -- asking ------------------------------------------------------------------------------------------------------
    def collect(self, owner: Owner, holder: int, count: int, deadline: float) -> list[Share]:
        """The ``count`` shares of ``owner``, served by rank ``holder``; descriptors in them are the caller's."""
        answer, descriptors = self._ask(holder, "shares", deadline, owner=owner, max_shares=count)
        shares: list[Share] = [*descriptors, *map(bytes.fromhex, answer.get("tokens", ()))]
        if len(shares) != count:
            close_shares(descriptors)
            raise ExchangeError(f"rank {holder} sent {len(shares)} shares of {owner} instead of {count}")
        return shares

    def collect_checksums(self, owner: Owner, holder: int, deadline: float) -> list[int]:
        """The checksums of the shards of ``owner``, as rank ``holder`` knows them."""
        answer, _ = self._ask(holder, "checksums", deadline, owner=owner)
        return [int(value) for value in answer["checksums"]]

    def agree(self, what: str, ranks: Collection[int], deadline: float) -> None:
        """Say ``what`` to ``ranks``, and wait until each of them has said it since the last time."""
        for rank in ranks:
            self._ask(rank, "say", deadline, what=what)
        while missing := self._missing(what, ranks):
            self._raise_failure()
            for rank in missing:
                if not self.alive(rank):
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

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _missing(self, what: str, ranks: Collection[int]) -> list[int]:
        """Those who have not said ``what`` yet, after waiting for a moment for them to do so."""
        with self._changed:
            heard = self._heard.setdefault(what, set())
            self._changed.wait_for(lambda: heard.issuperset(ranks), _LOOK_SECONDS)
            return sorted(set(ranks) - heard)

    def alive(self, rank: int) -> bool:
        """Whether ``rank`` answers now."""
        try:
            self._ask(rank, "alive", time.monotonic() + REQUEST_SECONDS, retry=False)
        except ExchangeError:
            return False
        return True

    def _ask(
        self,
        rank: int,
        ask: Ask,
        deadline: float,
        *,
        owner: Owner | None = None,
        what: str = "",
        max_shares: int = 0,
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
                max_bytes = MAX_REQUEST_NBYTES + max_shares * _SHARE_NBYTES
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
        except (ValueError, AttributeError):
            answer, refusal = {}, "its answer is not a JSON object"
        if refusal is not None:
            close_shares(descriptors)
            raise ExchangeError(f"rank {rank} refused: {refusal}")
        return answer, descriptors

    @contextlib.contextmanager
    def _connect(self, rank: int, deadline: float, retry: bool) -> Iterator[socket.socket]:
        """A connection to ``rank``, which may not have come yet."""
        path = self._rendezvous.socket_path(rank)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            while True:
                try:
                    sock.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError) as error:  # not there yet, or a dead rank's socket
                    self._raise_failure()
                    if rank in self._met:
                        raise ExchangeError(f"rank {rank} left: nobody listens at {path} any more") from error
                    if not retry or time.monotonic() > deadline:
                        raise ExchangeError(f"rank {rank} did not come: nobody listens at {path}") from error
                    time.sleep(_RETRY_SECONDS)
                except OSError as error:
                    raise ExchangeError(f"cannot connect to rank {rank} at {path}: {error.strerror}") from error
            yield sock

    # -- answering ---------------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Start answering others."""
        path = self._rendezvous.socket_path(self._rank)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Bound under another name and then renamed: whoever finds the socket can connect to it, and one that a dead
            # process left behind is replaced.
            bound = path.with_name(f".{path.name}-{os.getpid()}")
            listener.bind(str(bound))
            listener.listen(MAX_CLIENTS)
            os.replace(bound, path)
        except OSError as error:
            listener.close()
            raise ExchangeError(f"rank {self._rank} cannot listen at {path}: {error.strerror}") from error
        self._listener = listener
        self._start(self._accept, listener)

    def _start(self, run: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = _CountedThread(self._ledger, lambda: self._run(thread, run, sock))
        with self._changed:
            self._clients[thread] = sock
        thread.start()

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
            except OSError:
                return  # `close` has shut it down
            self._start(self._answer, client)

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
                deadline=time.monotonic() + REQUEST_SECONDS,
                ledger=self._ledger,
            )
            request = self._checked(payload)
            if request is None:
                return
            answer: dict[str, Any] = {"error": self._refusal(request)}
            if answer["error"] is not None:
                self._failure = ExchangeError(f"rank {request.get('rank')} cannot be answered: {answer['error']}")
            if answer["error"] is None:
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
                    self._failure = error
            fds = [share.fd for share in shares if isinstance(share, Descriptor)]
            send(client, json.dumps(answer).encode(), fds, deadline=time.monotonic() + REQUEST_SECONDS)
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
        if not isinstance(request.get("rank"), int) or not isinstance(request.get("what"), str):
            return "the request does not say which rank asks, or what it says"
        if request.get("ask") not in get_args(Ask):
            return f"it does not know how to answer {request.get('ask')!r}"
        return None

    def close(self) -> None:
        """Stop answering; drop clients that are being answered. A second call does nothing."""
        if self._listener is None:
            return
        self._rendezvous.leave(self._rank)
        while self._clients:
            with self._changed:
                running = dict(self._clients)
            for sock in running.values():
                with contextlib.suppress(OSError):  # the other end, or the thread itself, was faster
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in running:
                thread.join()
        self._listener = None


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

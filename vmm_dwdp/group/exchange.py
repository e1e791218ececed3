"""Who holds what, and handing over the memory; what the ranks say to each other, and what they agree on.

There is no collective. A rank asks each holder for what it needs, waits until a deadline, and names the rank that did
not answer. Shares come as descriptors beside the answer, or as hexadecimal bytes inside it. What must be done by all or
by none is an attempt, to which all bind themselves first: see [Note: Names of attempts].

A group is published under the name of that attempt, and has it from then on: what a process of another group says, be
it one that failed to publish before, or was started anew where it should have rejoined, counts for nothing.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple, get_args

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.errors import DriverError, DWDPError, ExchangeError
from vmm_dwdp.group import agreement
from vmm_dwdp.group.agreement import Agreement, Answer, Purpose, Vector, Word, named
from vmm_dwdp.group.door import Door, Message
from vmm_dwdp.group.transport import Refused, Transport
from vmm_dwdp.layout.placement import HOST, Owner
from vmm_dwdp.memory.assembly import Place, Share, close_shares

PROTOCOL_VERSION: Final = 5
PUBLISHING: Final = ""  # in the place of a group's name
UNSTATED: Final = ""  # in the place of a revision, before `publish`
_SHARE_NBYTES: Final = 1024  # generous for one token in an answer
_VALUE_NBYTES: Final = 32  # for one number
_NONCE_NBYTES: Final = 6
_LOOK_SECONDS: Final = 0.25  # how often a rank that waits for others looks whether they are alive

Numbers = Literal["checksums", "routed", "order"]  # of an owner's shards; of a rank's tokens; of all experts
Ask = Literal["shares", Numbers, "lines", "say", "bind", "step", "alive"]
_WORDS: Final = ("say", "bind", "step")


class Joined(NamedTuple):
    """What the living ranks tell one that comes back."""

    holder: int  # who can hand over its memory
    asleep: bool  # whether any of them sleeps
    settled: int | None  # how many experts each rank holds, if that was left to them


class Exchange:
    """What one rank asks of the others, and answers them.

    Args:
        fingerprint: equal on two ranks exactly if their configs and layers are.
        group_size: how many ranks there are, this one included.
        patience: seconds; a client that takes longer to ask, or to take the answer, is dropped.
        shares: gives the shares of an owner whose memory this rank holds, at the place that is asked for if it can,
            and the place; descriptors in them become the exchange's.
        numbers: gives what `collect_numbers` returns to others.
        asleep: whether this rank sleeps.
        lines: gives a descriptor of the lines by which runs are chosen, which becomes the exchange's.

    Attributes:
        settled: how many experts each rank holds, once all have settled on it.
    """

    def __init__(
        self,
        door: Door,
        ledger: Ledger,
        rank: int,
        group_size: int,
        patience: float,
        fingerprint: str,
        shares: Callable[[Owner, Place], tuple[Place, list[Share]]],
        numbers: Callable[[Numbers, Owner], list[int]],
        asleep: Callable[[], bool],
        lines: Callable[[], Descriptor],
    ) -> None:
        self._rank = rank
        self._others = [other for other in range(group_size) if other != rank]
        self._fingerprint = fingerprint
        self._revision: str | None = UNSTATED
        self.settled: int | None = None
        self._shares = shares
        self._numbers = numbers
        self._asleep = asleep
        self._lines = lines
        self._transport = Transport(door, ledger, rank, group_size, patience, self._answer)
        self._changed = threading.Condition()  # guards `_agreement` and `_group`
        self._agreement = Agreement(rank, group_size)
        self._group = PUBLISHING
        self.serve = self._transport.serve
        self.listens = self._transport.listens

    def close(self) -> None:
        """Stop answering. A second call goes on where one failed."""
        self._transport.close()

    def forget(self) -> None:
        """In a forked child, which answers nobody."""
        self._transport.forget()

    def state(self, revision: str | None, patience: float) -> None:
        """What `publish` or `rejoin` is told. Ranks that say another ``revision`` are refused from now on."""
        self._revision = None if revision is None else hashlib.sha256(revision.encode()).hexdigest()
        self._transport.patience = patience

    # -- asking ------------------------------------------------------------------------------------------------------
    def collect(
        self, owner: Owner, holder: int, counts: Mapping[Place, int], deadline: float
    ) -> tuple[Place, list[Share]]:
        """The shares of ``owner``, served by rank ``holder``, and where they are; descriptors in them are the caller's.

        Args:
            counts: how many there are at each place that will do, the preferred one first.
        """
        request = self._request("shares", owner=owner, place=next(iter(counts)))
        most = max(counts.values())
        answer, descriptors = self._transport.ask(
            holder, request, deadline, more_bytes=most * _SHARE_NBYTES, max_shares=most
        )
        try:
            shares: list[Share] = [*descriptors, *map(bytes.fromhex, answer.get("tokens", ()))]
            at = next((each for each in counts if each == answer.get("place")), None)
            if at is None:
                raise ExchangeError(f"rank {holder} has no memory of {owner} at {', '.join(counts)}")
            if len(shares) != counts[at]:
                raise ExchangeError(f"rank {holder} sent {len(shares)} shares of {owner} instead of {counts[at]}")
        except (TypeError, ValueError) as error:
            close_shares(descriptors)
            raise ExchangeError(f"rank {holder} sent tokens that are not hexadecimal: {error}") from error
        except ExchangeError:
            close_shares(descriptors)
            raise
        return at, shares

    def collect_numbers(self, what: Numbers, owner: Owner, holder: int, count: int, deadline: float) -> list[int]:
        """The ``count`` numbers that rank ``holder`` knows of this kind, ``checksums`` as those of ``owner``."""
        request = self._request(what, owner=owner)
        answer, _ = self._transport.ask(holder, request, deadline, more_bytes=count * _VALUE_NBYTES)
        numbers = answer.get("numbers")
        if not isinstance(numbers, list) or len(numbers) != count or not all(type(each) is int for each in numbers):
            raise ExchangeError(f"rank {holder} did not send {count} {what} of {owner}")
        return numbers

    def collect_lines(self, holder: int, deadline: float) -> Descriptor:
        """The lines by which runs are chosen, as rank ``holder`` has them; the caller's."""
        _, descriptors = self._transport.ask(holder, self._request("lines"), deadline, max_shares=1)
        if len(descriptors) != 1:
            raise ExchangeError(f"rank {holder} did not send the lines by which runs are chosen")
        return descriptors[0]

    def alive(self, rank: int, deadline: float) -> bool:
        """Whether ``rank`` is there and answers by the deadline."""
        try:
            self._transport.ask(rank, self._request("alive"), deadline, retry=False)
        except ExchangeError:
            return False
        return True

    # -- what all do together ----------------------------------------------------------------------------------------
    @property
    def doubt(self) -> str | None:
        """Why weights may be partly written; ``None`` if they are not. See [Note: Who may have written]."""
        return self._agreement.doubt

    @property
    def was_relied_on(self) -> bool:
        """Whether anybody may have gone on in the latest attempt, because of this rank."""
        return self._agreement.relied

    @contextmanager
    def attempt(self, purpose: Purpose, what: str, deadline: float, offer: str = "") -> Iterator[None]:
        """The body is run by every rank, or by none: it begins when every one is sure to go on.

        Args:
            purpose: the same on all ranks; see [Note: What an attempt is for].
            what: this rank has done before.
            offer: what all are to know of it, see `offers`.

        Raises `ExchangeError` naming the rank that did not come. The body calls `step` for each step; if it ends well,
        this rank is in doubt no more.
        """
        try:
            with self._changed:
                self._agreement.begin(named(purpose, secrets.token_hex(_NONCE_NBYTES), offer))
            self._go_on(what, deadline)
            yield
        except BaseException as failure:
            with self._changed:
                self._agreement.give_up(str(failure) if isinstance(failure, ExchangeError) else None)
            raise
        with self._changed:
            self._agreement.finish()

    def offers(self) -> list[str]:
        """In an attempt: by rank, what each has offered; the same on all."""
        assert self._agreement.committed is not None
        return list(map(agreement.offer_of, self._agreement.committed))

    def step(self, number: int, what: str, deadline: float) -> None:
        """In an attempt: say that this rank has done ``what``, step 1 or `LAST_STEP`, and wait until all say so."""
        with self._changed:
            self._agreement.reach(number)
        self._go_on(what, deadline)

    def be_published(self) -> None:
        """At the end of the attempt to publish: the group has its name from now on."""
        with self._changed:
            assert self._agreement.committed is not None
            self._group = agreement.digest(self._agreement.committed)
        self._transport.failure = None

    def join(self, deadline: float, patience: float) -> Joined | None:
        """Come back to a published group; ``None`` if nobody lives.

        Every rank that listens is asked, each for at most ``patience`` seconds. `doubt` is then what they know.
        """
        groups: dict[int, str] = {}
        asleep, settled = False, None
        silent = []
        refusal: Refused | None = None
        for rank in filter(self.listens, self._others):
            try:
                answer, _ = self._transport.ask(rank, self._request("alive"), time.monotonic() + patience, retry=False)
                groups[rank] = str(answer.get("group"))
                asleep |= answer.get("asleep") is True
                settled = answer.get("settled")
            except Refused as error:
                refusal = error
            except ExchangeError:
                silent.append(rank)
        if refusal is not None:
            raise refusal
        if not groups:
            return None
        if PUBLISHING in groups.values() or len(set(groups.values())) > 1:
            raise ExchangeError("the other ranks are not of one published group")
        with self._changed:
            self._group = groups[min(groups)]
            self._agreement.join(groups)
            for rank in silent:
                self._agreement.silent(rank)
        while (following := self._next()) is not None:
            rank, word = following
            try:
                self._send(rank, word, min(deadline, time.monotonic() + patience))
            except ExchangeError:
                del groups[rank]
                with self._changed:
                    self._agreement.silent(rank)
        return Joined(min(groups), asleep, settled if type(settled) is int else None) if groups else None

    def _go_on(self, what: str, deadline: float) -> None:
        """Send and wait until the agreement has passed what it waits for."""
        while True:
            with self._changed:
                following, lost = self._agreement.next(), self._agreement.lost
                if following is None and not lost:
                    if self._agreement.passed:
                        return
                    heard = self._changed.wait_for(self._may_go_on, _LOOK_SECONDS)
                    self._agreement.look_again()
                missing = self._agreement.missing
            self._transport.raise_failure()
            if lost:
                raise ExchangeError(f"rank {lost[0]} gave up, or began anew, while others waited for it ({what})")
            if following is not None:
                self._send(*following, deadline)
            elif not heard:
                self._require_there(missing, what, deadline)

    def _may_go_on(self) -> bool:
        return self._agreement.passed or bool(self._agreement.next() or self._agreement.lost)

    def _require_there(self, missing: list[int], what: str, deadline: float) -> None:
        """Raise `ExchangeError` if one of those who are missing will not come, or not in time."""
        for rank in missing:
            if not self.listens(rank):
                why = self._transport.complaint(rank)
                raise ExchangeError(f"rank {rank} left while others waited for it ({what}){why}")
            if time.monotonic() > deadline:
                break
        if time.monotonic() > deadline:
            for rank in missing:
                self._transport.require_connects(rank)
            ranks_missing = ", ".join(map(str, missing))
            others = "".join(f"; rank {rank} attempts to {attempt}" for rank, attempt in self._others_attempt().items())
            raise ExchangeError(f"not ready before the deadline, though there: rank {ranks_missing} ({what}){others}")

    def _others_attempt(self) -> dict[int, Purpose]:
        with self._changed:
            return self._agreement.others_attempt

    def _next(self) -> tuple[int, Word] | None:
        with self._changed:
            return self._agreement.next()

    def _send(self, rank: int, word: Word, deadline: float) -> None:
        request = self._request(word.kind, vector=word.vector, step=word.step)
        told, _ = self._transport.ask(rank, request, deadline)
        vector = agreement.vector_of(told.get("vector"), len(word.vector))
        doubt = told.get("doubt")
        if vector is None or not isinstance(doubt, str | None):
            raise ExchangeError(f"rank {rank} does not say what it knows of the others")
        with self._changed:
            self._agreement.answered(rank, word, Answer(vector, told.get("counts") is True, doubt))

    def _request(self, ask: Ask, **more: Any) -> Message:
        return {
            "version": PROTOCOL_VERSION,
            "fingerprint": self._fingerprint,
            "revision": self._revision,
            "rank": self._rank,
            "group": self._group,
            "ask": ask,
            "owner": None,
            "vector": self._agreement.committed,
            "step": 0,
            "place": None,
            **more,
        }

    # -- answering ---------------------------------------------------------------------------------------------------
    def _answer(self, request: Message) -> tuple[Message, list[Share]]:
        """What a member is told; runs in a thread of the transport."""
        shares: list[Share] = []
        answer: Message = {"error": self._refusal(request)}
        if answer["error"] is not None:
            return answer, shares
        try:
            match request["ask"]:
                case "alive":
                    answer["group"] = self._group
                    answer["asleep"] = self._asleep()
                    answer["settled"] = self.settled
                case "shares":
                    answer["place"], shares = self._shares(request["owner"], request["place"])
                    answer["tokens"] = [share.hex() for share in shares if isinstance(share, bytes)]
                case "checksums" | "routed" | "order" as numbers:
                    answer["numbers"] = self._numbers(numbers, request["owner"])
                case "lines":
                    shares = [self._lines()]
                case kind:
                    vector = agreement.vector_of(request["vector"], 1 + len(self._others))
                    assert vector is not None
                    answer.update(self._hear(request["rank"], Word(kind, vector, request["step"]))._asdict())
        except DWDPError as error:
            answer["error"] = str(error)
            if self._group == PUBLISHING and isinstance(error, DriverError):
                self._transport.failure = error  # what it cannot give to one, nobody gets from it
        return answer, shares

    def _hear(self, rank: int, word: Word) -> Answer:
        with self._changed:
            answer = self._agreement.hear(rank, word)
            self._changed.notify_all()
        return answer

    def _refusal(self, request: Message) -> str | None:
        """Why the request of a member cannot be answered."""
        if request.get("version") != PROTOCOL_VERSION:
            return f"it speaks version {PROTOCOL_VERSION} of the protocol, not {request.get('version')!r}"
        if request.get("fingerprint") != self._fingerprint:
            return "the configs or the layers of the two ranks differ"
        if UNSTATED not in (request.get("revision"), self._revision) and request.get("revision") != self._revision:
            return "the two ranks were given different checkpoints: what they state as their revision differs"
        rank, ask = request.get("rank"), request.get("ask")
        if type(rank) is not int or rank not in self._others:
            return f"the group has {1 + len(self._others)} ranks, and none of the others is {rank!r}"
        if ask not in get_args(Ask):
            return f"it does not know how to answer {ask!r}"
        vector = agreement.vector_of(request.get("vector"), 1 + len(self._others))
        if ask in _WORDS and (vector is None or type(request.get("step")) is not int):
            return f"it does not say what it knows, but {request.get('vector')!r} and {request.get('step')!r}"
        if ask in ("shares", *get_args(Numbers)) and request.get("owner") not in (*self._others, self._rank, HOST):
            return f"there is no owner {request.get('owner')!r}"
        if ask == "shares" and request.get("place") not in get_args(Place):
            return f"there is no place {request.get('place')!r}"
        if vector is not None and self.settled is not None and agreement.purpose_of(vector[rank]) == "settle":
            return f"the others have settled on {self.settled} experts a rank already: start all anew, or rejoin"
        return None if ask == "alive" else self._refusal_of_group(request.get("group"), ask, vector)

    def _refusal_of_group(self, group: object, ask: object, name: Vector | None) -> str | None:
        """Why nothing that is said in the name of ``group`` counts here."""
        with self._changed:
            committed = self._agreement.committed
            if group == self._group:
                if group != PUBLISHING or ask in _WORDS or (name is not None and self._agreement.took_part(name)):
                    return None
                return f"rank {self._rank} is not in the attempt to publish that this is asked for"
            if self._group == PUBLISHING and committed is not None and group == agreement.digest(committed):
                return None  # the other was told first that all have published
        if group == PUBLISHING:
            return "its group is published already: a rank that has died comes back by rejoin"
        return "it is not, or not yet, of the group that asks"

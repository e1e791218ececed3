"""What the ranks of a group do together or not at all: the attempts, their names, and which words count for them.

Pure state: no sockets, no threads, no clock. Whoever owns an `Agreement` sends what `next` returns, gives the answers
to `answered`, and what comes from others to `hear`. All fields are values that never change, so that the explorer of
the tests copies and compares whole groups of them.

[Note: Names of attempts]
Every attempt of every rank has an entry that no other has: a number, which rises with each, and a random nonce. A rank
knows the latest entry of every rank, its own included: its vector. Vectors go with every word and every answer, and are
joined by taking the later entry of each rank; so what a rank knows only rises, and a late word changes nothing. An
entry without a nonce says that nothing is under way. A new process of a rank that died does not know its number: it
learns it from the first answer, and goes above it.

The name of an attempt of the group is the vector itself, once every entry has a nonce:

    say   my entry, to all         until all have heard it, and I have heard all of theirs
    bind  yourself to this vector  accepted by a rank only while this is exactly what it knows, and it waits itself
    ...   commit: all have accepted, and the vector is still what I know
    step  1, 2                     "I have written", "my edges are filled": under the vector that I committed

Where a bind is refused, the answer says what is newer, and the next try is under that name: nobody is stuck, and nobody
counts a word of another attempt. An entry, once overtaken, never comes back: neither does a name.

[Note: Who may have written]
Whoever writes has committed a name, to which all others have bound themselves. So a rank that did neither knows that
nobody wrote, and that nobody will: by giving up it takes a later entry, and no one can commit the old name any more.
A rank that did is in doubt (`doubt`), from before anybody can write until all have told it that they are done. To come
back is to take a later entry too, at every living rank: each answers that it is in doubt, or has now dropped what the
dead rank had promised. One that does not answer may be in doubt, so the rank that comes back is.

[Note: What an attempt is for]
A nonce begins with what its rank attempts (`named`). A name can be committed only where all attempt the same: ranks of
which one updates while another sleeps wait for each other until one of them gives up. Who moves memory writes nothing,
so it neither brings anybody into doubt nor takes a doubt away; to give weights up is to write without ever finishing.
Nor does who settles, before there is any memory: its nonce has an offer besides, and a name then has those of all.
Experts are moved by two attempts: to ``rebalance`` is to settle which, and to read them; to ``move`` is to write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Final, Literal, NamedTuple, cast, get_args

Entry = tuple[int, str]  # its number among those of its rank; its nonce, or "" where nothing is under way
Vector = tuple[Entry, ...]  # by rank
# See [Note: What an attempt is for].
Purpose = Literal["settle", "publish", "update", "give up", "sleep", "wake", "rebalance", "move"]

LAST_STEP: Final = 2  # the first tells that all have committed: see `Agreement.lost`
UNFINISHED: Final = "an update was begun, and not finished"
GIVEN_UP: Final = "sleep(keep=False) gave them up"
MOVING: Final = "experts were being moved, and not all ranks have finished"
_WRITES_NOTHING: Final = ("settle", "sleep", "wake", "rebalance")


def named(purpose: Purpose, random: str, offer: str = "") -> str:
    """The nonce of an attempt; ``random`` is of no other, and has no colon, nor has ``offer``."""
    return f"{purpose}:{offer}:{random}"


def purpose_of(entry: Entry) -> Purpose | None:
    """What the rank of ``entry`` attempts; ``None``: nothing, or nothing that is known here."""
    told = entry[1].partition(":")[0]
    return cast(Purpose, told) if told in get_args(Purpose) else None


def offer_of(entry: Entry) -> str:
    """What the rank of ``entry`` offers with its attempt."""
    return entry[1].partition(":")[2].partition(":")[0]


class Word(NamedTuple):
    """What one rank sends to another: with ``say`` what it knows; with ``bind`` and ``step`` the name of an attempt."""

    kind: Literal["say", "bind", "step"]
    vector: Vector
    step: int = 0


class Answer(NamedTuple):
    """What the sender of a word is told: what its receiver knows, and whether the word counts."""

    vector: Vector
    counts: bool
    doubt: str | None


class Agreement:
    """One rank's part. See [Note: Names of attempts] and [Note: Who may have written].

    Attributes:
        vector: the latest entry of every rank that is known here.
        committed: the name of the attempt under which this rank has gone on; ``None`` before and after.
        doubt: why somebody may have written and not all have finished; ``None`` if that is not so.
        relied: whether, in the latest attempt, anybody may have written.
    """

    def __init__(self, rank: int, group_size: int) -> None:
        self.vector: Vector = ((0, ""),) * group_size
        self.committed: Vector | None = None
        self.doubt: str | None = None
        self.relied = False
        self._rank = rank
        self._others = frozenset(range(group_size)) - {rank}
        self._audience: frozenset[int] = frozenset()  # who is to hear this rank's entry
        self._said: frozenset[int] = frozenset()  # who has
        self._accepted: frozenset[int] = frozenset()  # who is bound to `vector`
        self._refused: frozenset[int] = frozenset()  # to whom the latest word did not count, a moment ago
        self._bound: frozenset[Vector] = frozenset()  # names that others may commit because of this rank
        self._step = 0  # that this rank has reached
        self._told: frozenset[int] = frozenset()  # who knows
        self._heard: frozenset[tuple[Vector, int, int]] = frozenset()  # names, steps and who has reached them

    # -- the calls of whoever makes the attempt ----------------------------------------------------------------------
    def begin(self, nonce: str) -> None:
        """A new attempt of this rank; every rank of the group is to take part."""
        self.relied = False
        self._enter(nonce)
        self._audience = self._others
        self._commit_if_all_accept()

    def join(self, living: Collection[int]) -> None:
        """Come back as a rank that died: all that is to be known is known when ``living`` have answered."""
        self._enter("")
        self._audience = frozenset(living)

    def silent(self, rank: int) -> None:
        """One of the living does not answer a rank that joins."""
        self._audience -= {rank}
        self.doubt = f"rank {rank} does not tell whether an update was begun"

    def reach(self, step: int) -> None:
        """This rank has committed, and done what comes before ``step``, 1 or `LAST_STEP`: `next` tells the others."""
        self._step, self._told = step, frozenset()

    def finish(self) -> None:
        """All have reached the last step: there is no doubt any more, unless it was about something else."""
        purpose = purpose_of(self._own)
        self._enter("")
        if purpose == "give up":
            self.doubt = GIVEN_UP
        elif purpose not in _WRITES_NOTHING:
            self.doubt = None

    def give_up(self, why: str | None = None) -> None:
        """This attempt has failed, at whatever point, and ``why``. What was in doubt stays so."""
        if why is not None and self.relied and purpose_of(self._own) not in (*_WRITES_NOTHING, "give up"):
            self.doubt = why
        self._enter("")

    def next(self) -> tuple[int, Word] | None:
        """A rank, and the word to send to it now; ``None``: there is nothing to do but to wait."""
        if asked := self._audience - self._said:
            return self._first(asked), Word("say", self.vector)
        if self.committed is None:
            asked = self._others - self._accepted - self._refused
            return (self._first(asked), Word("bind", self.vector)) if asked and self._complete else None
        asked = self._others - self._told - self._refused
        return (self._first(asked), Word("step", self.committed, self._step)) if asked and self._step else None

    def answered(self, rank: int, word: Word, answer: Answer) -> None:
        """What ``rank`` told when it was sent ``word``, which may have been some time ago."""
        self._learn(answer.vector)
        match word.kind:
            case "say" if answer.vector[self._rank] == self.vector[self._rank]:
                self._said |= {rank}
                if not self._under_way and answer.doubt is not None:
                    self.doubt = f"rank {rank} says that {answer.doubt}"
            case "bind" if word.vector == self.vector:
                if answer.counts:
                    self._accepted |= {rank}
                    self._commit_if_all_accept()
                else:
                    self._refused |= {rank}
            case "step" if (word.vector, word.step) == (self.committed, self._step):
                if answer.counts:
                    self._told |= {rank}
                else:
                    self._refused |= {rank}

    def look_again(self) -> None:
        """Time has passed: whoever refused may be asked once more."""
        self._refused = frozenset()

    @property
    def passed(self) -> bool:
        """Whether this rank may go on: all have bound themselves, or reached the same step, or answered who joins."""
        if not self._under_way:
            return self._audience <= self._said
        return self.committed is not None and not (self._step and self.missing)

    @property
    def missing(self) -> list[int]:
        """For whom this rank waits."""
        if self.committed is not None:
            reached = {rank for name, step, rank in self._heard if (name, step) == (self.committed, self._step)}
            return sorted(self._others - (self._told & reached))
        silent = {rank for rank in self._others if not self.vector[rank][1]}
        return sorted(silent or self.others_attempt or self._others - self._accepted)

    @property
    def lost(self) -> list[int]:
        """Who has failed in the attempt that this rank has committed: it cannot end well any more.

        Before the last step that is everyone with a later entry, be it this rank itself, of whom a word of a former
        process came late: those who have not committed yet never will. From the last step on all have; whoever has
        reached it needs nothing more, and may be in the next attempt already.
        """
        if self.committed is None:
            return []
        needed = self.missing if self._step == LAST_STEP else range(len(self.vector))
        return [rank for rank in needed if self.vector[rank] != self.committed[rank]]

    # -- what comes from others --------------------------------------------------------------------------------------
    def hear(self, rank: int, word: Word) -> Answer:
        """A word of ``rank``, whenever it was sent."""
        self._learn(word.vector)
        counts = True
        if word.kind == "bind":
            counts = self._complete and word.vector == self.vector and self.committed in (None, word.vector)
            if counts:
                self._doubt()
                self._bound |= {word.vector}
        elif word.kind == "step":
            counts = word.vector in self._bound
            if counts:
                self._heard |= {(word.vector, word.step, rank)}
        return Answer(self.vector, counts, self.doubt)

    def took_part(self, name: Vector) -> bool:
        """Whether this rank has bound itself to ``name``."""
        return name in self._bound

    # -- within ------------------------------------------------------------------------------------------------------
    def _first(self, ranks: frozenset[int]) -> int:
        """Where to begin: at another rank than the others do."""
        return min(ranks, key=lambda rank: (rank - self._rank) % len(self.vector))

    @property
    def _own(self) -> Entry:
        return self.vector[self._rank]

    @property
    def _under_way(self) -> bool:
        return self._own[1] != ""

    @property
    def _complete(self) -> bool:
        return all(nonce for _, nonce in self.vector) and not self.others_attempt

    @property
    def others_attempt(self) -> dict[int, Purpose]:
        """The ranks that attempt something else than this one, and what. See [Note: What an attempt is for]."""
        own = purpose_of(self._own)
        told = {rank: purpose_of(self.vector[rank]) for rank in self._others}
        return {rank: purpose for rank, purpose in told.items() if purpose is not None and purpose != own}

    def _enter(self, nonce: str) -> None:
        """A later entry for this rank: all that was promised to it or by it belongs to an earlier one."""
        self._set_own(self.vector[self._rank][0], nonce)
        self._bound, self._heard, self._audience = frozenset(), frozenset(), frozenset()
        self.committed, self._step = None, 0

    def _set_own(self, above: int, nonce: str) -> None:
        vector = list(self.vector)
        vector[self._rank] = (above + 1, nonce)
        self._said = frozenset()
        self._move_to(tuple(vector))

    def _learn(self, vector: Vector) -> None:
        own = self.vector[self._rank]
        remembered, _ = vector[self._rank]
        self._move_to(tuple(map(max, self.vector, vector)))
        if self.vector[self._rank] != own:  # somebody remembers a process that was this rank before
            self._set_own(remembered, own[1])

    def _move_to(self, vector: Vector) -> None:
        if vector != self.vector:
            self._accepted = self._refused = frozenset()
            self.vector = vector

    def _commit_if_all_accept(self) -> None:
        if self.committed is None and self._complete and self._accepted == self._others:
            self._doubt()
            self._bound |= {self.vector}
            self.committed = self.vector

    def _doubt(self) -> None:
        self.relied = True
        purpose = purpose_of(self._own)
        begun = MOVING if purpose == "move" else UNFINISHED
        if purpose not in _WRITES_NOTHING:
            self.doubt = GIVEN_UP if purpose == "give up" else self.doubt or begun


def vector_of(told: object, group_size: int) -> Vector | None:
    """The vector in a message, if it is one."""
    if not isinstance(told, list) or len(told) != group_size:
        return None
    if not all(isinstance(entry, list) and list(map(type, entry)) == [int, str] for entry in told):
        return None
    return tuple((number, nonce) for number, nonce in told)


def digest(name: Vector) -> str:
    return hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]

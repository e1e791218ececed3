"""Every order in which words of agreements can be sent, come late, or be a rank's last, for the real `Agreement`.

A state is three ranks with their agreements, the memory that they share, and the words that are still on their way. Its
successors are what can happen next:

    a rank      sends its next word, and the other hears it; hears the answer; writes half of its shard, or the rest;
                copies edges; begins an update; asks once more; comes back after its death; fails as others have
    a fault     a word comes late, so that its sender gives up, and is heard at any time from then on, or never;
                a rank dies; a rank runs out of time

A rank that is in no update and not in doubt reads: then its edges and all shards have the bytes of one attempt, and lie
as it takes them to: where experts move, each move is a later version of where they are.

Faults come at every point. A rank that has something to do goes on with it until it waits, except at so many points as
there are ``switches``: all orders of three ranks are more than can be tried, and few mistakes need more than two.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from vmm_dwdp.group.agreement import LAST_STEP, Agreement, Answer, Purpose, Vector, Word, named, offer_of, purpose_of

GROUP_SIZE: Final = 3
OLD: Final = "old"
HALF: Final = "half"

Bytes = str | Vector  # of a shard: `OLD`, `HALF`, or the name of the attempt that wrote it


class Flight(NamedTuple):
    """A word that was heard, and the answer that its sender has yet to receive."""

    to: int
    word: Word
    answer: Answer


class Rank(NamedTuple):
    """``doing``: nothing (``idle``), ``join``, ``begin``, ``write``, the steps ``1`` and ``2``; ``dead``."""

    agreement: Agreement
    doing: str
    attempts: int  # that it may still begin
    life: int
    flight: Flight | None
    version: int = 0  # of where it takes experts to be
    sure: bool = True  # that its shard was whole when it began: it need not write all of it


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    shards: tuple[Bytes, ...]
    edges: tuple[tuple[Bytes, ...], ...]  # by rank, what it has copied of all shards
    versions: tuple[int, ...]  # by rank, of where the experts of its shard are
    late: frozenset[tuple[int, int, int, Word]]  # to whom and to which of its lives, from whom, what
    faults: int  # that may still happen
    switches: int  # from a rank that could go on
    running: int  # the rank that took the latest step

    @property
    def key(self) -> int:
        """Equal for states that nothing can tell apart; of 64 bits, so that millions fit into memory."""
        ranks = tuple((*vars(rank.agreement).values(), *rank[1:]) for rank in self.ranks)
        return hash((ranks, *self[1:]))


class Violation(Exception):
    """Something that must never be."""


@dataclass(frozen=True)
class Explorer:
    """What is tried: how many attempts each rank makes, how many faults happen, and what a rank does that fails.

    Attributes:
        agreement: the protocol.
        restarts: a rank whose attempt fails is a new process from then on, as with `publish`; nothing is read.
        deaths: whether ranks die, and come back.
        moves: whether an attempt may be to move experts, besides to write others.
    """

    agreement: type[Agreement] = Agreement
    attempts: int = 2
    faults: int = 1
    switches: int = 1
    restarts: bool = False
    deaths: bool = True
    moves: bool = False

    def start(self) -> State:
        ranks = tuple(
            Rank(self.agreement(rank, GROUP_SIZE), "idle", self.attempts, 0, None) for rank in range(GROUP_SIZE)
        )
        edges = ((OLD,) * GROUP_SIZE,) * GROUP_SIZE
        versions = (0,) * GROUP_SIZE
        return State(ranks, (OLD,) * GROUP_SIZE, edges, versions, frozenset(), self.faults, self.switches, 0)

    # -- what can happen ---------------------------------------------------------------------------------------------
    def successors(self, state: State) -> Iterator[State]:
        waits = state.ranks[state.running].doing in ("idle", "dead") or not any(self.steps(state, state.running))
        for index, rank in enumerate(state.ranks):
            switches = state.switches - (not waits and index != state.running)
            if switches >= 0:
                yield from self.steps(state._replace(switches=switches, running=index), index)
            if state.faults and rank.doing != "dead":
                yield from self._faults(state._replace(faults=state.faults - 1), index)
        for word in sorted(state.late):
            yield self._arrive(state, word)

    def steps(self, state: State, index: int, *, begins: bool = True) -> Iterator[State]:
        """What rank ``index`` does next, where nothing goes wrong."""
        rank = state.ranks[index]
        if rank.doing == "dead":
            if any(other.doing not in ("dead", "join") for other in state.ranks):
                yield self._rejoin(state, index)
        elif rank.flight is not None:
            agreement = _copy(rank.agreement)
            agreement.answered(*rank.flight)
            yield _with(state, index, rank._replace(agreement=agreement, flight=None))
        elif rank.doing == "idle":
            purposes: list[Purpose] = ["update", "move"] if self.moves and rank.agreement.doubt is None else ["update"]
            for purpose in purposes if rank.attempts and begins else []:
                agreement = _copy(rank.agreement)
                nonce = f"{index}.{9 - rank.life}.{rank.attempts}"  # a later one may well be lower
                agreement.begin(named(purpose, nonce, str(rank.version)))
                begun = rank._replace(agreement=agreement, doing="begin", attempts=rank.attempts - 1)
                yield _with(state, index, begun._replace(sure=rank.agreement.doubt is None))
        elif rank.doing == "write":
            yield self._written(state, index)
        elif rank.agreement.lost:
            yield self._fail(state, index)
        elif (following := rank.agreement.next()) is not None:
            yield self._send(state, index, *following)
        elif rank.agreement.passed:
            yield self._passed(state, index)
        elif rank.agreement._refused:
            agreement = _copy(rank.agreement)
            agreement.look_again()
            yield _with(state, index, rank._replace(agreement=agreement))
        elif rank.agreement.others_attempt or any(
            state.ranks[other].doing == "dead" for other in rank.agreement.missing
        ):
            yield self._fail(state, index)

    def _faults(self, state: State, index: int) -> Iterator[State]:
        rank = state.ranks[index]
        if rank.flight is None and rank.doing in ("join", "begin", "1", "2"):
            if not rank.agreement.lost and (following := rank.agreement.next()) is not None:
                to, word = following
                late = state.late | {(to, state.ranks[to].life, index, word)}
                yield self._unanswered(state._replace(late=late), index, to)
            elif rank.doing != "join" and not rank.agreement.passed:
                yield self._fail(state, index)  # out of time
        if self.deaths:
            late = frozenset(word for word in state.late if word[0] != index)
            dead = rank._replace(agreement=self.agreement(index, GROUP_SIZE), doing="dead", life=rank.life + 1)
            yield _with(state._replace(late=late), index, dead._replace(flight=None))

    def _arrive(self, state: State, late: tuple[int, int, int, Word]) -> State:
        to, life, sender, word = late
        state = state._replace(late=state.late - {late})
        rank = state.ranks[to]
        if rank.life != life or rank.doing in ("dead", "join"):
            return state
        agreement = _copy(rank.agreement)
        agreement.hear(sender, word)
        return _with(state, to, rank._replace(agreement=agreement))

    def _send(self, state: State, index: int, to: int, word: Word) -> State:
        receiver = state.ranks[to]
        if receiver.doing in ("dead", "join"):
            return self._unanswered(state, index, to)
        agreement = _copy(receiver.agreement)
        answer = agreement.hear(index, word)
        state = _with(state, to, receiver._replace(agreement=agreement))
        return _with(state, index, state.ranks[index]._replace(flight=Flight(to, word, answer)))

    def _unanswered(self, state: State, index: int, to: int) -> State:
        rank = state.ranks[index]
        if rank.doing != "join":
            return self._fail(state, index)
        agreement = _copy(rank.agreement)
        agreement.silent(to)
        return _with(state, index, rank._replace(agreement=agreement))

    def _fail(self, state: State, index: int) -> State:
        rank = state.ranks[index]
        if self.restarts:
            agreement = self.agreement(index, GROUP_SIZE)
            rank = rank._replace(life=rank.life + 1)
        else:
            agreement = _copy(rank.agreement)
            agreement.give_up()
        return _with(state, index, rank._replace(agreement=agreement, doing="idle", flight=None))

    def _rejoin(self, state: State, index: int) -> State:
        living = [other for other, rank in enumerate(state.ranks) if rank.doing not in ("dead", "join")]
        agreement = self.agreement(index, GROUP_SIZE)
        agreement.join(living)
        return _with(state, index, state.ranks[index]._replace(agreement=agreement, doing="join"))

    def _passed(self, state: State, index: int) -> State:
        rank = state.ranks[index]
        agreement = _copy(rank.agreement)
        name = agreement.committed
        match rank.doing:
            case "join":
                told = [each.version for each in state.ranks if each.doing not in ("dead", "join")]
                return _with(state, index, rank._replace(doing="idle", version=next(iter(told), rank.version)))
            case "begin":
                assert name is not None
                shards = _replaced(state.shards, index, HALF)
                begun = rank._replace(doing="write", version=self.version_of(name, rank.version))
                if rank.sure and purpose_of(name[index]) == "update" and begun.version != rank.version:
                    raise Violation(f"rank {index} keeps what is elsewhere in version {begun.version} under {name}")
                return _with(state._replace(shards=shards), index, begun)
            case "1":
                if set(state.shards) != {name} or set(state.versions) != {rank.version}:
                    raise Violation(f"rank {index} copies edges under {name} from {state.shards}, {state.versions}")
                agreement.reach(LAST_STEP)
                edges = _replaced(state.edges, index, state.shards)
                return _with(state._replace(edges=edges), index, rank._replace(agreement=agreement, doing="2"))
        if set(state.shards) != {name} or any(set(copied) != {name} for copied in state.edges):
            raise Violation(f"rank {index} returns from {name}, and there is {state.shards} with edges {state.edges}")
        agreement.finish()
        return _with(state, index, rank._replace(agreement=agreement, doing="idle"))

    def version_of(self, name: Vector, own: int) -> int:
        """Of where experts are for a rank that commits ``name``: see [Note: The latest order]."""
        offers = [int(offer_of(entry)) for entry in name]
        if purpose_of(name[0]) == "update":
            return max(offers)
        if set(offers) != {own}:
            raise Violation(f"experts are moved under {name} by ranks that take them to be elsewhere")
        return own + 1

    def _written(self, state: State, index: int) -> State:
        rank = state.ranks[index]
        agreement = _copy(rank.agreement)
        name = agreement.committed
        assert name is not None
        agreement.reach(1)
        shards, versions = _replaced(state.shards, index, name), _replaced(state.versions, index, rank.version)
        written = state._replace(shards=shards, versions=versions)
        return _with(written, index, rank._replace(agreement=agreement, doing="1"))

    # -- what must always be -----------------------------------------------------------------------------------------
    def check(self, state: State) -> None:
        """Raise `Violation` if somebody reads now what is neither all old nor all new."""
        for index, rank in enumerate(state.ranks):
            reads = rank.doing == "idle" and rank.agreement.doubt is None and not self.restarts
            if reads and len({*state.shards, *state.edges[index]}) != 1:
                raise Violation(f"rank {index} reads {state.shards} with its edges {state.edges[index]}")
            if reads and {*state.versions} != {rank.version}:
                raise Violation(
                    f"rank {index} takes experts to be where they are not: {rank.version}, {state.versions}"
                )

    def require_progress(self, state: State, most: int = 2000) -> None:
        """From here on nothing is lost and all try again: raise `Violation` unless all succeed under one name."""
        state = state._replace(faults=0, late=frozenset())
        for turn in range(most):
            index = turn % GROUP_SIZE
            state = state._replace(ranks=tuple(rank._replace(attempts=1 + turn) for rank in state.ranks))
            begins = all(rank.doing != "dead" for rank in state.ranks)
            for after in replace(self, moves=False).steps(state, index, begins=begins):
                self.check(after)
                state = after
            names = {*state.shards, *(piece for copied in state.edges for piece in copied)}
            if len(names) == 1 and names != {OLD} and all(rank.agreement.doubt is None for rank in state.ranks):
                return
        raise Violation(f"nobody gets on: {[(rank.doing, vars(rank.agreement)) for rank in state.ranks]}")


@dataclass
class Exploration:
    """What `explore` found: the first state that must not be, if there is one, and how many there are.

    Attributes:
        exhausted: whether these are all that can be reached.
        succeeded: whether in one of them all ranks have the bytes of an update.
    """

    violation: str | None
    num_states: int
    exhausted: bool = False
    succeeded: bool = False


def explore(
    explorer: Explorer, *, most: int | None = None, progress_every: int = 100, chance: random.Random | None = None
) -> Exploration:
    """Every state that can be reached, or ``most`` of them; `Explorer.require_progress` from some.

    With ``chance``, one path is followed to its end before the next, in a random order: what is wrong is found sooner.
    """
    start = explorer.start()
    seen = {start.key}
    waiting = deque([start])
    found = Exploration(None, 0)
    try:
        while waiting and (most is None or len(seen) < most):
            state = waiting.popleft() if chance is None else waiting.pop()
            found.succeeded |= OLD not in {*state.shards, *(piece for copied in state.edges for piece in copied)}
            successors = list(explorer.successors(state))
            if chance is not None:
                chance.shuffle(successors)
            for after in successors:
                if (key := after.key) not in seen:
                    explorer.check(after)
                    seen.add(key)
                    waiting.append(after)
            found.num_states += 1
            if not successors or found.num_states % progress_every == 0:
                explorer.require_progress(state)
        found.exhausted = not waiting
    except Violation as violation:
        found.violation = str(violation)
    return found


def _copy(agreement: Agreement) -> Agreement:
    made = object.__new__(type(agreement))
    vars(made).update(vars(agreement))
    return made


def _with(state: State, index: int, rank: Rank) -> State:
    return state._replace(ranks=_replaced(state.ranks, index, rank))


def _replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description="more attempts, faults and switches than the tests have time for")
    parser.add_argument("--attempts", type=int, default=2)
    parser.add_argument("--faults", type=int, default=2)
    parser.add_argument("--switches", type=int, default=1)
    parser.add_argument("--moves", action="store_true", help="experts move, too")
    parser.add_argument("--most", type=int, default=5_000_000, help="states")
    tried = parser.parse_args()
    explorer = Explorer(attempts=tried.attempts, faults=tried.faults, switches=tried.switches, moves=tried.moves)
    found = explore(explorer, most=tried.most, progress_every=1000)
    print(f"{found.num_states} states, {'all' if found.exhausted else 'not all'} that there are")
    print(f"violation: {found.violation}")


if __name__ == "__main__":
    main()

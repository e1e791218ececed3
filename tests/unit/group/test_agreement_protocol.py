"""No rank returns from an update before all have written, and none reads half of one, in whatever order words come."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import permutations
from typing import get_args

import pytest
from support.agreement_explorer import Explorer, explore

from vmm_dwdp.group.agreement import (
    GIVEN_UP,
    MOVING,
    Agreement,
    Answer,
    Purpose,
    Vector,
    Word,
    named,
    purpose_of,
)

SCOPES = {
    "two attempts": Explorer(attempts=2, faults=1, switches=0),
    "any order": Explorer(attempts=1, faults=1, switches=1),
    "moves": Explorer(attempts=1, faults=1, switches=0, moves=True),
    "publish": Explorer(attempts=2, faults=1, switches=0, restarts=True, deaths=False),
}
WIDE = Explorer(attempts=2, faults=2, switches=2)  # too many states for a test to see them all


@pytest.mark.parametrize("scope", SCOPES)
def test_every_word_late_lost_or_the_last(scope: str) -> None:
    """And from there on, if nothing more is lost and all try again, all succeed."""
    found = explore(SCOPES[scope])
    assert found.violation is None
    assert found.exhausted
    assert found.succeeded


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_some_of_more_faults_and_switches(seed: int, moves: bool) -> None:
    assert explore(replace(WIDE, moves=moves), most=5_000, chance=random.Random(seed)).violation is None


class _KeepsItsOrder(Explorer):
    """Updates by where it took experts to be before, whatever others know."""

    def version_of(self, name: Vector, own: int) -> int:
        return own if purpose_of(name[0]) == "update" else super().version_of(name, own)


def test_ranks_that_go_by_different_orders_are_found() -> None:
    scope = _KeepsItsOrder(attempts=1, faults=1, switches=0, moves=True)
    tried = (explore(scope, most=10_000, progress_every=5, chance=random.Random(seed)) for seed in range(1, 6))
    assert any(found.violation for found in tried)


def test_a_step_of_an_attempt_that_was_overtaken_is_none_of_the_next() -> None:
    """It takes two others that begin anew and a word that is late, which is more than the scopes above have."""
    rank, own = Agreement(0, 3), (1, "a")
    before: Vector = (own, (1, "b"), (1, "c"))
    after: Vector = (own, (2, "d"), (2, "e"))
    rank.begin("a")
    assert rank.hear(1, Word("bind", before)).counts
    for other in (1, 2):
        assert rank.hear(other, Word("bind", after)).counts
    for other in (1, 2):
        rank.answered(other, Word("say", after), Answer(after, True, None))
        rank.answered(other, Word("bind", after), Answer(after, True, None))
    assert rank.committed == after
    rank.reach(1)
    for other in (1, 2):
        rank.answered(other, Word("step", after, 1), Answer(after, True, None))
    rank.hear(2, Word("step", after, 1))
    rank.hear(1, Word("step", before, 1))
    assert rank.missing == [1]
    assert not rank.passed
    rank.hear(1, Word("step", after, 1))
    assert rank.passed


def agreed(purposes: Sequence[Purpose], doubt: str | None = None) -> list[Agreement]:
    """Ranks that attempt this, and say all that they have to say; those that commit finish."""
    ranks = [Agreement(rank, len(purposes)) for rank in range(len(purposes))]
    for rank, purpose in zip(ranks, purposes, strict=True):
        rank.doubt = doubt
        rank.begin(named(purpose, f"{id(rank)}"))
    said = True
    while said:
        said = False
        for number, rank in enumerate(ranks):
            while (following := rank.next()) is not None:
                other, word = following
                rank.answered(other, word, ranks[other].hear(number, word))
                said = True
    return ranks


@pytest.mark.parametrize("before", [None, "an update was begun"])
@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_who_writes_nothing_brings_nobody_into_doubt_nor_out_of_it(purpose: Purpose, before: str | None) -> None:
    moves = purpose in ("settle", "sleep", "wake", "rebalance")
    for rank in agreed([purpose] * 3, before):
        assert rank.passed
        assert rank.relied
        assert moves or rank.doubt is not None
        assert purpose != "move" or rank.doubt == (before or MOVING)
        assert not moves or rank.doubt == before
        rank.finish()
        assert rank.doubt == (before if moves else GIVEN_UP if purpose == "give up" else None)


def test_a_name_is_committed_only_where_all_attempt_the_same() -> None:
    for first, second in permutations(get_args(Purpose), 2):
        ranks = agreed([first, second, first])
        assert not any(rank.passed or rank.relied or rank.doubt for rank in ranks)
        assert ranks[0].others_attempt == {1: second}
        assert ranks[0].missing == [1]
        assert ranks[1].others_attempt == {0: first, 2: first}


class _CountsWordsOfAnyName(Agreement):
    """Today's words and yesterday's are the same, as long as they are of the same step."""

    def hear(self, rank: int, word: Word) -> Answer:
        answer = super().hear(rank, word)
        if word.kind == "step":
            self._heard |= {(name, word.step, rank) for name in (*self._bound, self.committed) if name is not None}
        return answer


class _BelievesTheLatestWord(Agreement):
    """Takes what came last for what was said last."""

    def _learn(self, vector: Vector) -> None:
        own = self.vector[self._rank]
        self._move_to((*vector[: self._rank], own, *vector[self._rank + 1 :]))


class _ComesBackWithoutAsking(Agreement):
    def join(self, living: Collection[int]) -> None:
        super().join(())


class _ComesBackUnheard(Agreement):
    """Asks whether there is doubt, and leaves the promises of the dead where they are."""

    def hear(self, rank: int, word: Word) -> Answer:
        if word.vector[rank][1]:
            return super().hear(rank, word)
        vector = list(self.vector)
        vector[rank] = word.vector[rank]
        return Answer(tuple(vector), True, self.doubt)


class _BindsItselfWithoutDoubt(Agreement):
    def hear(self, rank: int, word: Word) -> Answer:
        before = self.doubt
        answer = super().hear(rank, word)
        self.doubt = before
        return answer


class _BindsItselfAtAnyTime(Agreement):
    """Even to names of which it is no part any more."""

    def hear(self, rank: int, word: Word) -> Answer:
        answer = super().hear(rank, word)
        if word.kind == "bind":
            self._bound |= {word.vector}
        return answer._replace(counts=True)


class _CommitsWhatIsOvertaken(Agreement):
    """Keeps who accepted a name for the name that comes next."""

    def _move_to(self, vector: Vector) -> None:
        self.vector = vector


class _ForgetsItsDoubt(Agreement):
    def give_up(self) -> None:
        super().give_up()
        self.doubt = None


class _SaysNothingNew(Agreement):
    """Refuses an old name, and does not say what is newer."""

    def hear(self, rank: int, word: Word) -> Answer:
        return super().hear(rank, word)._replace(vector=word.vector)


class _WaitsForTheLost(Agreement):
    lost: list[int] = []  # type: ignore[assignment]  # noqa: RUF012


class _WaitsUnlessItNeedsTheLost(Agreement):
    """Looks only for those whose word it lacks, while another's failure keeps just those from saying it."""

    @property
    def lost(self) -> list[int]:
        return [rank for rank in super().lost if rank in self.missing]


@pytest.mark.parametrize(
    "broken",
    [
        _CountsWordsOfAnyName,
        _BelievesTheLatestWord,
        _ComesBackWithoutAsking,
        _ComesBackUnheard,
        _BindsItselfWithoutDoubt,
        _BindsItselfAtAnyTime,
        _CommitsWhatIsOvertaken,
        _ForgetsItsDoubt,
        _SaysNothingNew,
        _WaitsForTheLost,
        _WaitsUnlessItNeedsTheLost,
    ],
)
def test_a_broken_protocol_is_found(broken: type[Agreement]) -> None:
    scopes = [replace(scope, agreement=broken) for scope in (*SCOPES.values(), WIDE)]
    tried = (explore(scope, most=25_000, chance=random.Random(seed)) for seed in (0, 1) for scope in scopes)
    assert any(found.violation for found in tried)

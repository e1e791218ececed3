"""No rank returns from an update before all have written, and none reads half of one, in whatever order words come."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace

import pytest
from support.agreement_explorer import Explorer, explore

from vmm_dwdp.group.agreement import (
    Agreement,
    Answer,
    Vector,
    Word,
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

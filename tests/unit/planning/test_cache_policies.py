"""Cache policies against the plainest programs that do the same, and foresight against every possible choice."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
from support.bank_model import SAVING, BankModel

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.caches import (
    Policy,
    bank_policy,
    decayed_frequency,
    first_uses,
    foresight,
    least_recently_used,
    most_frequent,
    random_victims,
    replay,
)
from vmm_dwdp.planning.routing import Used

ONLINE = {"recency": least_recently_used, "frequency": decayed_frequency(5), "random": random_victims(0)}
History = list[set[int]]


def some(steps: int, lanes: int, experts: int, a_step: int, seed: int) -> Used:
    """So many experts a step, low numbers more often than high ones."""
    chance = np.random.default_rng(seed)
    keys = chance.random((steps, lanes, experts)) * (1 + np.arange(experts))
    used = np.zeros(keys.shape, np.bool_)
    np.put_along_axis(used, keys.argpartition(a_step, axis=-1)[..., :a_step], True, axis=-1)
    return used


def history(used: Used, lane: int) -> History:
    return [set(np.flatnonzero(step).tolist()) for step in used[:, lane]]


def plain(steps: History, room: int, score: Callable[[int, History], float]) -> list[int]:
    """Hits of each step, where the highest ``score(expert, history so far)`` are kept, of equals the lower number."""
    held: set[int] = set()
    hits = []
    for now, used in enumerate(steps, 1):
        hits.append(len(held & used))
        held = set(sorted(held | used, key=lambda expert: (-score(expert, steps[:now]), expert))[:room])
    return hits


def recency(expert: int, steps: History) -> float:
    return max(number for number, used in enumerate(steps) if expert in used)


def frequency(expert: int, steps: History) -> float:
    return sum(0.5 ** ((len(steps) - number) / 5) for number, used in enumerate(steps) if expert in used)


@pytest.mark.parametrize(("name", "score"), [("recency", recency), ("frequency", frequency)])
@pytest.mark.parametrize("room", [1, 3, 5, 11, 12, 20])
def test_a_policy_hits_what_the_plain_program_hits(
    name: str, score: Callable[[int, History], float], room: int
) -> None:
    used = some(40, 5, 12, 3, seed=room)
    found = replay(used, room, ONLINE[name])

    for lane in range(5):
        assert found.hits[:, lane].tolist() == plain(history(used, lane), room, score)
    assert (found.uses == 3).all()


@pytest.mark.parametrize("room", [1, 3, 5, 11, 12, 20])
def test_the_bank_s_policy_is_what_banks_do(room: int) -> None:
    used = some(120, 5, 12, 3, seed=room)
    used[60:] = used[60:, :, ::-1]  # others are used more often from then on
    found = replay(used, room, bank_policy)

    for lane in range(5):
        bank, counts = BankModel(12, room), []
        for now in history(used, lane):
            bank.look_up(sorted(now), copies=True)
            counts.append(tuple(bank.counts))
        replayed = (part[:, lane].cumsum() for part in found)
        assert list(zip(*replayed, strict=True)) == counts
        assert room > 11 or counts[-1][2] > room, "nobody has left the bank"


def test_the_bank_s_policy_saves_no_more_copies_than_there_are_rows() -> None:
    used, bank, copied = np.zeros((len(SAVING), 1, 12), np.bool_), BankModel(12, 4), []
    for now, experts in zip(used, SAVING, strict=True):
        now[:, experts] = True
        bank.look_up(experts, copies=True)
        copied.append(bank.counts[2])

    assert replay(used, 4, bank_policy).copies.cumsum().tolist() == copied


@pytest.mark.parametrize("policy", [*ONLINE.values(), bank_policy, foresight])
def test_what_is_copied_is_what_missed_and_hits_later(policy: Policy) -> None:
    used = some(50, 4, 10, 2, seed=5)
    found = replay(used, 4, policy)

    assert (found.copies <= found.uses - found.hits).all()
    assert (replay(used, 10, policy).copies == first_uses(used)).all(), "a row for each"
    for steps in (1, 2, 5):  # whatever hits was brought there before
        assert (found.hits[:steps].sum(0) <= steps * found.copies[: steps - 1].sum(0)).all()


def test_one_expert_a_step_is_the_usual_least_recently_used() -> None:
    used = some(300, 1, 9, 1, seed=3)
    order: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for (expert,) in history(used, 0):
        hits += expert in order
        order[expert] = None
        order.move_to_end(expert)
        if len(order) > 4:
            order.popitem(last=False)

    assert replay(used, 4, least_recently_used).hits.sum() == hits


def most_hits(steps: History, room: int) -> int:
    """Over everything that could be kept after each step of what was there and what was used."""
    best = {frozenset[int](): 0}
    for used in steps:
        following: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            there = held | used
            for kept in itertools.combinations(sorted(there), min(room, len(there))):
                after = frozenset(kept)
                following[after] = max(following.get(after, 0), hits + len(held & used))
        best = following
    return max(best.values())


@pytest.mark.parametrize(("room", "a_step"), [(1, 1), (2, 1), (2, 2), (3, 2), (2, 3), (4, 2)])
def test_no_choice_has_more_hits_than_foresight(room: int, a_step: int) -> None:
    used = some(9, 25, 6, a_step, seed=10 * room + a_step)
    hits = replay(used, room, foresight).hits.sum(0)

    assert hits.tolist() == [most_hits(history(used, lane), room) for lane in range(25)]
    for policy in (*ONLINE.values(), bank_policy):
        assert (replay(used, room, policy).hits.sum(0) <= hits).all()


@pytest.mark.parametrize("policy", [*ONLINE.values(), bank_policy], ids=[*ONLINE, "the bank's"])
def test_no_other_policy_knows_what_comes(policy: Policy) -> None:
    used = some(30, 4, 10, 2, seed=1)
    other = used.copy()
    other[20:] = some(10, 4, 10, 2, seed=2)

    assert (replay(used, 4, policy).hits[:20] == replay(other, 4, policy).hits[:20]).all()


def test_random_victims_of_even_routing_hit_what_there_is_room_for() -> None:
    chance = np.random.default_rng(0)
    used = np.zeros((400, 50, 20), np.bool_)
    np.put_along_axis(used, chance.integers(0, 20, (400, 50, 1)), True, axis=-1)
    share = replay(used, 5, random_victims(1)).hits[50:].mean()

    assert share == pytest.approx(5 / 20, abs=0.01)  # 17,500 uses: 3 standard deviations


def test_what_was_just_used_stays_if_victims_are_random() -> None:
    used = np.zeros((60, 1, 8), np.bool_)
    used[::3, :, 4:7] = True
    used[1::3, :, :3] = used[2::3, :, :3] = True  # another three, twice

    assert (replay(used, 3, random_victims(0)).hits[2::3] == 3).all()


@pytest.mark.parametrize("policy", [*ONLINE.values(), bank_policy, foresight])
def test_room_for_all_misses_only_first_uses(policy: Policy) -> None:
    used = some(25, 6, 10, 3, seed=4)
    found = replay(used, 10, policy)

    assert (found.uses - found.hits == first_uses(used)).all()
    assert first_uses(used).sum(0).tolist() == [len(set().union(*history(used, lane))) for lane in range(6)]


def test_a_static_list_has_the_most_frequent_experts() -> None:
    held = most_frequent(np.array([[5, 1, 5, 9], [0, 0, 0, 0]]), 2)

    assert held.tolist() == [[True, False, False, True], [True, True, False, False]]


def test_a_bank_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="room for at least one expert, not 0"):
        replay(some(2, 1, 4, 1, seed=0), 0, least_recently_used)

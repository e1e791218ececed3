"""How soon experts come back and how evenly owners are asked, against loops over the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vmm_dwdp.planning.locality import asked, busiest, dealt_by_load, in_order, reuse_distances


def test_reuse_is_counted_in_steps() -> None:
    used = np.random.default_rng(0).random((60, 4, 7)) < 0.3
    expected = [
        later - sooner
        for lane, expert in np.ndindex(4, 7)
        for sooner, later in itertools.pairwise(np.flatnonzero(used[:, lane, expert]))
    ]

    assert sorted(reuse_distances(used).tolist()) == sorted(expected)


@pytest.mark.parametrize(("experts", "ranks"), [(128, 8), (16, 4), (10, 4), (7, 2), (3, 3)])
def test_experts_in_order_are_equal_runs(experts: int, ranks: int) -> None:
    owners = in_order(2, experts, ranks)
    sizes = np.bincount(owners[0], minlength=ranks)

    assert (owners[0] == owners[1]).all()
    assert (np.diff(owners[0]) >= 0).all()
    assert sizes.sum() == experts
    assert sizes.max() - sizes.min() <= 1


def test_owners_give_what_others_use() -> None:
    chance = np.random.default_rng(1)
    ranks, steps, layers, experts = 3, 4, 2, 8
    by_rank = [chance.random((steps, layers, experts)) < 0.4 for _ in range(ranks)]
    owners = chance.integers(0, ranks, (layers, experts))
    expected = np.zeros((steps, layers, ranks), int)
    for rank, step, layer, expert in np.ndindex(ranks, steps, layers, experts):
        if by_rank[rank][step, layer, expert] and owners[layer, expert] != rank:
            expected[step, layer, owners[layer, expert]] += 1

    assert (asked(by_rank, owners) == expected).all()


def test_the_busiest_owner_is_compared_with_the_mean() -> None:
    assert busiest(np.array([[3, 1], [2, 2], [0, 0]])).tolist() == [1.5, 1.0, 1.0]


@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (6, 3), (7, 3), (8, 4)])
def test_experts_dealt_by_load_fill_the_same_room_more_evenly(experts: int, ranks: int) -> None:
    load = np.random.default_rng(experts).zipf(1.5, (20, experts))
    placed, dealt = in_order(20, experts, ranks), dealt_by_load(load, ranks)

    assert (np.sort(dealt, axis=-1) == placed).all()
    for layer in range(20):
        most = [np.bincount(owners[layer], load[layer], ranks).max() for owners in (placed, dealt)]
        heaviest = load[layer].max()
        assert most[1] <= most[0] or most[1] <= heaviest + load[layer].sum() / ranks
    total = [sum(np.bincount(o[n], load[n], ranks).max() for n in range(20)) for o in (placed, dealt)]
    assert total[1] < total[0]


def test_the_heaviest_experts_are_dealt_first() -> None:
    load = np.array([[5, 9, 1, 7, 6, 4]])  # 9 to the first, 7 and 6 to the second, 5, then 4 as the last that fits, 1

    assert dealt_by_load(load, 2).tolist() == [[0, 0, 0, 1, 1, 1]]

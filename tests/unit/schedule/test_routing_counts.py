"""How tokens were routed: each reader sees all that is new to it, whoever else looks."""

from __future__ import annotations

import torch

from vmm_dwdp.schedule.routing_counts import RoutingCounts


def test_each_reader_sees_what_is_new_to_it() -> None:
    counts = RoutingCounts({3: 4, 5: 2}, torch.device("cpu"))
    counts.add(3, torch.tensor([[0, 1], [1, 2]]))
    assert counts.look("cache") == {3: [1, 2, 1, 0], 5: [0, 0]}
    counts.take("cache")
    counts.add(3, torch.tensor([3, 3]))
    counts.add(5, torch.tensor([1], dtype=torch.int32))
    assert counts.look("cache") == {3: [0, 0, 0, 2], 5: [0, 1]}
    assert counts.look("rebalance") == {3: [1, 2, 1, 2], 5: [0, 1]}
    assert counts.look("rebalance") == {3: [1, 2, 1, 2], 5: [0, 1]}, "to look is not to take"
    counts.take("rebalance")
    assert counts.look("rebalance") == {3: [0] * 4, 5: [0] * 2}
    assert counts.look("cache") == {3: [0, 0, 0, 2], 5: [0, 1]}


def test_what_is_no_expert_is_not_counted() -> None:
    counts = RoutingCounts({0: 3}, torch.device("cpu"))
    counts.add(0, torch.tensor([-1, 3, 2]))
    assert counts.look("cache") == {0: [0, 0, 1]}

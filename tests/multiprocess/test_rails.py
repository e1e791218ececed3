"""Nodes of several ranks: groups within them, rails between them, and what one process computes of all of it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.groups import PAGE, same_bytes
from support.nodes import Shape, rail_of, run

from vmm_dwdp import ConfigError, DWDPConfig, DWDPError, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.layout.nodes import NodeShare
from vmm_dwdp.nodes.rail import NOT_HERE

EXPERTS, WIDTH, TOP_K = 11, 24, 3
DTYPE = torch.bfloat16
PASSES = 3  # the last is of tokens on the first rail only


SHAPES = [Shape(2, 2), Shape(2, 3), Shape(3, 2)]


class Tokens(NamedTuple):
    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


def experts() -> torch.Tensor:
    return torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def tokens_of(number: int, node: int, rank: int) -> Tokens:
    """Of a pass: some ranks have none, some tokens no expert, and some one expert twice."""
    generator = torch.Generator().manual_seed(100 * number + 10 * node + rank)
    count = 0 if number == PASSES - 1 and rank else (7 * node + 5 * rank + 3 * number) % 13
    hidden = torch.randn(count, WIDTH, generator=generator)
    chosen = torch.randint(-1, EXPERTS, (count, TOP_K), generator=generator)
    return Tokens(hidden, chosen, torch.rand(count, TOP_K, generator=generator))


def partial_sum(row: torch.Tensor, numbers: list[int], weights: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Of one token, over those of its experts that are in ``of``."""
    total = torch.zeros(WIDTH)
    for place, number in enumerate(numbers):
        if number != NOT_HERE:
            total += weights[place] * (row[:, None] * of[number].float()).sum(0)
    return total


def reference(share: NodeShare, tokens: Tokens, nodes: list[int]) -> torch.Tensor:
    """In one process, with all experts: the nodes' sums, added in the order of ``nodes``."""
    whole, out = experts(), torch.zeros(len(tokens.hidden), WIDTH)
    for token, row in enumerate(tokens.hidden):
        for node in nodes:
            own = share.experts(node)
            numbers = [number if number in own else NOT_HERE for number in tokens.chosen[token].tolist()]
            if any(number != NOT_HERE for number in numbers):
                out[token] += partial_sum(row, numbers, tokens.weights[token], whole)
    return out


def passes(directory: Path, shape: Shape, node: int, rank: int) -> list[torch.Tensor]:
    """What a rank gets of its tokens in every pass."""
    share = NodeShare(EXPERTS, shape.nodes)
    rail = rail_of(directory / "store", shape, node, rank)
    own, found = share.experts(node), []
    config, driver = DWDPConfig(group_size=shape.ranks), HostDriver(PAGE)
    with DWDPRuntime(config, rank, driver.device, directory / f"node-{node}", driver=driver) as runtime:
        runtime.add_layer(0, {"w": WeightSpec((len(own), WIDTH, WIDTH), DTYPE)})
        held = runtime.local_experts(0)
        runtime.local_shard(0, "w").copy_(experts()[own.start + held.start : own.start + held.stop])
        runtime.publish()
        for number in range(PASSES):
            dispatched = rail.dispatch(*tokens_of(number, node, rank), EXPERTS)
            with runtime.layer(0) as weights:
                sums = [
                    partial_sum(row, numbers, factors, weights["w"])
                    for row, numbers, factors in zip(
                        dispatched.hidden, dispatched.experts.tolist(), dispatched.weights, strict=True
                    )
                ]
            partial = torch.stack(sums) if sums else torch.zeros(0, WIDTH)
            found.append(rail.combine(partial, dispatched))
    dist.destroy_process_group()
    return [each.numpy() for each in found]


@pytest.mark.parametrize("shape", SHAPES, ids=[f"{shape.nodes}x{shape.ranks}" for shape in SHAPES])
def test_ranks_of_all_nodes_get_what_one_process_computes(shape: Shape, tmp_path: Path) -> None:
    share = NodeShare(EXPERTS, shape.nodes)
    in_order, backwards = list(range(shape.nodes)), list(range(shape.nodes))[::-1]
    differ = 0
    for place, found in enumerate(run(shape, partial(passes, tmp_path))):
        for number in range(PASSES):
            tokens = tokens_of(number, *divmod(place, shape.ranks))
            expected = reference(share, tokens, in_order)
            assert same_bytes(torch.from_numpy(found[number]), expected), (place, number)
            differ += not same_bytes(reference(share, tokens, backwards), expected)
    assert (differ > 0) == (shape.nodes > 2), "the order shows where more than two are added"


def lonely(directory: Path, shape: Shape, node: int, rank: int) -> list[Any]:
    """A layer of which node 0 has no expert; then what cannot be."""
    way = rail_of(directory / "store", shape, node, rank)
    sent = way.dispatch(torch.full((2, 4), 1.0 + node), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), 1)
    out = way.combine(sent.hidden * 10, sent)
    told = []
    for wrong in (
        lambda: way.combine(torch.zeros(99, 4), sent),
        lambda: way.dispatch(torch.zeros(2, 4), torch.zeros(3, 1), torch.zeros(3, 1), 1),
    ):
        try:
            wrong()
        except ConfigError as error:
            told.append(str(error))
    dist.destroy_process_group()
    return [len(sent.hidden), out.tolist(), told]


def test_a_node_without_experts_and_what_cannot_be(tmp_path: Path) -> None:
    told = "tokens, their experts and weights are [T, H], [T, K] and [T, K], not (2, 4), (3, 1), (3, 1)"
    results = run(Shape(2, 1), partial(lonely, tmp_path))
    assert [received for received, _, _ in results] == [0, 4]
    for node, (received, out, found) in enumerate(results):
        assert out == [[10.0 + 10 * node] * 4] * 2
        assert found == [f"partial sums of 99 tokens were given for {received}", told]


def with_a_death(directory: Path, shape: Shape, node: int, rank: int) -> str:
    """Rank 0 of node 1 dies after a pass."""
    rail = rail_of(directory / "store", shape, node, rank)
    for number in range(2):
        if (number, node, rank) == (1, 1, 0):
            os._exit(1)
        try:
            dispatched = rail.dispatch(*tokens_of(0, node, rank), EXPERTS)
            rail.combine(dispatched.hidden, dispatched)
        except DWDPError as error:
            return str(error)
    return "passed"


def test_a_rank_that_dies_stops_its_rail_by_name_and_no_other(tmp_path: Path) -> None:
    first, other, dead, another, third, last = run(Shape(3, 2), partial(with_a_death, tmp_path))
    assert dead is None
    assert [other, another, last] == ["passed"] * 3
    for node, told in ((0, first), (2, third)):
        assert told.startswith(f"the rail of node {node} has failed: the rank of node 1 is gone (")

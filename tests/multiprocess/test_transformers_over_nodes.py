"""transformers models over several nodes: bit by bit what one process computes that adds the nodes' partial sums."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.groups import PAGE
from support.lockstep import Lockstep
from support.moe_models import SIZES, tiny_model
from support.nodes import Shape, rail_of, run
from transformers import AutoModelForCausalLM, PreTrainedModel

from vmm_dwdp import DWDPConfig, ExchangeError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import from_pretrained, join_pass
from vmm_dwdp.nodes.rail import TorchRail

SHAPE = Shape(2, 2)
MOVING = "olmoe"  # whose experts change places within their nodes, and are multiplied at other addresses then
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", MOVING)  # plain; transposed, with biases; without a gate
PASSES = 3
IDLE = [set(), {(1, 0), (0, 1)}, {(0, 0), (1, 0)}]  # by pass, who has no tokens: in the last, a whole rail
"""Seven experts over two nodes of two ranks divide nowhere."""


def tokens(number: int, node: int, rank: int) -> torch.Tensor:
    """Other lengths everywhere."""
    generator = torch.Generator().manual_seed(100 * number + 10 * node + rank)
    return torch.randint(3, SIZES["vocab_size"], (1 + rank, 5 + 3 * node + number), generator=generator)  # type: ignore[operator]


@torch.no_grad()
def one_pass(model: PreTrainedModel, number: int, node: int, rank: int) -> Any:
    if (node, rank) in IDLE[number]:
        return join_pass(model)
    return model(tokens(number, node, rank), use_cache=False).logits.numpy()


def loaded(directory: Path, family: str, node: int, rank: int, rail: TorchRail) -> PreTrainedModel:
    return from_pretrained(
        directory / family,
        DWDPConfig(group_size=SHAPE.ranks, mode="in_place", movable_experts=True)
        if family == MOVING
        else DWDPConfig(group_size=SHAPE.ranks),
        rank=rank,
        device="cpu",
        rendezvous=directory / f"{family}-{node}",
        driver=HostDriver(PAGE),
        rail=rail,
    )


def as_rank(directory: Path, shape: Shape, node: int, rank: int) -> Any:
    """By family, the logits of each pass; then what the death of rank 0 of node 1 does."""
    rail = rail_of(directory / "store", shape, node, rank)
    logits: dict[str, list[Any]] = {}
    for family in FAMILIES:
        model = loaded(directory, family, node, rank, rail)
        with model.dwdp:
            logits[family], moved = [], 0
            for number in range(PASSES):
                logits[family].append(one_pass(model, number, node, rank))
                moved += model.dwdp.rebalance(most=2) if family == MOVING else 0
            assert (moved > 0) == (family == MOVING)
            waited = model.dwdp.stats().node_wait_s
            assert waited > 0
        assert model.dwdp.ledger.open() == []
    return logits, after_a_death(directory, node, rank, rail)


def after_a_death(directory: Path, node: int, rank: int, rail: TorchRail) -> str:
    model = loaded(directory, "qwen3_moe", node, rank, rail)
    first = one_pass(model, 0, node, rank)
    if (node, rank) == (1, 0):
        dist.barrier()
        os._exit(1)
    dist.barrier()
    told = ""
    try:
        again = one_pass(model, 0, node, rank)
        assert (again == first).all(), "its own rail is whole, and the dead rank's memory outlives it"
    except ExchangeError as error:
        told = str(error)
    model.dwdp.close()
    return told


def as_one_process(directory: Path, family: str) -> list[list[Any]]:
    """By rank, the logits of each pass."""
    lockstep, places = Lockstep(SHAPE), [divmod(place, SHAPE.ranks) for place in range(SHAPE.world)]
    models = {place: AutoModelForCausalLM.from_pretrained(directory / family) for place in places}
    for place, model in models.items():
        lockstep.spread(model, *place)
    found: list[list[Any]] = [[] for _ in places]
    for number, idle in enumerate(IDLE):
        lockstep.without_tokens = idle
        results = lockstep.run(lambda *place, number=number, idle=idle: logits_of(models[place], number, place, idle))
        for of_rank, result in zip(found, results, strict=True):
            of_rank.append(result)
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel, number: int, place: tuple[int, int], idle: set[tuple[int, int]]) -> Any:
    given = torch.zeros(1, 1, dtype=torch.long) if place in idle else tokens(number, *place)
    logits = model(given, use_cache=False).logits.numpy()
    return None if place in idle else logits


def test_every_rank_gets_what_one_process_computes_and_a_dead_one_is_named(tmp_path: Path) -> None:
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
    ranks = run(SHAPE, partial(as_rank, tmp_path))
    assert ranks.pop(2) is None, "rank 0 of node 1, which died"
    torch.set_num_threads(1)
    for family in FAMILIES:
        expected = as_one_process(tmp_path, family)
        del expected[2]
        for place, ((logits, _), reference) in enumerate(zip(ranks, expected, strict=True)):
            for number, (ours, theirs) in enumerate(zip(logits[family], reference, strict=True)):
                assert (ours is None) == (theirs is None), (family, place, number)
                same = ours is None or (abs(ours - theirs) <= 1e-5 * (family == MOVING)).all()
                assert same, (family, place, number)
    told = [told for _, told in ranks]
    assert told[0].startswith("the rail of node 0 has failed: the rank of node 1 is gone (")
    assert told[1:] == ["", ""]

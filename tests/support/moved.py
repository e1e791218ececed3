"""Groups whose experts move, and what every rank reads of them: by a table, as a kernel would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from support.groups import Model, in_threads, same_bytes
from vmm_dwdp import DWDPRuntime
from vmm_dwdp.config import Mode


def ask_for_tables(runtime: DWDPRuntime, model: Model) -> dict[int, torch.Tensor]:
    """By layer, the row of each expert."""
    return {number: runtime.logical_to_physical(number) for number in model}


def route(runtime: DWDPRuntime, favourites: Mapping[int, Iterable[int]], tokens: int = 50) -> None:
    """A pass in place in which so many tokens use each of a layer's favourites, and one token every expert."""
    with runtime.forward_pass(mode="in_place", tokens=tokens):
        for number, experts in favourites.items():
            everyone = torch.arange(len(runtime.logical_to_physical(number)))
            chosen = torch.cat([everyone, torch.tensor(list(experts), dtype=torch.int64).repeat(tokens)])
            runtime.acquire(number, chosen=chosen[:, None].to(runtime.device))
            runtime.release(number)


def rebalance(runtimes: list[DWDPRuntime], most: int = 8) -> int:
    """By all ranks; how many experts moved, on which they agree."""
    (moved,) = set(in_threads(lambda rank: runtimes[rank].rebalance(most=most, timeout=20), len(runtimes)))
    return moved


def check_experts(runtime: DWDPRuntime, model: Model, mode: Mode | None = None) -> None:
    """Every byte of every expert, at the row that the table tells, and each row is one expert's."""
    for number, weights in model.items():
        rows = runtime.logical_to_physical(number).tolist()
        assert sorted(rows) == list(range(len(rows)))
        with runtime.layer(number, mode=mode, tokens=7) as found:
            for name, reference in weights.items():
                assert same_bytes(found[name][rows], reference), (runtime.rank, number, name, mode)  # type: ignore[call-overload]
            everyone = torch.tensor([[*range(len(rows)), -1]], device=runtime.device)
            looked_up = runtime.look_up(number, everyone)
            assert looked_up.rows.tolist() == [[*rows, -1]]
            assert looked_up.weights is found


def check_held(runtimes: list[DWDPRuntime], model: Model) -> None:
    """What ranks say of who holds what fits the table: `held_experts` are those of the rows of an owner's shard."""
    for runtime in runtimes:
        for number in model:
            rows = runtime.logical_to_physical(number).tolist()
            for owner in range(runtime.config.group_size):
                run = runtime._layers.numbered[number].placement.experts(owner)
                assert runtime.held_experts(number, owner) == tuple(rows.index(row) for row in run)


def write_all(runtime: DWDPRuntime, model: Model, timeout: float = 20) -> None:
    """`updating`, with every expert that this rank holds, whoever held it before."""
    with runtime.updating(timeout) as update:
        for number, weights in model.items():
            for name, whole in weights.items():
                for owner in runtime.held_owners:
                    for expert in runtime.held_experts(number, owner):
                        update.write(number, name, whole[expert], experts=expert, owner=owner)

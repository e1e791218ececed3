"""Passes that look up what they read in a bank, and compare every byte of it with the unsharded model."""

from __future__ import annotations

import torch

from support.bank_model import BankModel
from support.groups import Model, same_bytes
from vmm_dwdp import DWDPRuntime
from vmm_dwdp.config import Mode


def some_experts(num_experts: int, tokens: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``[tokens, top_k]``, with favourites that are others each time."""
    favour = torch.rand(num_experts, generator=generator) ** 6 + 1e-9
    return torch.multinomial(favour.expand(tokens, -1), min(top_k, num_experts), generator=generator)


def models_of(runtime: DWDPRuntime, model: Model) -> dict[int, BankModel]:
    """What the banks of a runtime are to hold, which hold nothing yet."""
    bank = runtime.stats().bank
    return {
        number: BankModel(len(next(iter(model[number].values()))), rows, runtime.local_experts(number))
        for number, rows in ({} if bank is None else bank.rows).items()
    }


def look_up_and_check(
    runtime: DWDPRuntime,
    model: Model,
    number: int,
    chosen: torch.Tensor,
    banks: dict[int, BankModel],
    mode: Mode = "in_place",
) -> None:
    """A layer of a pass: the rows are those that ``banks`` say, and have the experts' bytes."""
    with runtime.layer(number, mode=mode, tokens=len(chosen)) as weights:
        found, rows = runtime.look_up(number, chosen)
        assert rows.shape == chosen.shape
        assert rows.dtype == chosen.dtype
        if mode == "in_place" and number in banks:
            copies = len(chosen) <= 32
            assert rows.flatten().tolist() == banks[number].look_up(chosen.flatten().tolist(), copies=copies)
        else:
            assert rows is chosen
        for name, whole in model[number].items():
            read = found[name][rows.flatten().long()]  # type: ignore[index]
            assert torch.equal(read.view(torch.uint8), whole[chosen.flatten().long()].view(torch.uint8))
            assert torch.equal(weights[name].view(torch.uint8), whole.view(torch.uint8))  # type: ignore[union-attr]
        del found, weights, read


def check_looked_up(runtime: DWDPRuntime, model: Model, *experts: int) -> None:
    """A pass in place whose tokens choose one of ``experts`` each: what it is told to read has their bytes."""
    chosen = torch.tensor(experts, device=runtime.device)[:, None]
    for number, weights in model.items():
        with runtime.layer(number, mode="in_place", tokens=len(experts)):
            found, rows = runtime.look_up(number, chosen)
            read = {name: found[name][rows.flatten()] for name in weights}  # type: ignore[index]
            del found
        for name, whole in weights.items():
            assert same_bytes(read[name], whole[list(experts)]), (runtime.rank, number, name)

"""Steps of decoding through MoE layers, which choose as a table says: what they add by reading experts, or by sending
tokens to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adversary import none_hits
from decoder import Read, Shape, Weights
from expert_formats import through
from torch import Tensor
from whole_model import steps_of

from vmm_dwdp.planning.routing import RoutingTrace, used_experts

Mix = Callable[[int, Tensor, Tensor], Tensor]  # layer, x and chosen experts: what the layer adds, [batch, hidden]


def recorded(trace: RoutingTrace, shape: Shape, batch: int, rank: int, steps: int) -> Tensor:
    """``[steps, layers, batch, top_k]``: what a rank's sequences chose while they were written, others than another
    rank's as long as the trace has enough."""
    ids, prompt = steps_of(trace, shape, batch, rank)
    return ids[prompt : prompt + steps]


def nothing_hits(shape: Shape, batch: int, ranks: int, steps: int) -> Tensor:
    """The same, where it is chosen against the planners of all ranks' banks."""
    chosen = torch.from_numpy(none_hits(shape.experts, shape.top_k, batch, ranks, steps))
    return chosen[:, None].expand(-1, shape.layers, -1, -1).contiguous()


def uses(table: Tensor, experts: int, own: range) -> tuple[list[int], int]:
    """Other ranks' experts that are used, by step, in all layers together; and all that are used in a round."""
    used = used_experts(table.numpy().astype(np.uint16), experts).any(2)  # [steps, layers, experts]
    all_used = int(used.sum())
    used[..., own.start : own.stop] = False
    return used.sum((1, 2)).tolist(), all_used


class Steps:
    """Decoding of ``batch`` sequences, a step at a time: the rows of a table come round.

    Attributes:
        table: int64 ``[steps, layers, batch, top_k]``, which experts tokens choose.
        kept: ``[steps, batch, hidden]``, what the last layer gave.
    """

    def __init__(self, shape: Shape, batch: int, steps: int, device: torch.device) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(batch)
        self.x = torch.randn(batch, shape.hidden, device=device, generator=generator).bfloat16()
        self.table = torch.zeros(steps, shape.layers, batch, shape.top_k, dtype=torch.long, device=device)
        self.kept = torch.zeros(steps, batch, shape.hidden, dtype=torch.bfloat16, device=device)
        self.number = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, table: Tensor) -> None:
        """The next step is the first of ``table``."""
        self.table.copy_(table)
        self.kept.fill_(float("nan"))
        self.number.zero_()

    def step(self, mix: Mix) -> None:
        chosen = self.table.index_select(0, self.number)[0]
        x = self.x
        for layer in range(self.shape.layers):
            x = x + mix(layer, F.rms_norm(x, (self.shape.hidden,)), chosen[layer])
        self.kept.index_copy_(0, self.number, x[None])
        self.number.add_(1).remainder_(len(self.table))


def read_by(reader: Read) -> Mix:
    """What a layer adds that reads experts where ``reader`` says."""

    def mix(layer: int, x: Tensor, chosen: Tensor) -> Tensor:
        with reader(layer, chosen) as (weights, rows):
            return through(x, weights, rows).mean(1)

    return mix


Exchange = Callable[[Tensor], Tensor]


def all_to_all(there: Tensor, back: Tensor) -> tuple[Exchange, Exchange]:
    """What gives all ranks' rows for those of this one; and, for what each rank has for all rows, the sums of its own.

    Args:
        there, back: ``[ranks * batch, ...]``, where they arrive.
    """
    ranks = dist.get_world_size()

    def dispatch(x: Tensor) -> Tensor:
        dist.all_to_all_single(there, x.repeat(ranks, 1))
        return there

    def combine(sums: Tensor) -> Tensor:
        dist.all_to_all_single(back, sums)
        return back.view(ranks, -1, back.shape[1]).sum(0)

    return dispatch, combine


def all_gather(there: Tensor, back: Tensor) -> tuple[Exchange, Exchange]:
    """The same by all-gather and reduce-scatter."""
    own = back[: len(back) // dist.get_world_size()]

    def dispatch(x: Tensor) -> Tensor:
        dist.all_gather_into_tensor(there, x)
        return there

    def combine(sums: Tensor) -> Tensor:
        dist.reduce_scatter_tensor(own, sums)
        return own

    return dispatch, combine


EXCHANGES: Final = {"all-to-all": all_to_all, "all-gather": all_gather}


def expert_parallel(shape: Shape, exchange: str, batch: int, whole: Sequence[Weights], rank: int) -> Mix:
    """Each rank has its experts only, and every token comes to all ranks with the numbers of its experts.

    So splits are the same whatever tokens choose, and a step can be captured. Sums of a rank's experts go back.
    """
    ranks = dist.get_world_size()
    each = shape.experts // ranks
    own = [{name: tensor[rank * each : (rank + 1) * each] for name, tensor in tensors.items()} for tensors in whole]
    device, top_k, hidden = own[0]["w13"].device, shape.top_k, shape.hidden
    there = torch.empty(ranks * batch, hidden + top_k, dtype=torch.bfloat16, device=device)
    back = torch.empty(ranks * batch, hidden, dtype=torch.bfloat16, device=device)
    dispatch, combine = EXCHANGES[exchange](there, back)
    # Experts of others are given rows that there are none of, each another: the kernel does those of one row in turn.
    lowest = torch.iinfo(torch.long).min
    row_of = torch.full((shape.experts,), lowest, device=device)
    row_of[rank * each : (rank + 1) * each] = torch.arange(each, device=device)
    nowhere = -1 - torch.arange(ranks * batch * top_k, device=device).view(-1, top_k)

    def mix(layer: int, x: Tensor, chosen: Tensor) -> Tensor:
        came = dispatch(torch.cat([x, chosen.to(torch.int16).view(torch.bfloat16)], 1))
        rows = torch.maximum(row_of[came[:, hidden:].view(torch.int16).long()], nowhere)
        return combine(through(came[:, :hidden].contiguous(), own[layer], rows).mean(1))

    return mix

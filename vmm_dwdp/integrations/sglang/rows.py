"""How the kernels of each MoE runner are told rows of a bank in the place of experts.

[Note: The order of sums]
    A bank has to leave the bits as they are, so nothing may be added in another order, however experts lie in rows.
    `by_ids`, SGLang's Triton kernels: a program multiplies some tokens of an expert by all of K, and does not know of
    others. So ids may be rows.
    `by_blocks`, Marlin: multiprocessors share the tiles of all blocks of tokens in equal stripes, which end anywhere in
    K. Where, depends on a block's place among all blocks. So tokens are sorted by expert, as without a bank, and then
    each block is told its row. How large blocks are depends on the length of the weights' tensors: that is `E`, and
    rows from `E` on lie in the same memory after them (`Telling.as_experts`).
    `by_slices`, triton_kernels: tokens come sorted by expert, in one slice of them for each, and tiles are chosen by
    the number of slices. So tokens, slices and their number stay, and only what a slice is called changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from vmm_dwdp.errors import StateError
from vmm_dwdp.schedule.in_place import LookedUp

LookUp = Callable[[Tensor], LookedUp]  # of chosen experts, int32 or int64 [tokens, top_k]
_SLICE: Final = 0xFFFF  # of a word of triton_kernels' schedule: which slice; above it, which block of its tokens


@dataclass(frozen=True)
class Telling:
    """How a runner is told rows; see [Note: The order of sums].

    Attributes:
        told: what a layer's `apply` is to be given in the place of its ``dispatch_output``, as long as it runs.
        as_experts: kernels count experts by the tensors' length, so that tensors are to be shown as long as without a
            bank; they reach the rows after those by address.
    """

    told: Callable[[Any, LookUp], AbstractContextManager[Any]]
    as_experts: bool = False


def names_experts(topk_output: Any) -> bool:
    """Whether SGLang's routing of some tokens says which experts they chose, in a form that is known here."""
    return any(hasattr(topk_output, name) for name in ("topk_ids", "routing_data", "a_ragged_metadata"))


@contextmanager
def by_ids(dispatch_output: Any, look_up: LookUp) -> Iterator[Any]:
    """The router's choice names rows."""
    routed = dispatch_output.topk_output
    rows = look_up(routed.topk_ids.contiguous()).rows
    yield dispatch_output._replace(topk_output=routed._replace(topk_ids=rows))


# -- Marlin ------------------------------------------------------------------------------------------------------------
@dataclass
class _Awaited:
    """Rows that the blocks of one pass through a layer are still to be told: ``[tokens * top_k]``."""

    rows: Tensor | None


_awaited: ContextVar[_Awaited | None] = ContextVar("_awaited", default=None)


@contextmanager
def by_blocks(dispatch_output: Any, look_up: LookUp) -> Iterator[Any]:
    """The router's choice stays, and blocks are told rows once tokens are sorted.

    Raises:
        StateError: they were not, so that kernels have read other experts.
    """
    chosen = dispatch_output.topk_output.topk_ids.contiguous()
    rows = look_up(chosen).rows
    awaited = _Awaited(None if rows is chosen else rows.flatten())
    before = _awaited.set(awaited)
    try:
        yield dispatch_output
    finally:
        _awaited.reset(before)
    if awaited.rows is not None and len(awaited.rows):
        raise StateError("experts were looked up in the bank, but Marlin's blocks were not told their rows")


def tell_blocks(
    original: Callable[..., tuple[Tensor, Tensor, Tensor]],
    topk_ids: Tensor,
    block_size: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Around what sorts a pass's tokens by expert, in blocks of one expert each, and says which each block has. The
    first token of a block says its row; after the last block there may be anything."""
    tokens, experts, counts = original(topk_ids, block_size, *args, **kwargs)
    awaited = _awaited.get()
    if awaited is not None and awaited.rows is not None:
        first = tokens[::block_size].clamp(0, len(awaited.rows) - 1)
        experts = awaited.rows.index_select(0, first).to(experts.dtype)
        awaited.rows = None
    return tokens, experts, counts


# -- triton_kernels ----------------------------------------------------------------------------------------------------
@contextmanager
def by_slices(dispatch_output: Any, look_up: LookUp) -> Iterator[Any]:
    """Slices of tokens are called as rows."""
    routed = dispatch_output.topk_output
    tokens = len(dispatch_output.hidden_states)
    if hasattr(routed, "routing_data"):  # 0.5.17
        data = routed.routing_data
        slices = _renamed(data.expt_data, tokens, data.n_expts_act, look_up)
        routed = routed._replace(routing_data=replace(data, expt_hist=slices.slice_sizes, expt_data=slices))
    else:
        slices = _renamed(routed.a_ragged_metadata, tokens, routed.n_expts_act, look_up)
        routed = routed._replace(a_ragged_metadata=slices)
    yield dispatch_output._replace(topk_output=routed)


def _renamed(slices: Any, tokens: int, top_k: int, look_up: LookUp) -> Any:
    """triton_kernels' `RaggedTensorMetadata` of one slice of tokens for each expert, by rows.

    What kernels index by the name of a slice is by rows, ``[S + E]``, and what nobody uses there undefined; its sizes
    are shown ``[E]`` long, as they are what slices are counted by. Where blocks of a slice begin is not read by name
    for weights like these, only how many blocks there are: at ``E``, or in 0.5.23 at the length of the weights.
    """
    sizes, schedule, offsets = slices.slice_sizes, slices.block_schedule_data, slices.block_offs_data
    num_experts, device = len(sizes), sizes.device
    places = torch.arange(tokens * top_k, dtype=slices.slice_offs.dtype, device=device)
    chosen = torch.searchsorted(slices.slice_offs[1:], places, right=True).view(tokens, top_k)
    found = look_up(chosen)
    if found.rows is chosen:
        return slices
    weight = next(iter(found.weights.values()))
    assert isinstance(weight, Tensor)
    num_rows = len(weight)
    before = num_rows - num_experts
    rows = torch.arange(before, num_rows + 1, device=device)  # one more, for places of no slice
    rows = rows.scatter_(0, chosen.flatten(), found.rows.flatten())[:num_experts]
    schedule = schedule.clamp(min=0)  # after the last block there is -1, which nobody reads
    return replace(
        slices,
        slice_sizes=sizes.new_empty(num_rows).scatter_(0, rows, sizes)[:num_experts],
        slice_offs=sizes.new_empty(num_rows).scatter_(0, rows, slices.slice_offs[:num_experts]),
        block_offs_data=torch.cat([offsets, offsets[:, -1:].expand(-1, before)], dim=1),
        block_schedule_data=schedule & ~_SLICE | rows.to(schedule.dtype)[schedule & _SLICE],
    )


TELLINGS: Final = {
    "triton": Telling(by_ids),
    "marlin": Telling(by_blocks, as_experts=True),
    "triton_kernel": Telling(by_slices),
}

"""In which order SGLang's kernels come to the experts that they read in place; see [Note: Owners in turn].

[Note: Owners in turn]
SGLang's grouped products go through the experts by their numbers, so that a multiprocessor that is free takes the next
expert's tile. Experts of one owner have numbers that follow each other: all ranks that read in place would come to the
same owner at the same time, share its link, and leave the others' idle. So the products go through the experts in an
order in which owners take turns (`ExpertPlacement.in_turn`), and every rank reads from all owners at once.

Copies ahead of use have no such order, and passes over them keep SGLang's.

The order is made where SGLang sorts tokens by expert, `moe_align_block_size`: it is given the experts' places in that
order for their numbers, and what it says of each block is put back into numbers. Blocks have the same tokens as before
and are multiplied by the same experts, only in another order. A program of SGLang's Triton kernels multiplies one block
by all of K, so every output has the same bits. Marlin's share out all blocks' K in equal parts, and add up otherwise in
another order; triton_kernels sort tokens in the router. Their order stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from vmm_dwdp.kernels.relabel import relabel
from vmm_dwdp.layout.placement import ExpertPlacement


class BlockOrder:
    """The order in which a rank's products go through the experts of every layer.

    Args:
        placement: of the layers' experts.
        reader: the rank.
        rows: of banks, which layers have before their experts; they come first.
        device: of the tokens.
    """

    RUNNERS: Final = frozenset({"triton"})  # of MoE, whose sums do not depend on the order

    def __init__(self, placement: ExpertPlacement, reader: int, rows: Iterable[int], device: torch.device) -> None:
        turns = placement.in_turn(reader)
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for num_rows in {0, *rows}:
            order = torch.tensor([*range(num_rows), *(num_rows + expert for expert in turns)], dtype=torch.int32)
            places = torch.empty_like(order)
            places[order.long()] = torch.arange(len(order), dtype=torch.int32)
            places, order = places.to(device), order.to(device)
            self._tables[len(order)] = places, order
            for dtype in (torch.int32, torch.int64):  # compiled now, as a first pass may be captured
                relabel(order.to(dtype), places)

    def align(
        self, original: Callable[..., Any], topk_ids: torch.Tensor, block_size: int, num_experts: int, *rest: Any
    ) -> Any:
        """Around SGLang's `moe_align_block_size`; experts of other layers, of which there are as many as of no layer
        here, keep their order."""
        if num_experts not in self._tables:
            return original(topk_ids, block_size, num_experts, *rest)
        places, order = self._tables[num_experts]
        token_ids, expert_ids, num_padded = original(relabel(topk_ids, places), block_size, num_experts, *rest)
        return token_ids, relabel(expert_ids, order), num_padded

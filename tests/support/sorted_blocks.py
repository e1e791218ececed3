"""What SGLang's kernel that sorts tokens by expert says, in torch's own words."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

NOTHING: Final = (-99, 1 << 30)  # what nobody wrote, after the last block


def align(topk_ids: Tensor, block_size: int, num_experts: int = 0, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The places in ``topk_ids`` sorted by expert, an expert's filled up to whole blocks with a place of none; each
    block's expert; and how many places that are. -1 is sorted first, as a number of its own."""
    ids = topk_ids.flatten()
    tokens: list[int] = []
    experts: list[int] = []
    for expert in ids.unique().tolist():
        of_expert = (ids == expert).nonzero().flatten().tolist()
        of_expert += [len(ids)] * (-len(of_expert) % block_size)
        tokens += of_expert
        experts += [expert] * (len(of_expert) // block_size)
    made = [*tokens, *(NOTHING * block_size)], [*experts, *NOTHING], [len(tokens), 0]
    first, second, third = (torch.tensor(each, dtype=torch.int32) for each in made)
    return first, second, third

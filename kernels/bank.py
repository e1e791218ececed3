"""Looking up chosen experts in a bank: launched in Triton on a GPU, and in torch's own words on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmm_dwdp.kernels.bank_table import DECAY, ONE, PINNED, USES_A_COPY, BankTable


def look_up(table: BankTable, chosen: Tensor, weights: Sequence[Tensor], *, copies: bool) -> Tensor:
    """Where each of the ``chosen`` experts is read; see [Note: The planner].

    Work for the current stream, which may be captured; the host waits for nothing. Calls for one table follow each
    other on the device.

    Args:
        chosen: int32 or int64 of any shape, contiguous, on the device of the table. What is no expert is given -1.
        weights: of the layer, each ``[S + E, ...]``, contiguous: rows before ``S`` are written.
        copies: whether experts may be copied into the bank.

    Returns:
        Of the shape and dtype of ``chosen``, newly allocated: the places in ``weights``.
    """
    if chosen.is_cpu:
        return _look_up_on_cpu(table, chosen, weights, copies=copies)
    from vmm_dwdp.kernels.triton.bank import move, plan

    with torch.cuda.device(chosen.device):
        rows = plan(table, chosen, copies=copies)
        if copies:
            move(table, weights)
    return rows


def _look_up_on_cpu(table: BankTable, chosen: Tensor, weights: Sequence[Tensor], *, copies: bool) -> Tensor:
    """The same in torch's own words, for the host driver. Wherever it is interrupted, no expert is said to be in a row
    that has not its bytes."""
    num_experts, num_rows = table.num_experts, table.num_rows
    valid = (chosen >= 0) & (chosen < num_experts)
    known = chosen.where(valid, 0).long()
    used = torch.zeros(num_experts, dtype=torch.bool)
    used[known[valid]] = True
    remote = torch.ones(num_experts, dtype=torch.bool)
    remote[table.own.start : table.own.stop] = False
    held = table.rows >= 0
    table.scores.copy_((table.scores.long() * DECAY >> 16) + used * ONE)
    if copies:
        coming, leaving = _changes(table, used, used & remote, held)
        unused = torch.ones(num_rows, dtype=torch.bool)
        unused[table.rows[held].long()] = False
        free = torch.cat([table.rows[leaving], unused.nonzero().flatten().int()])
        table.rows[leaving] = -1
        for weight in weights:
            weight[free[: len(coming)].long()] = weight[num_rows + coming]
        table.rows[coming] = free[: len(coming)]
        table.counts[2] += len(coming)
    table.counts[:2] += torch.stack([(used & remote).sum(), (used & held).sum()])
    row = table.rows.to(chosen.dtype)[known]
    return row.where(row >= 0, num_rows + known.to(chosen.dtype)).where(valid, -1)


def _changes(table: BankTable, used: Tensor, wanted: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that come into the bank, and those that leave it, in ascending order."""
    past = table.scores.long() - ONE * (used & ~held)
    key = (past << 16) - torch.arange(table.num_experts) + PINNED * (used & held)
    free = table.num_rows - int(held.sum())
    table.credit.add_(wanted.sum()).clamp_(max=USES_A_COPY * table.num_rows)
    newcomers = _best(key, wanted & ~held, free + int(table.credit) // USES_A_COPY)
    kept = _best(key, held | newcomers, table.num_rows)
    leaving = (held & ~kept).nonzero().flatten()
    table.credit.sub_(USES_A_COPY * len(leaving))
    return (newcomers & kept).nonzero().flatten(), leaving


def _best(key: Tensor, among: Tensor, most: int) -> Tensor:
    """bool ``[E]``: ``most`` of those ``among`` which there are, of the largest keys."""
    order = key.where(among, -PINNED).argsort(descending=True)
    best = torch.zeros_like(among)
    best[order[:most]] = True
    return best & among

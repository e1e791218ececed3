"""The planner of a bank, and the copy of what comes into it, in Triton; see [Note: The planner].

The planner is one program: its steps depend on each other, and a layer has hundreds of experts. What one of its threads
is to read of what others wrote goes through memory, with a barrier between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_dwdp.kernels.bank_table import DECAY, ONE, PINNED, USES_A_COPY, BankTable

IDS: Final = 512  # that the planner looks at in one step, however many there are: one form of it for all
PAIRS: Final = 1 << 14  # of experts that it compares in one step
LEAST_COMPARED: Final = 32  # experts with which it compares all in one step, where that are more pairs
BLOCK_BYTES: Final = 16 << 10  # that a program copies in one step
WORDS: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def _ids(chosen, first, num_ids, num_experts, IDS: tl.constexpr):
    """The ids from ``first`` on: their places, what they are, and whether they are experts."""
    here = first + tl.arange(0, IDS)
    ids = tl.load(chosen + here, here < num_ids, -1)
    return here, ids, (ids >= 0) & (ids < num_experts)


@triton.jit
def _rank(keys, rows, key, num_experts, E: tl.constexpr, COMPARED: tl.constexpr):
    """How many of the keys are larger than each: of those that are in the bank, and of others.

    Both are counted in one number. The sums are over the first dimension: a thread adds up most of them by itself.
    """
    larger = tl.zeros((E,), tl.int32)
    for first in range(0, num_experts, COMPARED):
        compared = first + tl.arange(0, COMPARED)
        other = tl.load(keys + compared, compared < num_experts, -(1 << 62))
        count = tl.where(tl.load(rows + compared, compared < num_experts, -1) >= 0, 1, 1 << 16)
        larger += tl.sum(tl.where(other[:, None] > key[None, :], count[:, None], 0), 0)
    return larger & 0xFFFF, larger >> 16


@triton.jit
def _exchange(
    rows,
    credit,
    saved,
    scratch,
    moves,
    key,
    row,
    read,
    num_experts,
    num_rows,
    USES_A_COPY: tl.constexpr,
    E: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Who leaves, who comes, and into which row: the rows of all, and how many come, which are written to ``moves``.
    ``scratch`` holds the keys; ``saved`` is what ``credit`` was."""
    held = row >= 0
    num_held = tl.sum(held.to(tl.int32), 0)
    saved += tl.sum(read.to(tl.int32), 0)
    saved = tl.minimum(saved, USES_A_COPY * num_rows)
    most = num_rows - num_held + (saved // USES_A_COPY).to(tl.int32)
    there, others = _rank(scratch, rows, key, num_experts, E, COMPARED)
    rank = there + tl.minimum(others, most)
    coming = read & (row < 0) & (others < most) & (rank < num_rows)
    leaving = held & (rank >= num_rows)
    num_leaving = tl.sum(leaving.to(tl.int32), 0)
    num_coming = tl.sum(coming.to(tl.int32), 0)
    place = tl.cumsum(coming.to(tl.int32), 0) - 1
    tl.debug_barrier()  # all have compared
    tl.store(scratch + tl.cumsum(leaving.to(tl.int32), 0) - 1, row.to(tl.int64), leaving)
    tl.debug_barrier()
    free = tl.load(scratch + place, coming & (place < num_leaving), 0).to(tl.int32)
    free = tl.where(place < num_leaving, free, num_held + place - num_leaving)
    tl.store(credit, saved - USES_A_COPY * num_leaving)
    tl.store(moves + 1 + place, tl.arange(0, E), coming)
    tl.store(moves, num_coming)
    return tl.where(coming, free, tl.where(leaving, -1, row)), num_coming


# What differs from layer to layer, and from pass to pass, selects no other form of the kernel.
@triton.jit(
    do_not_specialize=["num_ids", "num_experts", "num_rows", "own_start", "own_stop"],
    do_not_specialize_on_alignment=["chosen", "places"],
)
def _plan(
    chosen,
    places,
    rows,
    planned,
    scores,
    credit,
    moves,
    counts,
    scratch,
    num_ids,
    num_experts,
    num_rows,
    own_start,
    own_stop,
    COPIES: tl.constexpr,
    DECAY: tl.constexpr,
    ONE: tl.constexpr,
    PINNED: tl.constexpr,
    USES_A_COPY: tl.constexpr,
    E: tl.constexpr,
    IDS: tl.constexpr,
    COMPARED: tl.constexpr,
):
    experts = tl.arange(0, E)
    real = experts < num_experts
    # What does not depend on the ids is on its way before they are waited for.
    row = tl.load(rows + experts, real, -1)
    score = tl.load(scores + experts, real, 0).to(tl.int64)
    saved = tl.load(credit)
    past_uses, past_hits, past_copies = tl.load(counts), tl.load(counts + 1), tl.load(counts + 2)
    uses = tl.zeros((E,), tl.int32)
    for first in range(0, num_ids, IDS):
        here, ids, valid = _ids(chosen, first, num_ids, num_experts, IDS)
        uses += tl.histogram(tl.where(valid, ids, 0).to(tl.int32), E, mask=valid)
    used = uses > 0
    read = used & real & ((experts < own_start) | (experts >= own_stop))
    score = ((score * DECAY) >> 16) + tl.where(used, ONE, 0)
    held = row >= 0
    past = score - tl.where(used & ~held, ONE, 0)
    key = (past << 16) - experts + tl.where(used & held, PINNED, 0)
    tl.store(scratch + experts, tl.where(held | read, key, -PINNED), real)
    tl.debug_barrier()  # all have read scores, too, of which several threads may hold one
    tl.store(scores + experts, score.to(tl.int32), real)
    num_used, num_hits = tl.sum(read.to(tl.int32), 0), tl.sum((used & held).to(tl.int32), 0)
    num_coming = 0
    if COPIES:
        row, num_coming = _exchange(
            rows, credit, saved, scratch, moves, key, row, read, num_experts, num_rows, USES_A_COPY, E, COMPARED
        )
    tl.store(planned + experts, row, real)
    tl.store(counts, past_uses + num_used)
    tl.store(counts + 1, past_hits + num_hits)
    tl.store(counts + 2, past_copies + num_coming)
    for first in range(0, num_ids, IDS):
        here, ids, valid = _ids(chosen, first, num_ids, num_experts, IDS)
        found = tl.gather(row, tl.where(valid, ids, 0).to(tl.int32), 0).to(ids.dtype)
        found = tl.where(found >= 0, found, num_rows + ids)
        tl.store(places + here, tl.where(valid, found, -1), here < num_ids)


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def _move(
    rows,
    planned,
    moves,
    weights,
    expert_words,
    num_experts,
    num_rows,
    NUM: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
):
    """Programs share the blocks of all experts that come, and the first makes the plan the table."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_moves = tl.load(moves)
    for i in tl.static_range(NUM):
        words = tl.cast(expert_words[i], tl.int64)  # of an expert of one word Triton makes a constant
        blocks = tl.cdiv(words, BLOCK).to(tl.int32)
        for work in range(program, num_moves * blocks, programs):
            expert = tl.load(moves + 1 + work // blocks)
            row = tl.load(planned + expert)
            inside = (work % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            source = weights[i].to(tl.int64) + (num_rows + expert).to(tl.int64) * words * WORD_BYTES
            target = weights[i].to(tl.int64) + row.to(tl.int64) * words * WORD_BYTES
            source = tl.multiple_of(source.to(tl.pointer_type(WORD)), ALIGNED)
            target = tl.multiple_of(target.to(tl.pointer_type(WORD)), ALIGNED)
            tl.store(target + inside, tl.load(source + inside, inside < words), inside < words)
    if program == 0:
        experts = tl.arange(0, E)
        real = experts < num_experts
        tl.store(rows + experts, tl.load(planned + experts, real), real)


def plan(table: BankTable, chosen: Tensor, *, copies: bool) -> Tensor:
    """Launch the planner on the current stream; returns the places of ``chosen``."""
    places = torch.empty_like(chosen)
    experts = max(LEAST_COMPARED, triton.next_power_of_2(table.num_experts))
    _plan[(1,)](
        chosen,
        places,
        table.rows,
        table.planned,
        table.scores,
        table.credit,
        table.moves,
        table.counts,
        table.scratch,
        chosen.numel(),
        table.num_experts,
        table.num_rows,
        table.own.start,
        table.own.stop,
        COPIES=copies,
        DECAY=DECAY,
        ONE=ONE,
        PINNED=PINNED,
        USES_A_COPY=USES_A_COPY,
        E=experts,
        IDS=IDS,
        COMPARED=max(LEAST_COMPARED, min(experts, PAIRS // experts)),
        num_warps=4 if experts <= 128 else 8,
    )
    return places


def move(table: BankTable, weights: Sequence[Tensor], programs: int | None = None) -> None:
    """Launch the copy of what the planner has found on the current stream, by ``programs`` programs.

    ``weights``: each ``[S + E, ...]``, contiguous.
    """
    if programs is None:
        programs = torch.cuda.get_device_properties(table.rows.device).multi_processor_count
    strides = [weight.stride(0) * weight.element_size() for weight in weights]
    alignment = math.gcd(16, *strides, *(weight.data_ptr() for weight in weights))
    word = WORDS[min(8, alignment)]
    _move[(programs,)](
        table.rows,
        table.planned,
        table.moves,
        tuple(weight.data_ptr() for weight in weights),
        tuple(stride // word.itemsize for stride in strides),
        table.num_experts,
        table.num_rows,
        NUM=len(weights),
        WORD=getattr(tl, str(word).removeprefix("torch.")),
        WORD_BYTES=word.itemsize,
        ALIGNED=alignment,
        BLOCK=BLOCK_BYTES // word.itemsize,
        E=triton.next_power_of_2(table.num_experts),
        num_warps=8,
    )

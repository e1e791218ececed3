"""The product of few tokens with the experts that each of them chose, in Triton; see [Note: Chosen experts].

[Note: Reading in chunks]
    An expert's weights are one run of bytes, and so are those of some of its rows. A program reads such a run in chunks
    of 16 bytes, one a thread, side by side and all at once: every line of memory that a warp asks for is whole, also
    where a row's end is none, and some megabytes are under way, as a link wants it. No chunk crosses a row, and all of
    its numbers have one scale. So a chunk is multiplied by itself, and sums of chunks are added up by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_dwdp.kernels.formats import Format
from vmm_dwdp.kernels.triton.grouped_gemm import ELEMENTS, e8m0, unpack_e2m1

CHUNK_BYTES = 16  # the widest load of a thread
CHUNKS = 512  # of a program, or as many as a row has; half as many where each is 32 numbers in registers


@triton.jit
def _scales_of(scale, number, chunk, first, in_row, n, mask, stride, FORM: tl.constexpr, CPR: tl.constexpr):
    """The scale of each chunk; see [Note: Reading in chunks]."""
    BLOCKS: tl.constexpr = (CPR * 16 + 127) // 128
    if FORM == "mxfp4":  # as many as there are chunks, in their order
        factors = e8m0(tl.load(scale + number * stride + first + chunk, mask, 0))
    else:
        factors = tl.load(scale + number * stride + n // 128 * BLOCKS + in_row * 16 // 128, mask, 0.0)
    return factors


# What differs from call to call selects no other form of the kernel, but for the numbers that are constants.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"], do_not_specialize_on_alignment=["rows"])
def _kernel(
    x,
    weight,
    scale,
    rows,
    out,
    weight_stride,
    scale_stride,
    num_pairs,
    num_rows,
    n_size,
    FORM: tl.constexpr,
    SHARED: tl.constexpr,
    PAIRS: tl.constexpr,
    CPR: tl.constexpr,
    STORED: tl.constexpr,
    NUMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A row has ``CPR`` chunks of ``STORED`` elements, which hold ``NUMBERS`` numbers; ``SHARED`` pairs share an x."""
    blocks = tl.cdiv(n_size, ROWS)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    pairs = tl.arange(0, PAIRS)
    number = tl.load(rows + pair)
    same = (tl.load(rows + pairs, pairs < num_pairs, -1) == number) & (pairs < num_pairs)
    if tl.min(tl.where(same, pairs, PAIRS), 0) < pair:
        return  # who has the first of them does all
    known = (number >= 0) & (number < num_rows)
    number = tl.where(known, number, 0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    in_row, row = chunk % CPR, chunk // CPR
    n = block * ROWS + row
    mask = (row < ROWS) & (n < tl.where(known, n_size, 0))
    first = block.to(tl.int64) * (ROWS * CPR)
    run = tl.multiple_of(weight + number * weight_stride + first * STORED, 16)
    stored = tl.load(
        run + chunk[:, None] * STORED + tl.arange(0, STORED)[None, :], mask[:, None], 0 if FORM == "mxfp4" else 0.0
    )
    values = unpack_e2m1(stored, CHUNKS, NUMBERS) if FORM == "mxfp4" else stored.to(tl.float32)
    factors = tl.full((CHUNKS,), 1.0, tl.float32)
    if FORM != "plain":
        factors = _scales_of(scale, number, chunk, first, in_row, n, mask, scale_stride, FORM, CPR)
    inside = in_row[:, None] * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    sums = tl.arange(0, ROWS)
    while pair < PAIRS:
        x_row = x + (pair // SHARED).to(tl.int64) * (CPR * NUMBERS)
        products = tl.sum(values * tl.load(x_row + inside, mask[:, None], 0.0).to(tl.float32), 1) * factors
        product = tl.sum(tl.where((row[None, :] == sums[:, None]) & mask[None, :], products[None, :], 0.0), 1)
        to = out + pair.to(tl.int64) * n_size + block * ROWS + sums
        tl.store(to, product.to(out.dtype.element_ty), block * ROWS + sums < n_size)
        pair = tl.min(tl.where(same & (pairs > pair), pairs, PAIRS), 0)


def run(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor | None, form: Format) -> Tensor:
    """Launch on the current stream of ``x``'s device; arguments as of `chosen_gemm`, checked."""
    (tokens, top_k), n, k = rows.shape, weight.shape[1], x.shape[-1]
    out = x.new_empty((tokens, top_k, n))
    if out.numel() == 0:
        return out
    stored = CHUNK_BYTES // weight.element_size()
    numbers = 2 * stored if form.packed else stored
    a_row = k // numbers
    chunks = max(CHUNKS // 2 if form.packed else CHUNKS, triton.next_power_of_2(a_row))
    num_rows = 1 << (chunks // a_row).bit_length() - 1
    element = ELEMENTS[weight.dtype]
    as_stored = weight.view(torch.uint8) if element is tl.uint8 else weight
    scales = as_stored if scale is None else scale.view(torch.uint8) if form is Format.MXFP4 else scale
    _kernel[(rows.numel() * triton.cdiv(n, num_rows),)](
        x,
        as_stored,
        scales,
        rows,
        out,
        as_stored.stride(0),
        scales.stride(0),
        rows.numel(),
        len(weight),
        n,
        FORM=form.value,
        SHARED=top_k if x.dim() == 2 else 1,
        PAIRS=triton.next_power_of_2(rows.numel()),
        CPR=a_row,
        STORED=stored,
        NUMBERS=numbers,
        ROWS=num_rows,
        CHUNKS=chunks,
        num_warps=4,
    )
    return out

"""The TensorList grouped GEMM in Triton: for any NVIDIA GPU from sm_80 on, and for FP4 weights under bf16 activations.

[Note: Transposed product]
    A program computes ``weight @ x.T`` for one tile: FP4 weights are decoded in registers, and Hopper's matrix
    instruction takes its left operand from there. It also lets a tile be as narrow as 16 tokens.

[Note: Decoding FP4]
    The three magnitude bits of e2m1 become the low exponent bits and the first mantissa bit of an fp16 number, and the
    seven of an e4m3 scale its low exponent bits and mantissa: both are then right but for the bias, a power of two.
    A product of the two has six significant bits, so bf16 holds it exactly; an e8m0 scale is a power of two anyway.
    The fp32 scale of an expert is applied to the finished sums.

[Note: Two widths]
    Where experts have few rows, time goes into reading weights, over a link perhaps, and every tile of rows reads them
    again. So a program takes up to ``FEW`` rows of an expert: in a batch of as many tokens no weight is read twice,
    however skewed its routing. Most experts have fewer rows, and to multiply them in a tile of that width would take
    longer than to read them: if they fit, a program takes a tile of ``NARROW`` rows, about as many as the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmm_dwdp.kernels.formats import FP8, PACKED_FP4
from vmm_dwdp.kernels.problem import Problem

BAND = 8  # tiles along the tokens that share columns of weights in L2
TILE_N = 128
FEW = 64  # rows
ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    FP8: tl.float8e4nv,
    **dict.fromkeys(PACKED_FP4, tl.uint8),
}


@triton.jit
def _find_tile(offsets, pid, num_experts, num_rows, tiles_n, TILE_M: tl.constexpr, BAND: tl.constexpr, E: tl.constexpr):
    """Expert, first row, end of the expert's rows and tile along N; expert ``num_experts`` where there is no work."""
    experts = tl.arange(0, E)
    real = experts < num_experts
    ends = tl.minimum(tl.maximum(tl.load(offsets + experts, real, 0), 0), num_rows)
    starts = tl.minimum(tl.maximum(tl.load(offsets + experts - 1, real & (experts > 0), 0), 0), num_rows)
    tiles = tl.where(real, tl.cdiv(tl.maximum(ends - starts, 0), TILE_M), 0)
    sums = tl.cumsum(tiles, 0)
    tiles_m = tl.sum(tiles, 0)
    band = pid // (BAND * tiles_n)
    width = tl.maximum(tl.minimum(tiles_m - band * BAND, BAND), 1)
    within = pid - band * BAND * tiles_n
    tile = band * BAND + within % width
    column = within // width
    expert = tl.where((tile < tiles_m) & (column < tiles_n), tl.sum((sums <= tile).to(tl.int32), 0), num_experts)
    mine = experts == expert
    before = tl.sum(tl.where(mine, sums - tiles, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0) + (tile - before) * TILE_M
    return expert, start, tl.sum(tl.where(mine, ends, 0), 0), column


@triton.jit
def _entry_address(bases, strides, firsts, expert, NUM: tl.constexpr):
    """Address of one expert in a list: where each tensor starts, ``strides`` bytes from expert to expert in it."""
    address = bases[0].to(tl.int64)
    for i in tl.static_range(NUM):
        here = bases[i].to(tl.int64) + (expert - firsts[i]).to(tl.int64) * strides[i]
        address = tl.where(expert >= firsts[i], here, address)
    return address


@triton.jit
def unpack_e2m1(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 ``[ROWS, COLUMNS]`` of packed FP4 ``[ROWS, COLUMNS / 2]`` (see [Note: Decoding FP4])."""
    codes = tl.reshape(tl.join(packed & 0xF, packed >> 4), (ROWS, COLUMNS)).to(tl.uint16)
    return (((codes & 8) << 12) | ((codes & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e8m0(scale):
    """fp32 of the bytes of e8m0 scales: powers of two."""
    return (scale.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode_fp4(packed, scale, NV: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    """fp32 ``[TILE_N, TILE_K]`` of packed FP4 and the bytes of its block scales (see [Note: Decoding FP4])."""
    BLOCK: tl.constexpr = 16 if NV else 32
    if NV:
        factors = ((scale & 0x7F).to(tl.uint16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        factors = e8m0(scale)
    values = tl.reshape(unpack_e2m1(packed, TILE_N, TILE_K), (TILE_N, TILE_K // BLOCK, BLOCK)) * factors[:, :, None]
    return tl.reshape(values, (TILE_N, TILE_K))


@triton.jit
def _multiply(
    operands,
    FORM: tl.constexpr,
    CUT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write rows ``[start, min(start + TILE_M, end))`` of a tile; an expert's weight and scales by their addresses.

    ``CUT``: whether N ends within a tile. Nothing is loaded past it then: the last row in its place, again and again,
    took a quarter of the rate at which weights of N = 2880 are read over PCIe.
    """
    x, weight, scales, expert_scale, x_scale, out, start, end, column, n_size, k_size = operands
    rows = start + tl.arange(0, TILE_M)
    row_mask = rows < end
    columns = column * TILE_N + tl.arange(0, TILE_N)
    column_mask = columns < n_size if CUT else tl.full((TILE_N,), True, tl.int1)
    x_rows = x + rows.to(tl.int64)[:, None] * k_size
    PACKED: tl.constexpr = FORM == "nvfp4" or FORM == "mxfp4"
    STORED_K: tl.constexpr = TILE_K // 2 if PACKED else TILE_K
    BLOCK: tl.constexpr = 16 if FORM == "nvfp4" else 32
    stored_k = k_size // 2 if PACKED else k_size
    weight_rows = weight + columns.to(tl.int64)[:, None] * stored_k
    blocks_k = tl.cdiv(k_size, 128)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    for k in range(0, k_size, TILE_K):
        ks = k + tl.arange(0, TILE_K)
        stored = (k // 2 if PACKED else k) + tl.arange(0, STORED_K)
        x_tile = tl.load(x_rows + ks[None, :], row_mask[:, None] & (ks < k_size)[None, :], 0.0)
        w_mask = column_mask[:, None] & (stored < stored_k)[None, :]
        w_tile = tl.load(weight_rows + stored[None, :], w_mask, 0 if PACKED else 0.0)
        if PACKED:
            blocks = k // BLOCK + tl.arange(0, TILE_K // BLOCK)
            scale_rows = scales.to(tl.pointer_type(tl.uint8)) + columns.to(tl.int64)[:, None] * (k_size // BLOCK)
            scale_mask = column_mask[:, None] & (blocks < k_size // BLOCK)[None, :]
            scale = tl.load(scale_rows + blocks[None, :], scale_mask, 0)
            w_tile = _decode_fp4(w_tile, scale, FORM == "nvfp4", TILE_N, TILE_K).to(x.dtype.element_ty)
        if FORM == "fp8 1x128/128x128":
            scale_pointer = scales.to(tl.pointer_type(tl.float32))
            w_factor = tl.load(scale_pointer + (column * TILE_N // 128) * blocks_k + k // 128)
            x_factor = tl.load(x_scale + rows.to(tl.int64) * blocks_k + k // 128, row_mask, 0.0)
            acc += tl.dot(w_tile, x_tile.T) * (w_factor * x_factor)[None, :]
        else:
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
    if FORM == "nvfp4":
        acc *= expert_scale
    if FORM == "fp8 row-wise":
        w_factors = tl.load(scales.to(tl.pointer_type(tl.float32)) + columns, column_mask, 0.0)
        acc *= w_factors[:, None] * tl.load(x_scale + rows, row_mask, 0.0)[None, :]
    to = out + rows.to(tl.int64)[:, None] * n_size + columns[None, :]
    tl.store(to, acc.T.to(out.dtype.element_ty), row_mask[:, None] & column_mask[None, :])


# What differs from call to call selects no other form of the kernel, which would have to be compiled: neither the
# number of rows, but for the widths of tiles, nor where offsets and the scales of x start.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["offsets", "x_scale"])
def _kernel(
    x,
    weights,
    weight_strides,
    weight_scales,
    scale_strides,
    global_scales,
    firsts,
    x_scale,
    offsets,
    out,
    num_rows,
    num_experts,
    n_size,
    k_size,
    FORM: tl.constexpr,
    CUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    NUM: tl.constexpr,
    E: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
):
    tiles_n = tl.cdiv(n_size, TILE_N)
    expert, start, end, column = _find_tile(offsets, tl.program_id(0), num_experts, num_rows, tiles_n, WIDE, BAND, E)
    if expert >= num_experts:
        return
    weight = _entry_address(weights, weight_strides, firsts, expert, NUM).to(tl.pointer_type(WEIGHT))
    weight = tl.multiple_of(weight, 16)  # here: it is lost where it is said of a function's argument
    scales = tl.zeros((), tl.int64)
    if FORM != "plain":
        scales = _entry_address(weight_scales, scale_strides, firsts, expert, NUM)
    expert_scale = tl.full((), 1.0, tl.float32)
    if FORM == "nvfp4":
        address = _entry_address(global_scales, (4,) * NUM, firsts, expert, NUM)
        expert_scale = tl.load(address.to(tl.pointer_type(tl.float32)))
    operands = (x, weight, scales, expert_scale, x_scale, out, start, end, column, n_size, k_size)
    if NARROW < WIDE and end - start <= NARROW:
        _multiply(operands, FORM, CUT, NARROW, TILE_N, TILE_K)
    else:
        _multiply(operands, FORM, CUT, WIDE, TILE_N, TILE_K)


def _addresses(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where each tensor of a list starts, and its bytes from expert to expert."""
    return tuple(t.data_ptr() for t in tensors), tuple(t.stride(0) * t.element_size() for t in tensors)


def run(problem: Problem) -> Tensor:
    """Launch on the current stream of ``x``'s device; see :class:`~vmm_dwdp.kernels.provider.Provider`."""
    x, weights, form = problem.x, problem.weights, problem.form
    num_rows, num_experts = x.shape[0], problem.num_experts
    out = x.new_empty((num_rows, problem.n), dtype=problem.out_dtype)
    if out.numel() == 0:
        return out
    firsts, total = [], 0
    for weight in weights:
        firsts.append(total)
        total += weight.shape[0]
    narrow = min(128, max(16, triton.next_power_of_2(num_rows // num_experts)))
    wide = max(narrow, min(FEW, triton.next_power_of_2(num_rows)))
    alone = narrow == wide
    tile_k = {1: 128, 2: 64, 4: 32}[x.element_size()]
    grid = (triton.cdiv(num_rows, wide) + min(num_experts, num_rows), triton.cdiv(problem.n, TILE_N))
    _kernel[(grid[0] * grid[1],)](
        x,
        *_addresses(weights),
        *_addresses(problem.weight_scales),
        _addresses(problem.global_scales)[0],
        tuple(firsts),
        problem.x_scale,
        problem.offsets,
        out,
        num_rows,
        num_experts,
        problem.n,
        problem.k,
        FORM=form.value,
        CUT=problem.n % TILE_N != 0,
        WEIGHT=ELEMENTS[weights[0].dtype],
        NUM=len(weights),
        E=triton.next_power_of_2(num_experts),
        NARROW=narrow,
        WIDE=wide,
        TILE_N=TILE_N,
        TILE_K=tile_k,
        BAND=BAND,
        num_warps=4 if alone and wide < 128 else 8,
        num_stages=3,
        maxnreg=None if alone else 128,  # for two programs at once on a multiprocessor
    )
    return out

"""Random grouped GEMMs and what they should give: for tests and benchmarks, with and without a GPU."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from vmm_dwdp.kernels.formats import FP8, Format, Scales

ROUTINGS = ("balanced", "skewed", "one", "half-empty", "short")


class Operands(NamedTuple):
    """The arguments of ``tensor_list_grouped_gemm``."""

    x: Tensor
    weights: list[Tensor]
    offsets: Tensor
    scales: Scales | None


def route(num_rows: int, num_experts: int, routing: str, generator: torch.Generator) -> Tensor:
    """Ends of each expert's rows, int32 ``[E]`` on the CPU.

    ``balanced``: every row picks an expert uniformly. ``skewed``: expert ``i`` is picked in proportion to
    ``1 / (i + 1)``, experts in random order. ``one``: one expert has every row. ``half-empty``: every other
    expert has none. ``short``: balanced, and the last rows belong to nobody.
    """
    weight = torch.ones(num_experts)
    if routing == "skewed":
        weight = (1 / torch.arange(1, num_experts + 1))[torch.randperm(num_experts, generator=generator)]
    elif routing == "one":
        weight.zero_()[num_experts // 2] = 1
    elif routing == "half-empty":
        weight[1::2] = 0
    elif routing not in ("balanced", "short"):
        raise ValueError(f"routing {routing!r} is none of {ROUTINGS}")
    rows = num_rows - num_rows // 10 if routing == "short" else num_rows
    picks = (
        torch.multinomial(weight, rows, replacement=True, generator=generator)
        if rows
        else torch.empty(0, dtype=torch.long)
    )
    return torch.bincount(picks, minlength=num_experts).cumsum(0).int()


def random_operands(
    form: Format,
    *,
    num_rows: int,
    experts: list[int],
    n: int,
    k: int,
    routing: str = "balanced",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Operands:
    """Operands with a list entry of ``experts[i]`` experts each; ``dtype`` is that of ``x`` and of plain weights."""
    cpu = torch.Generator().manual_seed(seed)
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        drawn = torch.float32 if dtype == FP8 else dtype
        out = torch.empty(shape, dtype=dtype, device=device)
        for part in out if out.dim() == 3 else out[None]:  # an expert at a time: the fp32 of all would not fit
            part.copy_(torch.randn(part.shape, dtype=drawn, device=device, generator=gen).mul_(scale))
        return out

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=device, generator=gen)

    offsets = route(num_rows, sum(experts), routing, cpu).to(device)
    if form is Format.PLAIN:
        weights = [normal(e, n, k, scale=k**-0.5) for e in experts]
        return Operands(normal(num_rows, k), weights, offsets, None)
    if form in (Format.FP8_ROWWISE, Format.FP8_BLOCK):
        rowwise = form is Format.FP8_ROWWISE
        nb, kb = -(-n // 128), -(-k // 128)
        weights = [normal(e, n, k, scale=64, dtype=FP8) for e in experts]
        weight_scales = [uniform(0.5, 1.5, e, *((n,) if rowwise else (nb, kb))) * k**-0.5 / 64 for e in experts]
        x_scale = uniform(0.5, 1.5, num_rows, *(() if rowwise else (kb,))) / 64
        return Operands(normal(num_rows, k, scale=64, dtype=FP8), weights, offsets, Scales(weight_scales, x_scale))
    x = normal(num_rows, k)
    weights = [torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=device, generator=gen) for e in experts]
    if form is Format.NVFP4:
        scales = [uniform(1, 400, e, n, k // 16).to(FP8) for e in experts]
        return Operands(
            x, weights, offsets, Scales(scales, weight_global=[uniform(0.5, 2, e) * k**-0.5 / 400 for e in experts])
        )
    powers = [
        torch.randint(118, 124, (e, n, k // 32), dtype=torch.uint8, device=device, generator=gen) for e in experts
    ]
    return Operands(x, weights, offsets, Scales([power.view(torch.float8_e8m0fnu) for power in powers]))


def reference(operands: Operands) -> Tensor:
    """The grouped GEMM in fp64, row by row of the definition; rows of no expert are zero."""
    x, scales = operands.x.double(), operands.scales
    out = x.new_zeros(x.shape[0], operands.weights[0].shape[1])
    if scales is not None and scales.x is not None:
        column = torch.arange(x.shape[1], device=x.device)
        x *= scales.x.double()[:, None] if scales.x.dim() == 1 else scales.x.double()[:, column // 128]
    start, expert = 0, 0
    ends = operands.offsets.tolist()
    for i, weight in enumerate(operands.weights):
        for local in range(weight.shape[0]):
            end = ends[expert]
            if end > start:
                out[start:end] = x[start:end] @ dense(operands, i, local).T
            start, expert = end, expert + 1
    return out


def dense(operands: Operands, entry: int, local: int) -> Tensor:
    """fp64 ``[N, K]`` of one expert, from its bytes: written apart from ``formats.dequantize_weight`` on purpose."""
    stored = operands.weights[entry][local]
    if operands.scales is None:
        return stored.double()
    scale = operands.scales.weight[entry][local]
    if stored.dtype == FP8:
        if scale.dim() == 1:
            return stored.double() * scale.double()[:, None]
        rows, columns = (torch.arange(size, device=stored.device) // 128 for size in stored.shape)
        return stored.double() * scale.double()[rows][:, columns]
    columns = torch.arange(stored.shape[1] * 2, device=stored.device)
    code = (stored.int()[:, columns // 2] >> (4 * (columns % 2))) & 15
    exponent, mantissa, sign = (code >> 1) & 3, code & 1, 1 - 2 * (code >> 3)
    value = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)).double() * sign
    if scale.dtype == FP8:
        assert operands.scales.weight_global is not None
        return value * scale.double()[:, columns // 16] * operands.scales.weight_global[entry][local].double()
    return value * 2.0 ** (scale.view(torch.uint8).double()[:, columns // 32] - 127)


def some_rows(operands: Operands, count: int, seed: int = 0) -> tuple[Operands, Tensor]:
    """``count`` of the rows that belong to an expert, as operands of their own, and their numbers, ascending."""
    rows = int(operands.offsets[-1])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(rows, generator=generator)[:count].sort().values.to(operands.x.device)
    offsets = torch.searchsorted(picks, operands.offsets.long()).int()
    scales = operands.scales
    if scales is not None and scales.x is not None:
        scales = dataclasses.replace(scales, x=scales.x[picks])
    return Operands(
        operands.x.view(torch.uint8)[picks].view(operands.x.dtype), operands.weights, offsets, scales
    ), picks


def relative_error(out: Tensor, operands: Operands) -> float:
    """``|out - reference| / |reference|`` over the rows that belong to an expert (Frobenius norms)."""
    rows = int(operands.offsets[-1])
    expected = reference(operands)[:rows]
    if rows == 0:
        return 0.0
    return float((out[:rows].double() - expected).norm() / expected.norm())

"""How the operands of a grouped GEMM are stored: the number formats, their scales, and back to fp32 in plain torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
PACKED_FP4 = (torch.uint8, torch.float4_e2m1fn_x2)  # two e2m1 numbers a byte, the earlier one in the low four bits
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the eight magnitudes of e2m1, by their three bits; bit 3 is the sign


class Format(enum.Enum):
    """What the numbers of a weight are, and the block of them that shares one scale.

    Attributes:
        PLAIN: bf16, fp16 or fp32 on both sides, no scales.
        FP8_ROWWISE: e4m3 on both sides, one fp32 scale a row of x and a row of each expert.
        FP8_BLOCK: e4m3 on both sides, DeepSeek-V3's fp32 scales.
        NVFP4: weights e2m1 with an e4m3 scale for 16 numbers and an fp32 scale an expert; x as it is.
        MXFP4: weights e2m1 with an e8m0 scale for 32 numbers (OCP Microscaling 1.0); x as it is.
    """

    PLAIN = "plain"
    FP8_ROWWISE = "fp8 row-wise"
    FP8_BLOCK = "fp8 1x128/128x128"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"

    @property
    def packed(self) -> bool:
        """Whether two numbers share a byte."""
        return self in (Format.NVFP4, Format.MXFP4)


@dataclass(frozen=True)
class Scales:
    """The scales of one grouped GEMM. A number is its stored value times its scales.

    Attributes:
        weight: one tensor for each weight tensor (or the one tensor itself). fp32 ``[E_i, N]``: row-wise fp8. fp32
            ``[E_i, ceil(N / 128), ceil(K / 128)]``: blocks of 128 x 128 fp8. e4m3 ``[E_i, N, K / 16]``: NVFP4.
            e8m0 (or uint8 that holds it) ``[E_i, N, K / 32]``: MXFP4.
        x: fp32 scales of fp8 activations: ``[T]`` row-wise, ``[T, ceil(K / 128)]`` for blocks of 1 x 128;
            None for FP4 weights.
        weight_global: NVFP4 only: fp32 ``[E_i]`` for each weight tensor (or the one tensor itself).
    """

    weight: Tensor | Sequence[Tensor]
    x: Tensor | None = None
    weight_global: Tensor | Sequence[Tensor] | None = None


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Packed FP4 ``[..., K / 2]`` to fp32 ``[..., K]``."""
    data = packed.view(torch.uint8)
    codes = torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)
    magnitudes = torch.tensor(_E2M1, dtype=torch.float32, device=data.device)
    return torch.where(codes >= 8, -1.0, 1.0) * magnitudes[(codes & 7).int()]


def dequantize_weight(weight: Tensor, form: Format, scale: Tensor | None, global_scale: Tensor | None = None) -> Tensor:
    """The fp32 numbers of stored experts.

    Args:
        weight: ``[..., N, K]``, or ``[..., N, K / 2]`` where ``form.packed``; scales as in `Scales`.

    Returns:
        fp32 ``[..., N, K]``, newly allocated.
    """
    if form is Format.PLAIN or scale is None:
        return weight.float()
    if form is Format.FP8_ROWWISE:
        return weight.float() * scale.unsqueeze(-1)
    if form is Format.FP8_BLOCK:
        values = weight.float()
        rows = scale.repeat_interleave(128, dim=-2)[..., : values.shape[-2], :]
        return values * rows.repeat_interleave(128, dim=-1)[..., : values.shape[-1]]
    values = unpack_e2m1(weight)
    if form is Format.MXFP4:
        return values * scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=-1)
    values *= scale.float().repeat_interleave(16, dim=-1)
    return values if global_scale is None else values * global_scale[..., None, None]


def dequantize_x(x: Tensor, form: Format, scale: Tensor | None) -> Tensor:
    """The fp32 numbers of stored activations ``[T, K]``, newly allocated."""
    if scale is None:
        return x.float()
    if form is Format.FP8_ROWWISE:
        return x.float() * scale[:, None]
    return x.float() * scale.repeat_interleave(128, dim=-1)[:, : x.shape[1]]

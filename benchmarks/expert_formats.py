"""Experts of a MoE layer in bf16, FP8 with scales of blocks, and MXFP4: random weights, and their products."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vmm_dwdp import WeightSpec
from vmm_dwdp.kernels import chosen_gemm

FORMATS = ("bf16", "fp8", "mxfp4")
BLOCK = (1 << 22) + 4099  # random numbers, repeated: of which no expert's are a multiple, so that all experts differ
RMS_E2M1 = 2.93  # of the numbers of e2m1, where all are as frequent

Sizes = Mapping[str, tuple[int, int]]  # of each weight N and K


def specs(weights: str, experts: int, sizes: Sizes) -> dict[str, WeightSpec]:
    """The weights of a layer, and their scales."""
    found = {}
    for name, (n, k) in sizes.items():
        if weights == "bf16":
            found[name] = WeightSpec((experts, n, k), torch.bfloat16)
        elif weights == "fp8":
            found[name] = WeightSpec((experts, n, k), torch.float8_e4m3fn)
            found[f"{name}_scale"] = WeightSpec((experts, -(-n // 128), -(-k // 128)), torch.float32)
        else:
            found[name] = WeightSpec((experts, n, k // 2), torch.uint8)
            found[f"{name}_scale"] = WeightSpec((experts, n, k // 32), torch.uint8)
    return found


def product(x: Tensor, weights: Mapping[str, Tensor], name: str, rows: Tensor) -> Tensor:
    """``[T, top_k, N]``: each token with the experts in ``rows`` ``[T, top_k]`` of one weight."""
    return chosen_gemm(x, weights[name], rows, weights.get(f"{name}_scale"))


def through(x: Tensor, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """``[T, top_k, hidden]``: each token through each of the experts in ``rows``."""
    gate, up = product(x, weights, "w13", rows).chunk(2, -1)
    return product((F.silu(gate) * up).contiguous(), weights, "w2", rows)


def fill(shards: Mapping[str, Tensor], weights: str, sizes: Sizes, generator: torch.Generator) -> None:
    """Random numbers for experts of a layer, by weight ``[experts, ...]``: products are about as large as x."""
    for name, (_, k) in sizes.items():
        _repeat(shards[name], _random(weights, k, generator))
        if weights != "bf16":
            scales = shards[f"{name}_scale"]
            _repeat(scales, _random_scales(scales.dtype, k, generator))


def _random(weights: str, k: int, generator: torch.Generator) -> Tensor:
    if weights == "mxfp4":
        return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, device=generator.device, generator=generator)
    numbers = torch.randn(BLOCK, device=generator.device, generator=generator)
    return numbers.mul_(k**-0.5).bfloat16() if weights == "bf16" else numbers.to(torch.float8_e4m3fn)


def _random_scales(dtype: torch.dtype, k: int, generator: torch.Generator) -> Tensor:
    if dtype == torch.uint8:  # powers of two
        least = 127 + math.floor(math.log2(k**-0.5 / RMS_E2M1))
        return torch.randint(least, least + 2, (BLOCK,), dtype=dtype, device=generator.device, generator=generator)
    return torch.rand(BLOCK, device=generator.device, generator=generator).add_(0.5).mul_(k**-0.5)


def _repeat(shard: Tensor, block: Tensor) -> None:
    for part in shard.view(-1).split(len(block)):
        part.copy_(block[: len(part)])

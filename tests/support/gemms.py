"""Grouped GEMMs over one contiguous tensor of weights that a model runner may have, for tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from vmm_dwdp.kernels import contiguous, grouped_gemm, tensor_list_grouped_gemm

Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def our_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return tensor_list_grouped_gemm(x, [weight], ends, provider="triton")


def flashinfer_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return grouped_gemm(x, weight, ends, provider="flashinfer")


FLASHINFER = next(provider for provider in contiguous.PROVIDERS if provider.name == "flashinfer")
GEMMS = pytest.mark.parametrize(
    "gemm",
    [
        torch_gemm,
        our_gemm,
        pytest.param(flashinfer_gemm, marks=pytest.mark.skipif(bool(FLASHINFER.missing()), reason="no FlashInfer")),
    ],
)

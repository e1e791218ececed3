"""Our Triton kernel as a provider; the kernel itself is imported when it is first needed."""

from __future__ import annotations

import torch
from torch import Tensor

from vmm_dwdp.kernels.formats import FP8, Format
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, not_installed


def _missing() -> str | None:
    if (absent := not_installed("triton", "triton")) is not None:
        return absent
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs an NVIDIA GPU, and torch sees none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU from sm_80 on"
    return None


def _refuses(problem: Problem) -> str | None:
    x = problem.x
    if not x.is_cuda:
        return f"takes tensors on a GPU, and x is on {x.device}"
    if x.dtype == FP8 and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "takes fp8 on GPUs from sm_89 on"
    if problem.form is Format.MXFP4 and x.dtype != torch.bfloat16:
        return f"takes MXFP4 weights with torch.bfloat16 activations, not {x.dtype}: its scales exceed fp16's range"
    return None


def _run(problem: Problem) -> Tensor:
    from vmm_dwdp.kernels.triton.grouped_gemm import run

    with torch.cuda.device(problem.x.device):
        return run(problem)


TRITON = Provider(
    "triton",
    "sm_80 and up: bf16, fp16, fp32, FP4 weights with bf16 activations (NVFP4 with fp16 too); fp8 from sm_89 on",
    _missing,
    _refuses,
    _run,
    imports="vmm_dwdp.kernels.triton.grouped_gemm",
)

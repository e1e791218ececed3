"""The TensorList grouped GEMM: one call, weights in a list of contiguous tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor

from vmm_dwdp.kernels.cute.launch import CUTE
from vmm_dwdp.kernels.formats import Format, Scales, dequantize_weight, dequantize_x
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, Providers, is_capturing
from vmm_dwdp.kernels.triton.launch import TRITON


def tensor_list_grouped_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    *,
    scales: Scales | None = None,
    provider: str = "auto",
) -> Tensor:
    """``out[t] = x[t] @ weight[e].T`` where the experts are spread over a list of tensors, in expert order.

    Args:
        x: ``[T, K]``, contiguous, rows sorted by expert.
        weights: 1 to 16 tensors ``[E_i, N, K]`` (``[E_i, N, K / 2]`` for packed FP4) of one dtype on ``x``'s device;
            each expert contiguous, the stride between experts free.
        offsets: int32 ``[E]``, ``E`` the sum of all ``E_i``: where each expert's rows end. Checked on the CPU; on a GPU
            only with ``VMM_DWDP_CHECK_OFFSETS=1`` in the environment, which synchronises.
        scales: of quantised operands, one tensor for each weight; see `Scales`.
        provider: ``"cute"`` (Hopper; on Blackwell, where it has never been run, only by this name), ``"triton"``
            (sm_80 and up, FP4 weights), ``"torch"`` (anywhere; on a GPU it synchronises), or ``"auto"``: the first that
            takes the problem, which is logged.

    Returns:
        ``[T, N]``, newly allocated: bf16 for fp8 operands, otherwise in ``x``'s dtype. Rows from ``offsets[-1]`` on are
        unspecified.

    Raises:
        ConfigError: an argument that cannot be, or one the provider does not take; nothing was launched.
    """
    return PROVIDERS.multiply(x, weights, offsets, scales, provider)


def _torch_refuses_now(problem: Problem) -> str | None:
    if is_capturing(problem.x.device):
        return "reads the offsets on the host, which a CUDA graph capture forbids"
    return None


def _run_torch(problem: Problem) -> Tensor:
    """torch's grouped GEMM on each list entry; quantised weights are dequantised to fp32, an expert at a time."""
    ends = [0, *problem.offsets.tolist()]
    out = problem.x.new_empty((problem.x.shape[0], problem.n), dtype=problem.out_dtype)
    firsts = [0, *accumulate(weight.shape[0] for weight in problem.weights)]
    for i, weight in enumerate(problem.weights):
        first, last = firsts[i], firsts[i + 1]
        if problem.form is Format.PLAIN:
            start, end = ends[first], ends[last]
            local_offsets = problem.offsets[first:last] - start
            out[start:end] = F.grouped_mm(problem.x[start:end], weight.transpose(1, 2), offs=local_offsets)
            continue
        for expert in range(first, last):
            rows, local = slice(ends[expert], ends[expert + 1]), expert - first
            if rows.start == rows.stop:
                continue
            x_scale = None if problem.x_scale is None else problem.x_scale[rows]
            global_scale = problem.global_scales[i][local] if problem.global_scales else None
            dense = dequantize_weight(weight[local], problem.form, problem.weight_scales[i][local], global_scale)
            out[rows] = dequantize_x(problem.x[rows], problem.form, x_scale) @ dense.T
    return out


PROVIDERS = Providers(
    (
        CUTE,
        TRITON,
        Provider(
            "torch",
            "CPU and CUDA: every format, slowly where there are scales; it reads the offsets on the host",
            lambda: None,
            lambda problem: None,
            _run_torch,
            refuses_now=_torch_refuses_now,
        ),
    )
)
"""In the order ``"auto"`` tries them."""

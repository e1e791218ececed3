"""Grouped GEMMs that exist elsewhere, on one ``[E, N, K]`` weight: called as they are, our arguments made theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmm_dwdp.kernels.formats import FP8, Format, Scales
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, Providers, import_failure, not_installed


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, scales: Scales | None = None, provider: str = "auto"
) -> Tensor:
    """``out[t] = x[t] @ weight[e].T`` for the expert ``e`` that row ``t`` belongs to.

    Args:
        x: ``[T, K]``, contiguous, rows sorted by expert.
        weight: ``[E, N, K]``, each expert contiguous.
        offsets: int32 ``[E]``: where each expert's rows end. Checked as in
            `tensor_list_grouped_gemm`.
        scales: of quantised operands; see `Scales`.
        provider: ``"torch"`` (``F.grouped_mm``), ``"torch-rowwise"`` (``F.scaled_grouped_mm``, fp8), ``"flashinfer"``
            (``SegmentGEMMWrapper``; builds itself with nvcc at its first call), ``"deep-gemm"`` (fp8 with block scales;
            it wants each expert's rows to start at a multiple of 128, so they are copied apart and back), or
            ``"auto"``: the first that takes the problem, which is logged.

    Returns:
        ``[T, N]``, newly allocated: bf16 for fp8 operands, otherwise in ``x``'s dtype. Rows from ``offsets[-1]`` on are
        unspecified.

    Raises:
        ConfigError: an argument that cannot be, or one the provider does not take; nothing was launched.
    """
    return PROVIDERS.multiply(x, (weight,), offsets, scales, provider)


def _needs_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and torch sees none"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"needs a Hopper GPU (sm_90), not sm_{capability[0]}{capability[1]}"


def _flashinfer_missing() -> str | None:
    return not_installed("flashinfer", "flashinfer-python") or _needs_hopper()


def _deep_gemm_missing() -> str | None:
    missing = not_installed("deep_gemm", "sgl-deep-gemm") or _needs_hopper()
    if missing is None and (failure := import_failure("deep_gemm")):  # often: each is built for one version of torch
        missing = f"has the package sgl-deep-gemm, which {failure}"
    return missing


def _on_gpu(problem: Problem) -> str | None:
    if not problem.x.is_cuda:
        return f"takes tensors on a GPU, and x is on {problem.x.device}"
    return None if problem.weights[0].is_contiguous() else "takes weights without gaps between experts"


def _torch_refuses(problem: Problem) -> str | None:
    return None if problem.form is Format.PLAIN else f"takes operands without scales, not {problem.form.value}"


def _run_torch(problem: Problem) -> Tensor:
    return F.grouped_mm(problem.x, problem.weights[0].transpose(1, 2), offs=problem.offsets)


def _rowwise_refuses(problem: Problem) -> str | None:
    if problem.form is not Format.FP8_ROWWISE:
        return f"takes fp8 with row-wise scales, not {problem.form.value}"
    if problem.n % 16:
        return f"takes N that is a multiple of 16, not {problem.n}"
    return _on_gpu(problem)


def _run_rowwise(problem: Problem) -> Tensor:
    from torch.nn.functional import ScalingType

    assert problem.x_scale is not None
    multiply: Callable[..., Tensor] = F.scaled_grouped_mm  # type: ignore[attr-defined]
    return multiply(
        problem.x,
        problem.weights[0].transpose(1, 2),
        problem.x_scale,
        ScalingType.RowWise,
        problem.weight_scales[0],
        ScalingType.RowWise,
        offs=problem.offsets,
        output_dtype=torch.bfloat16,
    )


def _flashinfer_refuses(problem: Problem) -> str | None:
    if problem.form is not Format.PLAIN or problem.x.dtype == torch.float32:
        return f"takes bf16 and fp16 without scales, not {problem.form.value} of {problem.x.dtype}"
    if problem.n % 8:
        return f"takes N that is a multiple of 8, not {problem.n}"
    return _on_gpu(problem)


def _run_flashinfer(problem: Problem) -> Tensor:
    from flashinfer import SegmentGEMMWrapper

    x, weight = problem.x, problem.weights[0]
    workspace = torch.empty(32 << 20, dtype=torch.int8, device=x.device)
    starts = F.pad(problem.offsets.long(), (1, 0))
    out = x.new_empty((x.shape[0], problem.n))
    wrapper = SegmentGEMMWrapper(workspace, backend="sm90")
    result: Tensor = wrapper.run(x, weight, problem.num_experts, True, out=out, seg_indptr=starts)
    return result


def _deep_gemm_refuses(problem: Problem) -> str | None:
    if problem.form is not Format.FP8_BLOCK:
        return f"takes fp8 with 1x128/128x128 scales, not {problem.form.value}"
    if problem.n % 128 or problem.k % 128:
        return f"takes N and K that are multiples of 128, not {problem.n} and {problem.k}"
    return _on_gpu(problem)


class SpreadRows(NamedTuple):
    """Rows of fp8 activations with every expert's first at a multiple of ``align``; the rows between are zero."""

    x: Tensor  # fp8 [capacity, K]
    scale: Tensor  # fp32 [capacity, ceil(K / 128)]
    experts: Tensor  # int32 [capacity]: whose row it is; -1 behind the last
    places: Tensor  # int64 [T]: where each row of the problem went


def spread_rows(problem: Problem, align: int) -> SpreadRows:
    """Copy the rows of ``problem`` apart, without reading the offsets on the host."""
    assert problem.x_scale is not None
    x, num_rows, num_experts = problem.x, problem.x.shape[0], problem.num_experts
    ends = problem.offsets
    starts = F.pad(ends, (1, 0))[:-1]
    padded = (ends - starts + align - 1) // align * align
    padded_ends = padded.cumsum(0, dtype=torch.int32)
    # One spare block at the end takes the rows of no expert.
    capacity = (num_rows + min(num_experts, num_rows) * (align - 1)) // align * align + align
    row = torch.arange(num_rows, device=x.device, dtype=torch.int32)
    expert = torch.searchsorted(ends, row, right=True)
    owner = expert.clamp(max=num_experts - 1)
    place = torch.where(expert < num_experts, row - starts[owner] + (padded_ends - padded)[owner], capacity - 1)
    x_apart = torch.zeros((capacity, problem.k), dtype=torch.uint8, device=x.device)
    x_apart[place] = x.view(torch.uint8)
    scale_apart = torch.zeros((capacity, problem.x_scale.shape[1]), device=x.device)
    scale_apart[place] = problem.x_scale
    slot = torch.arange(capacity, device=x.device, dtype=torch.int32)
    layout = torch.searchsorted(padded_ends, slot, right=True, out_int32=True)
    experts = torch.where(layout < num_experts, layout, -1)
    return SpreadRows(x_apart.view(FP8), scale_apart, experts, place.long())


def _run_deep_gemm(problem: Problem) -> Tensor:
    import deep_gemm

    rows = spread_rows(problem, deep_gemm.get_mk_alignment_for_contiguous_layout())
    out = rows.x.new_empty((rows.x.shape[0], problem.n), dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (rows.x, rows.scale), (problem.weights[0], problem.weight_scales[0]), out, rows.experts
    )
    return out[rows.places]


PROVIDERS = Providers(
    (
        Provider(
            "torch",
            "CPU and CUDA: bf16, fp16, fp32; rows of a multiple of 16 bytes",
            lambda: None,
            _torch_refuses,
            _run_torch,
        ),
        Provider(
            "deep-gemm",
            "sm_90: fp8 with 1x128/128x128 scales, N and K multiples of 128",
            _deep_gemm_missing,
            _deep_gemm_refuses,
            _run_deep_gemm,
        ),
        Provider(
            "torch-rowwise",
            "sm_90: fp8 with a scale for each row, N and K multiples of 16",
            _needs_hopper,
            _rowwise_refuses,
            _run_rowwise,
        ),
        Provider(
            "flashinfer",
            "sm_90: bf16 and fp16, N and K multiples of 8",
            _flashinfer_missing,
            _flashinfer_refuses,
            _run_flashinfer,
            imports="flashinfer",
        ),
    )
)
"""In the order ``"auto"`` tries them."""

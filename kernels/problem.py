"""One grouped GEMM to be done: its arguments, checked once, so that a kernel can rely on them.

[Note: Grouped GEMM]
    The rows of ``x`` ``[T, K]`` are sorted by expert. ``offsets`` (int32 ``[E]``) holds where each expert's rows end,
    so expert ``e`` has rows ``offsets[e - 1] .. offsets[e] - 1`` and may have none.
    ``out[t] = x[t] @ weight[e].T`` with ``weight`` ``[E, N, K]``, accumulated in fp32. Rows from ``offsets[-1]`` on
    belong to no expert; they hold unspecified values in ``out``. This is what ``torch.nn.functional.grouped_mm``
    takes, with the weight transposed.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.formats import FP8, PACKED_FP4, Format, Scales

MAX_ENTRIES = 16
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes: what TMA, cp.async and torch's grouped GEMM want of rows and addresses
CHECK_OFFSETS = "VMM_DWDP_CHECK_OFFSETS"  # set to 1: offsets on a GPU are read back and checked, which synchronises


class Problem(NamedTuple):
    """Checked arguments (see [Note: Grouped GEMM]); the tensors are the caller's."""

    x: Tensor  # [T, K]
    weights: tuple[Tensor, ...]  # each [E_i, N, K], or [E_i, N, K / 2] where the format is packed
    offsets: Tensor  # int32 [E]
    form: Format
    weight_scales: tuple[Tensor, ...]  # one for each weight, or none
    global_scales: tuple[Tensor, ...]  # one for each weight, or none
    x_scale: Tensor | None

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0]

    @property
    def n(self) -> int:
        return self.weights[0].shape[1]

    @property
    def k(self) -> int:
        return self.x.shape[1]

    @property
    def out_dtype(self) -> torch.dtype:
        """fp8 operands give bf16, the rest what ``x`` has."""
        return torch.bfloat16 if self.x.dtype == FP8 else self.x.dtype

    def __str__(self) -> str:
        return (
            f"{self.form.value} {self.x.dtype} x [T, {self.k}] with {len(self.weights)} x {self.weights[0].dtype} "
            f"[{self.num_experts}, {self.n}, {self.k}] on {self.x.device}"
        )


def check(x: Tensor, weights: Sequence[Tensor], offsets: Tensor, scales: Scales | None) -> Problem:
    """The arguments as a :class:`Problem`.

    Raises:
        ConfigError: naming the argument that cannot be and what would be accepted.
    """
    if not 1 <= len(weights) <= MAX_ENTRIES:
        raise ConfigError(f"weights has {len(weights)} tensors; between 1 and {MAX_ENTRIES} are accepted")
    if x.dim() != 2 or not x.is_contiguous():
        raise ConfigError(
            f"x must be a contiguous [T, K] tensor, not one of shape {list(x.shape)} and strides {x.stride()}"
        )
    if x.data_ptr() % ALIGNMENT:
        raise ConfigError(f"x must start at a multiple of {ALIGNMENT} bytes")
    first = weights[0]
    for i, weight in enumerate(weights):
        _check_weight(weight, f"weights[{i}]", first, x)
    form = _recognise(x, first, _unpack(scales)[0])
    k = x.shape[1]
    stored_k = k // 2 if form.packed else k
    if first.shape[2] != stored_k or (form.packed and k % 2):
        raise ConfigError(
            f"weights have rows of {first.shape[2]} and x has K = {k}: a row must hold {stored_k} for {form.value}"
        )
    for name, tensor in (("x", x), ("weights", first)):
        if tensor.shape[-1] * tensor.element_size() % ALIGNMENT:
            step = ALIGNMENT // tensor.element_size() * (2 if form.packed and tensor is first else 1)
            raise ConfigError(
                f"K = {k} of {name} ({tensor.dtype}) must be a multiple of {step}: rows start every {ALIGNMENT} bytes"
            )
    num_experts = sum(weight.shape[0] for weight in weights)
    if (
        offsets.dtype != torch.int32
        or offsets.shape != (num_experts,)
        or offsets.device != x.device
        or not offsets.is_contiguous()
    ):
        raise ConfigError(
            f"offsets must be a contiguous int32 tensor [{num_experts}] on {x.device}, the end of each expert's rows, "
            f"not {offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        )
    problem = accepted(x, weights, offsets, scales, form)
    if scales:
        _check_scales(problem)
    return problem


def accepted(x: Tensor, weights: Sequence[Tensor], offsets: Tensor, scales: Scales | None, form: Format) -> Problem:
    """The arguments as a :class:`Problem` of ``form``, if arguments of the same `signature` have passed `check`.

    Only what the offsets hold is looked at, where `check` looks at it too.

    Raises:
        ConfigError: the offsets decrease, or end past the rows.
    """
    if offsets.is_cpu or os.environ.get(CHECK_OFFSETS) == "1":
        _check_offsets(offsets, x.shape[0])
    return Problem(x, tuple(weights), offsets, form, *_unpack(scales))


def signature(x: Tensor, weights: Sequence[Tensor], offsets: Tensor, scales: Scales | None) -> Hashable:
    """All that decides whether `check` accepts the arguments and which format they have, but for what offsets hold.

    It has no tensors in it, and not ``T``: of that it says only whether the scales of ``x`` have as many rows.
    """
    weight_scales, global_scales, x_scale = _unpack(scales)
    return (
        (x.dtype, x.shape[1:], x.device, x.is_contiguous(), x.data_ptr() % ALIGNMENT),
        (offsets.dtype, offsets.shape, offsets.device, offsets.is_contiguous()),
        tuple([(w.dtype, w.shape, w.stride(), w.device, w.data_ptr() % ALIGNMENT) for w in weights]),
        scales is None,
        tuple([(s.dtype, s.shape, s.device, s.is_contiguous()) for s in weight_scales]),
        tuple([(s.dtype, s.shape, s.device, s.is_contiguous()) for s in global_scales]),
        None
        if x_scale is None
        else (
            x_scale.shape[:1] == x.shape[:1],
            x_scale.shape[1:],
            x_scale.dtype,
            x_scale.device,
            x_scale.is_contiguous(),
        ),
    )


def _unpack(scales: Scales | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Scales of the weights, global scales and scales of ``x``, as a :class:`Problem` has them."""
    if scales is None:
        return (), (), None
    global_scales = () if scales.weight_global is None else _as_tuple(scales.weight_global)
    return _as_tuple(scales.weight), global_scales, scales.x


def _as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _check_weight(weight: Tensor, name: str, first: Tensor, x: Tensor) -> None:
    if weight.dim() != 3 or weight.shape[0] == 0:
        raise ConfigError(f"{name} must be [E, N, K] with at least one expert, not {list(weight.shape)}")
    if weight.shape[1:] != first.shape[1:] or weight.dtype != first.dtype:
        raise ConfigError(
            f"{name} is {weight.dtype} {list(weight.shape)}, and weights[0] is {first.dtype} {list(first.shape)}: "
            "dtype, N and K must agree"
        )
    if weight.device != x.device:
        raise ConfigError(f"{name} is on {weight.device} and x on {x.device}: both must be on one device")
    if weight.stride(2) != 1 or weight.stride(1) != weight.shape[2]:
        raise ConfigError(f"{name} has strides {weight.stride()}: each expert's [N, K] must be contiguous")
    if weight.data_ptr() % ALIGNMENT or (weight.shape[0] > 1 and weight.stride(0) * weight.element_size() % ALIGNMENT):
        raise ConfigError(f"{name} must start, and every expert in it, at a multiple of {ALIGNMENT} bytes")


def _recognise(x: Tensor, weight: Tensor, weight_scales: tuple[Tensor, ...]) -> Format:
    """Tell the format from the dtypes of the weights and their scales."""
    scale = weight_scales[0] if weight_scales else None
    if weight.dtype in PLAIN_DTYPES and scale is None:
        if x.dtype != weight.dtype:
            raise ConfigError(
                f"x is {x.dtype} and the weights are {weight.dtype}: without scales they must be the same"
            )
        return Format.PLAIN
    if weight.dtype == FP8 and scale is not None and scale.dtype == torch.float32:
        if x.dtype != FP8:
            raise ConfigError(f"x is {x.dtype}: with {FP8} weights it must be {FP8} too")
        return Format.FP8_ROWWISE if scale.dim() == 2 else Format.FP8_BLOCK
    if weight.dtype in PACKED_FP4 and scale is not None and scale.dtype in (FP8, torch.float8_e8m0fnu, torch.uint8):
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"x is {x.dtype}: with FP4 weights it must be torch.bfloat16 or torch.float16")
        return Format.NVFP4 if scale.dtype == FP8 else Format.MXFP4
    plain = ", ".join(map(str, PLAIN_DTYPES))
    raise ConfigError(
        f"weights of {weight.dtype} with {'no scales' if scale is None else f'scales of {scale.dtype}'} are not a "
        f"known format; accepted are {plain} without scales, {FP8} with torch.float32, packed FP4 with {FP8} (NVFP4) "
        "or torch.float8_e8m0fnu (MXFP4)"
    )


def _check_offsets(offsets: Tensor, num_tokens: int) -> None:
    ends = offsets.tolist()
    for expert, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < before:
            raise ConfigError(f"offsets[{expert}] = {end} is less than {before}: ends of rows must not decrease")
    if ends[-1] > num_tokens:
        raise ConfigError(
            f"offsets end at {ends[-1]} and x has {num_tokens} rows: the last end must be no more than that"
        )


def _check_scales(problem: Problem) -> None:
    if len(problem.weight_scales) != len(problem.weights):
        raise ConfigError(
            f"scales.weight has {len(problem.weight_scales)} tensors for {len(problem.weights)} weights: "
            "one each is needed"
        )
    form, n, k = problem.form, problem.n, problem.k
    blocks = (-(-n // 128), -(-k // 128))
    tail = {
        Format.FP8_ROWWISE: (n,),
        Format.FP8_BLOCK: blocks,
        Format.NVFP4: (n, k // 16),
        Format.MXFP4: (n, k // 32),
    }[form]
    dtype = problem.weight_scales[0].dtype
    for i, (weight, scale) in enumerate(zip(problem.weights, problem.weight_scales, strict=True)):
        _check_scale(scale, f"scales.weight[{i}]", dtype, (weight.shape[0], *tail), weight.device)
    if form is Format.NVFP4 and len(problem.global_scales) != len(problem.weights):
        raise ConfigError(
            f"scales.weight_global has {len(problem.global_scales)} tensors for {len(problem.weights)} weights: "
            "NVFP4 needs one fp32 [E_i] for each"
        )
    if form is not Format.NVFP4 and problem.global_scales:
        raise ConfigError(f"scales.weight_global is for NVFP4, and these weights are {form.value}")
    for i, (weight, scale) in enumerate(zip(problem.weights, problem.global_scales, strict=False)):
        _check_scale(scale, f"scales.weight_global[{i}]", torch.float32, (weight.shape[0],), weight.device)
    if form.packed:
        if problem.x_scale is not None:
            raise ConfigError(f"scales.x is for fp8 activations, and x is {problem.x.dtype}")
        return
    if problem.x_scale is None:
        raise ConfigError(f"scales.x is missing: {form.value} has fp32 scales of the activations")
    x_shape = (problem.x.shape[0],) if form is Format.FP8_ROWWISE else (problem.x.shape[0], blocks[1])
    _check_scale(problem.x_scale, "scales.x", torch.float32, x_shape, problem.x.device)


def _check_scale(scale: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if scale.dtype != dtype or tuple(scale.shape) != shape or scale.device != device or not scale.is_contiguous():
        raise ConfigError(
            f"{name} must be a contiguous {dtype} {list(shape)} tensor on {device}, "
            f"not {scale.dtype} {list(scale.shape)} with strides {scale.stride()} on {scale.device}"
        )

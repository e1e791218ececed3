"""The product of few tokens with the experts that each of them chose: what decoding asks for.

[Note: Chosen experts]
    A grouped GEMM wants its rows sorted by expert, and the activations as its weights are stored. For one token that is
    more kernels than the product. Here rows stay where they are: ``out[t, i] = x[t] @ weight[rows[t, i]].T``, with
    ``rows`` as `DWDPRuntime.look_up` tells them. Weights may be quantised, and activations are not. Every byte of a
    weight that somebody chose is read once, however many tokens chose it, so that it crosses a link once.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.formats import FP8, PACKED_FP4, Format, dequantize_weight

MOST_PAIRS: Final = 1024  # of tokens and experts, among which every program looks for those of its expert
ALIGNMENT: Final = 16  # bytes, of rows and addresses


def chosen_gemm(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """The product of each token with each expert that it chose; see [Note: Chosen experts].

    Work for the current stream, by our kernel in Triton on a GPU, which may be captured; the host waits for nothing. On
    the CPU in torch's own words.

    Args:
        x: bf16 or fp16, ``[T, K]``, or ``[T, top_k, K]``: of each expert its own.
        weight: ``[R, N, K]`` of the dtype of ``x`` or e4m3, or packed FP4 ``[R, N, K / 2]``. A row has a multiple of 16
            bytes; an expert's ``[N, K]`` is contiguous.
        rows: int32 or int64 ``[T, top_k]``, where the experts are in ``weight``; up to 1,024 in all.
        scale: of e4m3 fp32 ``[R, ceil(N / 128), ceil(K / 128)]``, of FP4 e8m0 (or uint8 that holds it) ``[R, N, K /
            32]``.

    Returns:
        ``[T, top_k, N]`` of the dtype of ``x``, newly allocated, of sums in fp32; zeros where ``rows`` names no row.

    Raises:
        ConfigError: naming the argument that cannot be, or the GPU lacks Triton.
    """
    form = _check(x, weight, rows, scale)
    if x.is_cpu:
        return _multiply_on_cpu(x, weight, rows, scale, form)
    try:
        from vmm_dwdp.kernels.triton.chosen import run
    except ImportError as error:
        raise ConfigError(f"chosen_gemm needs Triton on a GPU: {error}") from error
    with torch.cuda.device(x.device):
        return run(x, weight, rows, scale, form)


def _multiply_on_cpu(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor | None, form: Format) -> Tensor:
    out = x.new_zeros((*rows.shape, weight.shape[1]))
    tokens = x if x.dim() == 3 else x[:, None].expand(-1, rows.shape[1], -1)
    for row in set(rows.flatten().tolist()):
        if 0 <= row < len(weight):
            here = rows == row
            expert = dequantize_weight(weight[row], form, None if scale is None else scale[row])
            out[here] = (tokens[here].float() @ expert.T).to(x.dtype)
    return out


def _check(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor | None) -> Format:
    """The format, if the arguments can be."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.dim() not in (2, 3) or not x.is_contiguous():
        raise ConfigError(
            f"x must be contiguous bf16 or fp16, [T, K] or [T, top_k, K], not {x.dtype} {list(x.shape)} with strides "
            f"{x.stride()}"
        )
    if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 2 or not rows.is_contiguous():
        raise ConfigError(f"rows must be contiguous int32 or int64 [T, top_k], not {rows.dtype} {list(rows.shape)}")
    if x.shape[:-1] not in (rows.shape, rows.shape[:1]):
        raise ConfigError(f"x is {list(x.shape)} and rows {list(rows.shape)}: they must be of the same tokens")
    if rows.numel() > MOST_PAIRS:
        raise ConfigError(f"rows names {rows.numel()} experts, and at most {MOST_PAIRS} are looked for")
    form = _form_of(x, weight)
    k = x.shape[-1]
    stored_k = k // 2 if form.packed else k
    if weight.dim() != 3 or weight.shape[2] != stored_k or not len(weight):
        raise ConfigError(f"weight must be [R, N, {stored_k}] for K = {k}, not {list(weight.shape)}")
    if stored_k * weight.element_size() % ALIGNMENT or weight.stride()[1:] != (stored_k, 1):
        raise ConfigError(
            f"weight must have contiguous rows of a multiple of {ALIGNMENT} bytes, not {stored_k} of {weight.dtype} "
            f"with strides {weight.stride()}"
        )
    if (weight.data_ptr() | weight.stride(0) * weight.element_size() | x.data_ptr()) % ALIGNMENT:
        raise ConfigError(f"x and every expert of weight must start at a multiple of {ALIGNMENT} bytes")
    _check_scale(weight, scale, form, k)
    for name, tensor in (("weight", weight), ("rows", rows), ("scale", scale)):
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(f"{name} is on {tensor.device} and x on {x.device}: both must be on one device")
    return form


def _form_of(x: Tensor, weight: Tensor) -> Format:
    if weight.dtype == x.dtype:
        return Format.PLAIN
    if weight.dtype == FP8:
        return Format.FP8_BLOCK
    if weight.dtype in PACKED_FP4:
        return Format.MXFP4
    raise ConfigError(f"weight is {weight.dtype}: with x of {x.dtype} it must be that, {FP8}, or packed FP4")


def _check_scale(weight: Tensor, scale: Tensor | None, form: Format, k: int) -> None:
    experts, n, _ = weight.shape
    shape, dtypes = {
        Format.PLAIN: (None, ()),
        Format.FP8_BLOCK: ((experts, -(-n // 128), -(-k // 128)), (torch.float32,)),
        Format.MXFP4: ((experts, n, k // 32), (torch.float8_e8m0fnu, torch.uint8)),
    }[form]
    if shape is None and scale is None:
        return
    if shape is None or scale is None or scale.shape != shape or scale.dtype not in dtypes or not scale.is_contiguous():
        wanted = "None" if shape is None else f"contiguous {dtypes[0]} {list(shape)}"
        given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)} with strides {scale.stride()}"
        raise ConfigError(f"scale must be {wanted} for {form.value} weights, not {given}")

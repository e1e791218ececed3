"""Having compiled and loaded, before there are requests, what grouped GEMMs will need."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.kernels import contiguous, tensor_list
from vmm_dwdp.kernels.formats import FP8, PACKED_FP4, Scales
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.provider import choose, is_capturing

logger = logging.getLogger("vmm_dwdp.kernels")


def warm_up(
    weights: Tensor | Sequence[Tensor],
    num_rows: Iterable[int],
    *,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
    provider: str = "auto",
) -> str:
    """Have the provider of a grouped GEMM compile and load what calls with these weights will need.

    The grouped GEMM is run once for each number of rows, and no row belongs to an expert: weights and scales need not
    hold anything yet, and our kernels do not read them. What is compiled depends on their dtypes, shapes, strides and
    alignment: call this once for each kind of weights, with those that serving will pass or some like them.

    Args:
        weights: ``[E, N, K]`` for `grouped_gemm`, or a list for `tensor_list_grouped_gemm`; as these take them.
        num_rows: ``T`` of the calls to come, each at least 1; a range is fine. Our CuTe kernel has one form for all of
            them, our Triton kernel one for each pair of widths of its tiles (see [Note: Two widths]); DeepGEMM chooses
            a kernel by ``T``.
        scales: of quantised weights; ``scales.x`` is not looked at.
        dtype: of ``x``, where the weights do not say it: bf16 for FP4 weights unless given.
        provider: as in the two functions.

    Returns:
        What was warmed up, by its name in `providers`, for example ``"tensor_list_grouped_gemm.triton"``. It is logged.
        The current stream of the weights' device has been waited for, and what was allocated is given back
        to torch.

    Raises:
        ConfigError: as in the two functions; or ``num_rows`` has none, or one below 1.
        StateError: the current stream is being captured.
    """
    numbers = sorted(set(num_rows), reverse=True)  # the most rows first: torch's allocator reuses their memory
    if not numbers or numbers[-1] < 1:
        raise ConfigError(f"num_rows = {numbers} must be numbers of rows of at least 1, and one at least")
    tensors = (weights,) if isinstance(weights, Tensor) else tuple(weights)
    if not tensors or any(tensor.dim() != 3 for tensor in tensors):
        raise ConfigError(f"weights must be [E, N, K], one or a list, not of {[list(t.shape) for t in tensors]}")
    function, providers = (
        (contiguous.grouped_gemm, contiguous.PROVIDERS)
        if isinstance(weights, Tensor)
        else (tensor_list.tensor_list_grouped_gemm, tensor_list.PROVIDERS)
    )
    device = tensors[0].device
    if is_capturing(device):
        raise StateError("warm_up launches what a CUDA graph should not have: call it before the capture")
    x, offsets = _activations(tensors, numbers[0], dtype)
    problem = check(x, tensors, offsets, _with_scales_of(x, scales))
    name = f"{function.__name__}.{choose(problem, providers, provider).name}"
    for count in numbers:
        rows = x[:count]
        providers.multiply(rows, tensors, offsets, _with_scales_of(rows, scales), provider)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    logger.info("%s is warm for %s, numbers of rows from %d to %d", name, problem, numbers[-1], numbers[0])
    return name


def _activations(weights: Sequence[Tensor], num_rows: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Rows ``[T, K]`` for the weights, and offsets that give them to no expert."""
    first = weights[0]
    packed = first.dtype in PACKED_FP4
    kind = dtype or (torch.bfloat16 if packed else first.dtype)
    x = torch.empty((num_rows, first.shape[2] * (2 if packed else 1)), dtype=kind, device=first.device)
    offsets = torch.zeros(sum(weight.shape[0] for weight in weights), dtype=torch.int32, device=first.device)
    return x, offsets


def _with_scales_of(x: Tensor, scales: Scales | None) -> Scales | None:
    """``scales`` with those of ``x`` that the weights' scales want."""
    if scales is None:
        return None
    of_first = scales.weight if isinstance(scales.weight, Tensor) else next(iter(scales.weight), None)
    x_scale = None
    if x.dtype == FP8 and of_first is not None:
        x_scale = torch.ones((x.shape[0], *of_first.shape[2:]), device=x.device)
    return dataclasses.replace(scales, x=x_scale)

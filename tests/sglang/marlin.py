"""What stands for Marlin's kernels on a machine without a GPU: slow, and as particular about the order of blocks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from support.sorted_blocks import align
from torch import Tensor


def before_plugins() -> None:
    """Let `fused_marlin_moe` be no operator of CUDA, and tokens be sorted by torch: what plugins wrap then is this."""
    if torch.cuda.is_available():
        return
    from sglang.kernels.ops.moe import moe_align_single_token as of_one_token
    from sglang.srt.layers.moe import fused_moe_triton
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
    from sglang.srt.utils import custom_op

    with patch.object(custom_op, "register_custom_op", lambda **_: lambda function: function):
        importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe")
    fused_moe.moe_align_block_size = fused_moe_triton.moe_align_block_size = align
    of_one_token.moe_align_single_token = align


@contextmanager
def kernels() -> Iterator[None]:
    """Let SGLang's `fused_marlin_moe` run here."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.quantization import marlin_utils

    with ExitStack() as patches:
        if not torch.cuda.is_available():
            for name in ("moe_wna16_marlin_gemm", "silu_and_mul", "moe_sum_reduce", "get_scalar_type"):
                patches.enter_context(patch.object(fused_marlin_moe, name, globals()[f"_{name}"], create=True))
            patches.enter_context(patch.object(marlin_utils, "marlin_make_workspace", lambda *_, **__: torch.zeros(1)))
            patches.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        yield


def _moe_wna16_marlin_gemm(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor,
    global_scale: Tensor | None,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    perm: Tensor | None,
    workspace: Tensor,
    tokens: Tensor,
    experts: Tensor,
    count: Tensor,
    topk_weights: Tensor,
    *,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    size_n: int,
    **_: Any,
) -> Tensor:
    """Some product, of all that a kernel reads of an expert."""
    for place in range(int(count[0]) // moe_block_size):

        def of_block(tensor: Tensor, row: int = int(experts[place])) -> Tensor:
            """By address, as a kernel has it: whatever length the tensor says it has."""
            first = tensor.storage_offset() + row * tensor.stride(0)
            return tensor.as_strided(tensor.shape[1:], tensor.stride()[1:], first)

        mine = tokens[place * moe_block_size :][:moe_block_size].long()
        mine = mine[mine < len(x) * top_k]
        read = x[mine // top_k].float()
        if g_idx is not None and g_idx.numel():
            read = read * of_block(g_idx)
        packed = of_block(weight).float() / 2.0**31  # [size_k / 16, 2 * size_n]
        product = (read.unflatten(1, (-1, 16)).sum(dim=2) @ packed).unflatten(1, (2, size_n)).sum(dim=1)
        if zeros is not None and zeros.numel():
            product[:, : zeros.shape[2]] -= of_block(zeros).float().sum(dim=0) / 2.0**31
        product *= of_block(scales).float().sum(dim=0)
        product /= 1 + product.abs()
        product *= 1 + place / 64  # sums differ from place to place, more than a kernel's
        if mul_topk_weights:
            product *= topk_weights.flatten()[mine, None]
        out[mine] = product.to(out.dtype)
    return out


def _silu_and_mul(x: Tensor, out: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _moe_sum_reduce(x: Tensor, out: Tensor, factor: float) -> None:
    out.copy_(x.sum(dim=1) * factor)


def _get_scalar_type(*_: Any) -> None:
    return None

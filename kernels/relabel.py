"""Other names for numbers that a kernel is told, such as those of experts."""

from __future__ import annotations

import torch
from torch import Tensor


def relabel(numbers: Tensor, labels: Tensor) -> Tensor:
    """``labels[number]`` of each number that has a label; any other stays as it is.

    Work for the current stream, one small kernel in Triton on a GPU, which may be captured; the host waits for nothing.

    Args:
        numbers: int32 or int64, of any shape.
        labels: int32 ``[L]``, contiguous, on the same device.

    Returns:
        Of the shape and dtype of ``numbers``, contiguous, newly allocated.
    """
    if numbers.is_cpu:
        known = (numbers >= 0) & (numbers < len(labels))
        return labels[numbers.where(known, 0).long()].to(numbers.dtype).where(known, numbers)
    from vmm_dwdp.kernels.triton.relabel import run

    with torch.cuda.device(numbers.device):
        return run(numbers.contiguous(), labels)

"""A fingerprint of a tensor's bytes, computed where the tensor is."""

from __future__ import annotations

from typing import Final

import torch

_CHUNK: Final = 32 << 20  # bytes at a time, so that the temporary memory is small
_WORD: Final = 8


def checksum(tensor: torch.Tensor) -> int:
    """64 bits that change with any byte of a contiguous ``tensor``, and with the order of its 8-byte words.

    Every word is multiplied by an odd number of its own, and all are added modulo 2**64: for accidents, not forgery.
    """
    data = tensor.reshape(-1).view(torch.uint8)
    total = 0
    for start in range(0, data.numel(), _CHUNK):
        chunk = data[start : start + _CHUNK]
        if chunk.numel() % _WORD or chunk.data_ptr() % _WORD:
            padded = chunk.new_zeros(-(-chunk.numel() // _WORD) * _WORD)
            padded[: chunk.numel()] = chunk
            chunk = padded
        words = chunk.view(torch.int64)
        first = start // _WORD
        factors = torch.arange(2 * first + 1, 2 * (first + words.numel()), 2, device=data.device)
        total += int((words * factors).sum())
    return total % 2**64

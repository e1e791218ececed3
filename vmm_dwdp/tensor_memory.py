"""Memory that hands out tensors, and knows whether one of them is still held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from vmm_dwdp.allocator.handles import PlainMemory, Reservation
from vmm_dwdp.allocator.tensors import StorageWatch, tensor_at

M = TypeVar("M", Reservation, PlainMemory)


class TensorMemory(Generic[M]):
    """A reservation or ordinary memory, and the tensors made over it. Whoever made it closes ``memory``."""

    def __init__(self, memory: M, device: torch.device) -> None:
        self.memory: M = memory
        self._device = device
        self._watches: list[StorageWatch] = []

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor whose first byte is at ``offset``; it owns nothing."""
        tensor = tensor_at(self.memory.address + offset, shape, dtype, self._device)
        # Only those still held matter; `update` and `check_integrity` make new tensors for as long as a runtime lives.
        self._watches = [*filter(StorageWatch.alive, self._watches), StorageWatch(tensor)]
        return tensor

    def in_use(self) -> bool:
        """Whether anybody still holds a tensor, or a view of one, that `tensor` returned."""
        return any(watch.alive() for watch in self._watches)

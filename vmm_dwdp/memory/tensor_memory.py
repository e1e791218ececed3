"""Addresses with memory behind them, and the tensors over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from vmm_dwdp.allocator.driver import Access
from vmm_dwdp.allocator.handles import Allocation, Mapping, PlainMemory, Reservation
from vmm_dwdp.allocator.tensors import StorageWatch, tensor_at

# Memory that hands out tensors, and knows whether one of them is still held.
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


def map_tiles(
    memory: TensorMemory[Reservation], span: range, tiles: Sequence[Allocation], access: Access
) -> list[Mapping]:
    """Map ``tiles`` side by side over the bytes ``span`` of the range."""
    offset = span.start
    mappings = []
    for tile in tiles:
        mappings.append(memory.memory.map(offset, tile))
        offset += tile.nbytes
    allow(memory, span, access)
    return mappings


def allow(memory: TensorMemory[Reservation], span: range, access: Access) -> None:
    if span:
        memory.memory.set_access(span.start, len(span), access)

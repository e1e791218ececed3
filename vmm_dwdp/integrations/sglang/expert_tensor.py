"""One per-expert tensor of a layer: where it hangs, and its bytes with the experts first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vmm_dwdp.errors import ConfigError


def find(layer: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The tensor that a dotted name leads to from ``layer``; ``None`` if there is none."""
    holder: Any = layer
    for part in name.split("."):
        holder = getattr(holder, _existing(holder, part), None)
    return holder.data if isinstance(holder, torch.Tensor) else None


def replace(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` where a dotted name leads to. A parameter stays the same object, with its loader's attributes."""
    *path, last = name.split(".")
    holder: Any = layer
    passed = []
    for part in path:
        holder = getattr(holder, _existing(holder, part))
        passed.append(holder)
    current = getattr(holder, last)
    if isinstance(current, torch.nn.Parameter):
        current.data = tensor
    else:
        setattr(holder, last, tensor)
    for wrapper in passed:  # a tensor of triton_kernels repeats its storage's number of experts
        for shape in (getattr(wrapper, "shape", None), getattr(wrapper, "shape_max", None)):
            if isinstance(shape, list):
                shape[0] = tensor.shape[0]


def _existing(holder: Any, part: str) -> str:
    """Which of the names in ``part``, with bars between them, ``holder`` has."""
    *others, last = part.split("|")
    return next((name for name in others if getattr(holder, name, None) is not None), last)


@dataclass(frozen=True)
class ExpertBlocks:
    """How the experts of a tensor lie in memory: one dense block each, one after the other.

    Attributes:
        shape: of one expert.
        stride: of one expert, in elements; a permutation of the contiguous strides.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> ExpertBlocks:
        """Raises `ConfigError` if the experts of ``tensor`` (dimension 0) are not dense blocks in order."""
        block = cls(tuple(tensor.shape[1:]), tensor.stride()[1:], tensor.dtype)
        expected = 1
        for stride, size in sorted(zip(block.stride, block.shape, strict=True)):
            if size > 1 and stride != expected:
                raise ConfigError(
                    f"{name} has gaps between its elements (strides {tensor.stride()}): it cannot be spread"
                )
            expected *= size
        if tensor.shape[0] > 1 and tensor.stride(0) != expected:
            raise ConfigError(f"the experts of {name} are not one after the other (strides {tensor.stride()})")
        return block

    def to_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[n, nbytes]`` uint8: the same memory as ``tensor``."""
        flat = tensor.as_strided((tensor.shape[0], math.prod(self.shape)), (math.prod(self.shape), 1))
        return flat.view(torch.uint8)

    def from_bytes(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor whose bytes are ``memory``, ``[n, nbytes]`` uint8."""
        elements = memory.view(self.dtype)
        return elements.as_strided((memory.shape[0], *self.shape), (math.prod(self.shape), *self.stride))

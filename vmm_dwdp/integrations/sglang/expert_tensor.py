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
    holder, last = _walk(layer, name)[-1]
    current = getattr(holder, last)
    if isinstance(current, torch.nn.Parameter):
        current.data = tensor
    else:
        setattr(holder, last, tensor)
    note_count(layer, name, tensor)


def note_count(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Write into what a dotted name passes how many experts ``tensor`` has: a tensor of triton_kernels repeats it."""
    for wrapper, _ in _walk(layer, name)[1:]:
        for shape in (getattr(wrapper, "shape", None), getattr(wrapper, "shape_max", None)):
            if isinstance(shape, list):
                shape[0] = tensor.shape[0]


def places(layer: torch.nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    """Where the tensor of a dotted name hangs, under every name that it has there: dictionaries, and keys in them.

    Raises:
        ConfigError: what holds it cannot be given another tensor in its place.
    """
    holder, last = _walk(layer, name)[-1]
    tensor = getattr(holder, last)
    holders = {id(each): each for each in (layer._parameters, layer._buffers, vars(layer), vars(holder))}.values()
    found = [(each, key) for each in holders for key, value in each.items() if value is tensor]
    if not found:
        raise ConfigError(f"{name} is made anew whenever it is asked for, so DWDP cannot give another in its place")
    return found


def _walk(layer: torch.nn.Module, name: str) -> list[tuple[Any, str]]:
    """Every object that a dotted name passes, with the attribute by which it goes on."""
    passed: list[tuple[Any, str]] = []
    holder: Any = layer
    for part in name.split("."):
        if passed:
            holder = getattr(*passed[-1])
        passed.append((holder, _existing(holder, part)))
    return passed


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

    def assembled(self, num_experts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of the tensor of so many experts."""
        return (num_experts, *self.shape), (math.prod(self.shape), *self.stride)

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
        if tensor.shape[0] > 1 and tensor.numel() and tensor.stride(0) != expected:
            raise ConfigError(f"the experts of {name} are not one after the other (strides {tensor.stride()})")
        return block

    def to_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[n, nbytes]`` uint8: the same memory as ``tensor``."""
        flat = tensor.as_strided((tensor.shape[0], math.prod(self.shape)), (math.prod(self.shape), 1))
        return flat.view(torch.uint8)

    def from_bytes(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor whose bytes are ``memory``, ``[n, nbytes]`` uint8."""
        if not self.nbytes:  # nothing cannot be viewed as another dtype
            return memory.new_empty((memory.shape[0], *self.shape), dtype=self.dtype)
        elements = memory.view(self.dtype)
        return elements.as_strided(*self.assembled(memory.shape[0]))

"""Shape and dtype of one weight of an MoE layer, experts first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vmm_dwdp.errors import ConfigError


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a layer as the unsharded model has it.

    Attributes:
        shape: ``(E, ...)``: number of experts, then the shape of one expert's part.
        dtype: any dtype of whole bytes per element; packed ones (``float4_e2m1fn_x2``) count elements as torch does.

    Raises:
        ConfigError: a shape without experts or with an empty expert, or a dtype that is none of torch's.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"a weight's shape must be (experts, ...) with sizes of at least 1, not {self.shape}")
        if not isinstance(self.dtype, torch.dtype):
            raise ConfigError(f"a weight's dtype must be a torch.dtype, not {self.dtype!r}")

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.shape[0]

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert's part."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def of(self, num_experts: int) -> tuple[int, ...]:
        """The shape of a run of ``num_experts`` experts."""
        return (num_experts, *self.shape[1:])

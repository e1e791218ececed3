"""MXFP4 experts where transformers keeps them so: in objects of its kernels, not in parameters.

[Note: Kernel layouts]
    Where a machine can run MXFP4, transformers rearranges a projection's blocks for the GPU at hand and puts them and
    their scales into objects of the kernels' package, which stand in the module where parameters stood. Whatever the
    layout, such an object has one tensor, ``storage.data`` ``[E, ...]``, in which an expert is a dense run of bytes. So
    that is what is spread: bytes ``[E, N]``; and the object shows the assembled ones while the module runs.
    Everything else in it (shape, strides, layout) is of the whole model, and is had by letting transformers convert a
    tensor of all experts that has no bytes. The bytes of an expert are had by letting it convert that expert alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module
from transformers.integrations.mxfp4 import Mxfp4Deserialize, Mxfp4GptOssExperts

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.spread_tensor import SpreadTensor
from vmm_dwdp.layout.weight_spec import WeightSpec

_PROJECTIONS: Final = ("gate_up_proj", "down_proj")
_BLOCK_BYTES: Final = 16  # 32 numbers of 4 bits, which share a scale


class KernelWeight:
    """The blocks or the scales of one projection, in an object of the kernels; see [Note: Kernel layouts].

    Args:
        projection: its name in the module, as in ``gate_up_proj``.
        storage: the kernels' object whose ``data`` is the tensor; its bytes need not be there.

    Attributes:
        projection, storage: as given.
        spec: bytes ``[E, N]``.

    Raises:
        ConfigError: in this layout the bytes of an expert are not together.
    """

    def __init__(self, projection: str, storage: Any) -> None:
        self.projection = projection
        self.storage = storage
        data: Tensor = storage.data
        self._shape, self._stride, self._dtype = tuple(data.shape), data.stride(), data.dtype
        if not _in_memory_order(data).is_contiguous():
            raise ConfigError(
                f"{projection} is in a layout of its kernels in which the bytes of an expert are not together: shape "
                f"{list(self._shape)}, strides {list(self._stride)}"
            )
        self.spec = WeightSpec((self._shape[0], data[0].numel() * data.element_size()), torch.uint8)

    def whole(self) -> Tensor:
        """Bytes ``[E, N]`` of a model that is whole, in the object's own memory."""
        return _as_bytes(self.storage.data)

    def show(self, assembled: Tensor) -> None:
        """Let the object have ``assembled``, bytes ``[E, N]``, as its data."""
        self.storage.data = assembled.reshape(-1).view(self._dtype).as_strided(self._shape, self._stride)

    def hide(self, name: str, device: torch.device) -> None:
        """Let the object have what has no bytes to give; see [Note: Spread tensors]."""
        self.storage.data = SpreadTensor(name, self._shape, self._stride, self._dtype, device)


def kernel_weights(module: Any) -> dict[str, KernelWeight]:
    """Those of ``module``, by the names that a checkpoint gives them; mostly none."""
    found = {}
    for projection in _PROJECTIONS:
        precision = getattr(module, f"{projection}_precision_config", None)
        if precision is not None:
            found[f"{projection}_blocks"] = KernelWeight(projection, getattr(module, projection).storage)
            found[f"{projection}_scales"] = KernelWeight(projection, precision.weight_scale.storage)
    return found


def lay_out_experts(model: Module, quantizer: Any) -> None:
    """Put the kernels' objects, without bytes, where the experts modules of ``model`` have parameters in MXFP4.

    Args:
        model: on the meta device, as ``quantizer`` has prepared it.
        quantizer: transformers' ``HfQuantizer``.
    """
    for module in model.modules():
        if isinstance(module, Mxfp4GptOssExperts):
            for projection in _PROJECTIONS:
                blocks = module.get_parameter(projection).detach().flatten(2).unflatten(2, (-1, _BLOCK_BYTES))
                _deserialize(quantizer, module, projection, blocks, blocks[..., 0])


class IntoKernelLayout:
    """How blocks and scales of one expert become what one `KernelWeight` has of it.

    Args:
        name: the weight's, as `kernel_weights` gives it; what the checkpoint calls its tensor, too.
        projection: its ``KernelWeight.projection``.
        sizes: something with the ``hidden_size`` and the ``intermediate_size`` of the model.
        quantizer: transformers' ``HfQuantizer``.
        device: on which the bytes are rearranged.
    """

    def __init__(self, name: str, projection: str, sizes: Any, quantizer: Any, device: torch.device) -> None:
        self._name = name
        self._projection = projection
        self._sizes = {"hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size}
        self._quantizer = quantizer
        self._device = device

    def needs(self, pattern: str) -> bool:
        """Blocks do not depend on scales, nor scales on blocks."""
        return pattern == self._name

    def convert(self, tensors: Mapping[str, list[Tensor]]) -> Tensor:
        """Bytes ``[1, N]``."""
        blocks, scales = (_only(tensors, f"{self._projection}_{kind}") for kind in ("blocks", "scales"))
        if not (blocks.is_meta and scales.is_meta):  # one of them: transformers wants both in one place
            blocks, scales = self._with_bytes(blocks), self._with_bytes(scales)
        alone: Any = SimpleNamespace(_parameters={}, **self._sizes)
        _deserialize(self._quantizer, alone, self._projection, blocks, scales)
        return kernel_weights(alone)[self._name].whole()

    def _with_bytes(self, tensor: Tensor) -> Tensor:
        """On the device; any bytes, if it has none."""
        return torch.empty_like(tensor, device=self._device) if tensor.is_meta else tensor.to(self._device)


def _only(tensors: Mapping[str, list[Tensor]], pattern: str) -> Tensor:
    if pattern not in tensors:
        raise ValueError(f"there is no tensor {pattern}")
    (tensor,) = tensors[pattern]
    return tensor


def _deserialize(quantizer: Any, module: Any, projection: str, blocks: Tensor, scales: Tensor) -> None:
    """Let transformers put ``blocks`` ``[E, N, K / 32, 16]`` and ``scales`` ``[E, N, K / 32]`` into ``module``."""
    tensors = {f"{projection}_blocks": blocks, f"{projection}_scales": scales}
    Mxfp4Deserialize(quantizer).convert(tensors, model=module, full_layer_name=projection, missing_keys=set())


def _in_memory_order(data: Tensor) -> Tensor:
    """``data`` with its dimensions after the first in the order in which they lie in memory."""
    return data.permute(0, *sorted(range(1, data.dim()), key=lambda dim: data.stride()[dim], reverse=True))


def _as_bytes(data: Tensor) -> Tensor:
    return _in_memory_order(data).flatten(1).view(torch.uint8)

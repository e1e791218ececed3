"""torch tensors over memory that torch does not own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor over the bytes at ``address`` of ``device``.

    It owns nothing: whoever owns the memory keeps it until no tensor uses it, which `StorageWatch` tells. In inference
    mode, too, it is no inference tensor.
    """
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=dtype, device=device)
        nbytes = math.prod(shape) * tensor.element_size()
        storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
        tensor.set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    return tensor


class StorageWatch:
    """Tells, without holding on to it, whether anything still uses a tensor's storage: a tensor, a view, what autograd
    saved, or a holder in C++."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def alive(self) -> bool:
        return not self._storage.expired()  # type: ignore[no-untyped-call]

"""What stands in a module where a parameter stood whose experts are spread over a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from vmm_dwdp.errors import StateError

_READ: Final = frozenset(
    [
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_meta", "is_cpu", "is_cuda"),
        *("is_xpu", "is_mps", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "is_leaf"),
        *("grad", "grad_fn", "requires_grad", "retains_grad", "name", "names"),
    ]
)
_WRITTEN: Final = frozenset(["grad", "requires_grad"])
_CALLED: Final = frozenset(
    [
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_shared"),
        *("is_same_size", "get_device", "data_ptr", "has_names", "requires_grad_", "__len__", "__format__"),
    ]
)
"""Attributes that are read, attributes that are written, and functions, which a placeholder answers as any tensor on
the meta device does: no bytes are needed."""


class SpreadPlaceholder(Parameter):
    """A parameter on the meta device that tells its shape and dtype, and raises `StateError` for all that wants bytes.

    An ordinary meta tensor fails too where bytes are read, but with one of many sentences of torch's, and it can be
    computed with as long as all else is on the meta device.
    """

    _sentence: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        access = func.__name__  # of an attribute, "__get__" or "__set__" bound to its descriptor
        name = getattr(getattr(func, "__self__", None), "__name__", access)
        if (access, name) in {("__get__", "data"), ("detach", "detach")}:
            return args[0]  # another meta tensor would know no sentence
        if name in {"__get__": _READ, "__set__": _WRITTEN}.get(access, _CALLED):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise StateError(_sentence_among([args, kwargs]))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}: {self._sentence})"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise StateError(self._sentence)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise StateError(self._sentence)


def spread_placeholder(shape: Sequence[int], dtype: torch.dtype, sentence: str) -> SpreadPlaceholder:
    """A placeholder of this shape and dtype, without memory, that raises ``sentence`` where its bytes are wanted."""
    with torch.inference_mode(False):
        empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
        placeholder: SpreadPlaceholder = torch.Tensor._make_subclass(SpreadPlaceholder, empty, False)
    placeholder._sentence = sentence
    return placeholder


def _sentence_among(operands: Any) -> str:
    """The sentence of a placeholder among ``operands``, which are nested lists and dicts."""
    leaves = tree_leaves(operands)
    told = (leaf._sentence for leaf in leaves if isinstance(leaf, SpreadPlaceholder))
    return next(told, "experts are spread over the group: nobody has their bytes here")

"""What stands in a module in the place of a spread weight while its layer does not run.

[Note: Spread tensors]
    Outside `acquire` and `release` the memory behind a spread weight may hold another layer's experts. So the module
    does not keep the weight: it keeps a meta tensor of the same shape, strides and dtype, which has no bytes to give.
    An ordinary meta tensor is not enough, since most operations on it succeed: a write into one is lost without a word.
    Of a `SpreadTensor` only what needs no bytes can be had; every operation that reaches torch's dispatcher, from
    Python or from C++, and every way around it, raises one sentence that names the weight.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn, Self

import torch
from torch.utils._pytree import tree_leaves

from vmm_dwdp.errors import StateError

_METADATA_ONLY: Final = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class SpreadTensor(torch.Tensor):
    """The shape, strides and dtype of a spread weight, without its bytes; see [Note: Spread tensors].

    Args:
        weight: its name and its layer, for the sentence: ``w13_weight of layer 3``.
        shape: of the assembled tensor, ``[E, ...]``.
        stride: of the same, in elements; ``None``: contiguous.
        device: where the bytes are while the layer runs. ``.device`` says so, since readers place their inputs by it;
            ``.is_meta`` says that they are not here.

    Raises:
        StateError: whatever wants the bytes, or the memory that they are in.
    """

    weight: str
    _is_param = True  # it counts as a `torch.nn.Parameter`
    # What wants bytes comes to `__torch_dispatch__`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    @torch.inference_mode(mode=False)
    def __new__(
        cls,
        weight: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if stride is not None:
            empty = empty.as_strided(shape, stride)
        made: Self = torch.Tensor._make_subclass(cls, empty, False)
        vars(made).update(weight=weight, _device=device)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it with these
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> SpreadTensor:
        spread = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, SpreadTensor))
        return spread.another() if func in _METADATA_ONLY else spread.refuse()

    def another(self) -> SpreadTensor:
        """For the same weight: what ``.detach()`` and ``.data`` give."""
        return SpreadTensor(self.weight, tuple(self.shape), self.stride(), self.dtype, self.device)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the sentence."""
        raise StateError(
            f"{self.weight} is spread over the group and is here only between acquire and release of its layer: "
            "it cannot be read, written, moved or copied now"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SpreadTensor({self.weight}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return vars(self)["_device"]  # type: ignore[no-any-return]

    @property
    def data(self) -> SpreadTensor:
        return self.another()

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        self.refuse()


# What gives a tensor's bytes, or its memory, without an operation.
for _way in (
    *("data_ptr", "untyped_storage", "storage", "tolist", "numpy", "item", "cuda", "set_", "resize_", "share_memory_"),
    *("__array__", "__bool__", "__float__", "__int__", "__dlpack__", "__reduce_ex__", "__deepcopy__"),
):
    setattr(SpreadTensor, _way, SpreadTensor.refuse)

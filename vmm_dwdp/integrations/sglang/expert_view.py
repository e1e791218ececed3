"""What a `FusedMoE` layer and its quantisation method hold in the places of spread tensors, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from vmm_dwdp.errors import StateError
from vmm_dwdp.integrations.sglang.expert_tensor import ExpertBlocks, note_count, places
from vmm_dwdp.integrations.spread_tensor import SpreadTensor
from vmm_dwdp.memory.assembly import Weights
from vmm_dwdp.runtime import DWDPRuntime
from vmm_dwdp.schedule.compiled_models import between_regions
from vmm_dwdp.schedule.in_place import LookedUp

_Exchange = list[tuple[dict[str, Any], dict[str, Any]]]  # dictionaries of the layer, and what is to be put into each


class ExpertView:
    """The places of one layer's spread tensors: `SpreadTensor`s, but between `show` and `hide` the assembled tensors.

    With rows of a bank before the experts, tensors have as many rows, and the layer's number of experts is that of
    rows meanwhile; but where kernels count experts by them, both are as without a bank, and the rows after those are in
    the same memory.

    Takes effect when it is made, until `remove`. What is exchanged is known before: to show and to hide is to update a
    dictionary of the layer, or a few.

    Args:
        module: a loaded `FusedMoE`.
        blocks: its spread tensors.
        device: where the assembled tensors are.
        as_experts: whether kernels count experts by the tensors' length; see [Note: The order of sums].
    """

    def __init__(
        self, module: Any, blocks: Mapping[str, ExpertBlocks], device: torch.device, *, as_experts: bool = False
    ) -> None:
        self._blocks: Final = blocks
        self._module: Final = vars(module)
        self._num_experts: Final = module.num_experts
        self._as_experts: Final = as_experts
        self._first: Final = next(iter(blocks))
        self._places: Final = {name: places(module, name) for name in blocks}
        self._found: Final = {name: holder[key] for name, [(holder, key), *_] in self._places.items()}
        self._assembled: dict[int, _Exchange] = {}  # by the address of the first tensor: each mode has its own
        self.address = 0  # of that which is shown, or was last
        nothing: dict[str, torch.Tensor] = {}
        for name, block in blocks.items():
            shape, stride = block.assembled(module.num_experts)
            placeholder = SpreadTensor(f"{name} of layer {module.layer_id}", shape, stride, block.dtype, device)
            placeholder._is_param = isinstance(self._found[name], torch.nn.Parameter)
            vars(placeholder).update(vars(self._found[name]))  # what SGLang's loaders and kernels noted on it
            nothing[name] = placeholder
            note_count(module, name, placeholder)
        self._nothing: Final = self._exchange(nothing, self._num_experts)
        self.hide()

    def show(self, weights: Weights) -> None:
        """Let the layer's kernels read ``weights``, of which there is one for each mode, and one with a bank."""
        first = weights[self._first]
        assert isinstance(first, torch.Tensor)
        self.address = first.data_ptr()
        exchange = self._assembled.get(self.address)
        if exchange is None:
            exchange = self._assembled[self.address] = self._made_of(weights)
        for holder, tensors in exchange:
            holder.update(tensors)

    def hide(self) -> None:
        """Let nobody read them."""
        for holder, tensors in self._nothing:
            holder.update(tensors)

    def remove(self) -> None:
        """Put back what was found when this was made, and refer to no assembled tensor any more."""
        for holder, tensors in self._exchange(self._found, self._num_experts):
            holder.update(tensors)
        self._assembled.clear()

    @torch.inference_mode(mode=False)  # a first pass may run in it, and others later outside of it
    def _made_of(self, weights: Weights) -> _Exchange:
        made: dict[str, torch.Tensor] = {}
        rows = 0
        for name, block in self._blocks.items():
            assembled = weights[name]
            assert isinstance(assembled, torch.Tensor)
            rows = self._num_experts if self._as_experts else len(assembled)
            made[name] = torch.Tensor._make_subclass(type(self._found[name]), block.from_bytes(assembled)[:rows])
            vars(made[name]).update(vars(self._found[name]))
        return self._exchange(made, rows)

    def _exchange(self, tensors: Mapping[str, torch.Tensor], rows: int) -> _Exchange:
        """``rows``: what the layer is to take for its number of experts, by which torch's own loop counts them."""
        by_holder: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
            id(self._module): (self._module, {"num_experts": rows})
        }
        for name, tensor in tensors.items():
            for holder, key in self._places[name]:
                by_holder.setdefault(id(holder), (holder, {}))[1][key] = tensor
        return list(by_holder.values())


class ViewedRuntime(DWDPRuntime):
    """A runtime that shows each layer's tensors in its module from `acquire` to `release`: after `look_up`, those that
    it tells."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.views: dict[int, ExpertView] = {}

    @between_regions
    def acquire(self, layer: int, **given: Any) -> Weights:
        """As of any runtime; afterwards the layer's module holds the weights."""
        weights = super().acquire(layer, **given)
        self.views[layer].show(weights)
        return weights

    @between_regions
    def look_up(self, layer: int, chosen: torch.Tensor, **given: Any) -> LookedUp:
        """As of any runtime; afterwards the layer's module holds the weights in which the rows are."""
        found = super().look_up(layer, chosen, **given)
        self.views[layer].show(found.weights)
        return found

    @between_regions
    def release(self, layer: int, **given: Any) -> None:
        """As of any runtime; afterwards the layer's module holds no weights."""
        try:
            super().release(layer, **given)
        except StateError:
            raise  # it was not acquired, or another thread runs its pass: nothing was released
        except BaseException:
            self.views[layer].hide()
            raise
        self.views[layer].hide()

    def reset(self, **given: Any) -> None:
        """As of any runtime; afterwards no module holds weights."""
        try:
            super().reset(**given)
        except StateError:
            raise  # the same
        except BaseException:
            self._hide_all()
            raise
        self._hide_all()

    def _hide_all(self) -> None:
        for view in self.views.values():
            view.hide()

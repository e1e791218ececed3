"""The experts modules of a model: finding them, and letting each run on weights that the runtime assembles.

[Note: Spread experts]
    The stacked parameters of an experts module stand in it only while its forward pass runs, between `acquire` and
    `release`. At other times meta parameters of the same shape and dtype stand in their place, because the memory
    behind the real ones may hold another layer's experts: whoever reads a placeholder gets a sentence, not wrong
    bytes. What would leave the experts out without a word (state_dict, load_state_dict), move them (to, half), copy
    them (deepcopy, pickle) or wrap them in an adapter of peft's is refused, and so is a backward pass, which would read
    them long after `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.integrations.spread_tensor import SpreadTensor
from vmm_dwdp.integrations.transformers.bank import require_reads_rows
from vmm_dwdp.integrations.transformers.mxfp4 import KernelWeight, kernel_weights
from vmm_dwdp.integrations.transformers.routing import routed_tokens, routing_of, with_choice
from vmm_dwdp.integrations.transformers.turns import Turns, is_captured
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.runtime import DWDPRuntime

Compute = Callable[[Any, Any, int, int | None, Tensor | None], Any]
"""An experts module's own forward pass on its layer: of its arguments, for so many tokens, and the experts that each of
them uses ``[tokens, K]``, where known."""


@dataclass(frozen=True)
class ExpertsModule:
    """A module that holds the experts of one MoE layer.

    Attributes:
        path: the module's name in the model.
        module: it; a `torch.nn.Module`, whose methods torch leaves without annotations.
        weights: what in it is stacked by expert, ``[E, ...]``, by name: its parameters, and ``in_kernels``.
        in_kernels: those that are no parameters; see [Note: Kernel layouts].
        first: the first of the ``E`` experts in the model, where these are a node's.
    """

    path: str
    module: Any
    weights: Mapping[str, WeightSpec]
    in_kernels: Mapping[str, KernelWeight] = field(default_factory=dict)
    first: int = 0

    @property
    def num_experts(self) -> int:
        """``E``."""
        return next(iter(self.weights.values())).num_experts

    @property
    def parameters(self) -> list[str]:
        """The names of its weights that are parameters."""
        return [name for name in self.weights if name not in self.in_kernels]

    def whole(self, name: str) -> Tensor:
        """A weight ``[E, ...]`` of a model that is whole, in its own memory."""
        if name in self.in_kernels:
            return self.in_kernels[name].whole()
        parameter: Tensor = self.module.get_parameter(name).detach()
        return parameter

    def identity(self, name: str) -> int:
        """Of a weight of a model that is whole: equal for two that are tied."""
        return id(self.module.get_parameter(name) if name in self.parameters else self.in_kernels[name].storage)

    def require_reads_rows(self) -> None:
        """Raise `ConfigError` unless it can read rows of a bank; see [Note: Rows for experts]."""
        require_reads_rows(self.path, self.module, in_kernels=bool(self.in_kernels))

    def is_in(self, path: str) -> bool:
        """Whether the module of this name, ``""`` for the model, contains it."""
        return not path or self.path.startswith(f"{path}.")


def find_experts(model: Module) -> list[ExpertsModule]:
    """The experts modules of ``model`` in the order of its modules, which is the order in which layers run.

    They are told by name and shape, not by the model's family: a module that is called "experts" (or whose class is,
    but not "shared_experts", which every token passes) with parameters of three or more dimensions, the first of which
    counts the experts. All its parameters of two or more dimensions with that many rows are spread, small biases too: a
    weight smaller than a page costs every rank that page, and is never fetched.

    Raises:
        ConfigError: there is none, or the weights of one disagree on the number of experts, or are in a layout of
            kernels in which experts are not apart.
    """
    found = []
    for path, module in model.named_modules():
        own_name, class_name = path.rpartition(".")[2], type(module).__name__
        if not (own_name.endswith("experts") or "Experts" in class_name) or own_name.startswith("shared"):
            continue
        parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() >= 2}
        in_kernels = kernel_weights(module)
        kept = {name: weight.spec for name, weight in in_kernels.items()}
        counts = {p.shape[0] for p in parameters.values() if p.dim() >= 3} | {s.num_experts for s in kept.values()}
        if not counts:
            continue
        if len(counts) > 1:
            shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in (parameters | kept).items())
            raise ConfigError(f"the parameters of {path} are stacked by different numbers of experts: {shapes}")
        (count,) = counts
        stacked = {name: WeightSpec(tuple(p.shape), p.dtype) for name, p in parameters.items() if p.shape[0] == count}
        found.append(ExpertsModule(path, module, kept | stacked, in_kernels))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no module of experts whose parameters are stacked by expert")
    return found


def by_layer(
    experts: Iterable[ExpertsModule], identity: Callable[[ExpertsModule, str], Hashable]
) -> list[list[ExpertsModule]]:
    """Modules that have the same weights, which are one layer: each list's modules are tied to each other.

    Args:
        identity: of a module's weight, by its name: equal for two weights that are one.
    """
    layers: dict[Hashable, list[ExpertsModule]] = {}
    for found in experts:
        layers.setdefault(tuple(identity(found, name) for name in found.weights), []).append(found)
    return list(layers.values())


def align_experts(model: Module) -> None:
    """Move the experts of a whole model to memory of their own, so that its bits can be compared on a CPU.

    transformers leaves a parameter that needs no conversion in the mapped file, at any address, and a CPU kernel may
    round in another way at such an address than at the start of a page, where an assembled tensor is.
    """
    for experts in find_experts(model):
        for name in experts.parameters:
            parameter = experts.module.get_parameter(name)
            parameter.data = parameter.data.clone()


# When a model's passes refresh the resident cache.
FIRST: Final = 16  # passes before the first refresh: few, because until then nothing is cached
MOST: Final = 1024  # passes between two refreshes, once there is a cache that follows the routing


class RefreshSchedule:
    """Refreshes the cache of ``runtime``, if it has one, after 16 passes, 32 more, 64 more, and so on to 1,024.

    Replays of a graph do not come by here: whoever replays refreshes between them.
    """

    def __init__(self, runtime: DWDPRuntime) -> None:
        self._runtime = runtime
        self._interval = FIRST
        self._passes = 0

    def begin_pass(self) -> None:
        """A pass begins, in which no layer is acquired yet. Refreshes may wait for the device, but not in a capture."""
        if not self._runtime.config.resident_cache or is_captured(self._runtime.device):
            return
        if self._passes >= self._interval:
            self._runtime.refresh_cache()
            self._passes, self._interval = 0, min(2 * self._interval, MOST)
        self._passes += 1


class SpreadExperts:
    """One experts module and its layer in the runtime; see [Note: Spread experts].

    Takes effect when it is made, and stays for the life of the module. Its forward pass is part of a turn of ``turns``.
    The first layer tells ``schedule``, which all layers of the model share, that a pass begins. ``merge`` is for
    modules whose own code wants tensors although the runtime assembles lists: they are concatenated before every
    forward pass. ``across`` stands between the module and its callers, where it has the experts of one node: it is
    given the arguments, and what computes.
    """

    def __init__(
        self,
        experts: ExpertsModule,
        runtime: DWDPRuntime,
        layer: int,
        schedule: RefreshSchedule,
        turns: Turns,
        *,
        merge: bool,
        across: Callable[[Any, Any, Compute], Any] | None,
    ) -> None:
        self.path = experts.path
        self._experts = experts
        self._module = experts.module
        self._weights = experts.weights
        self._runtime = runtime
        self._layer = layer
        self._schedule = schedule
        self._turns = turns
        self._merge = merge
        # transformers' MXFP4 module is called at its second step, with the routing that its kernels want.
        entry = "forward_routed" if hasattr(self._module, "forward_routed") else "forward"
        self._own_forward = getattr(self._module, entry)
        self._across = across
        self._looks_up = runtime.config.movable_experts or runtime.config.expert_bank > 0
        self._placeholders = {
            name: SpreadTensor(f"{self.path}.{name}", spec.shape, None, spec.dtype, runtime.device)
            for name, spec in self._weights.items()
            if name in experts.parameters
        }
        self._hide()
        self._module.__dict__.update({entry: turns.taking(self._forward), "_apply": self._apply})
        self._module.register_state_dict_pre_hook(self._refuse_state_dict)
        self._module.register_load_state_dict_pre_hook(self._refuse_state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model runs this as it is
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._layer == 0:
            self._schedule.begin_pass()
        self._turns.reached = self._layer + 1
        with torch.no_grad():
            if self._across is None:
                counted = self._runtime.config.resident_cache > 0
                output = self._compute(args, kwargs, *routing_of(args, kwargs, counted=counted))
            else:
                output = self._across(args, kwargs, self._compute)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if torch.is_grad_enabled() and inputs:
            refusing: Any = _NoBackward.apply
            output = tree_map_only(Tensor, lambda tensor: refusing(self.path, tensor, *inputs), output)
        return output

    def _compute(self, args: Any, kwargs: Any, tokens: int, top_k: int | None, chosen: Tensor | None) -> Any:
        with self._runtime.layer(self._layer, tokens=tokens, top_k=top_k, chosen=chosen) as weights:
            shown: Mapping[str, Any] = weights
            if self._merge:
                shown = {name: torch.cat(list(tensors)) for name, tensors in weights.items()}
            if self._across is not None and not args[0].numel():
                return args[0]  # nobody's tokens came to this node
            try:
                if self._looks_up:
                    shown, args, kwargs = self._look_up(args, kwargs)
                self._show(shown)
                return self._own_forward(*args, **kwargs)
            finally:
                self._hide()

    def _look_up(self, args: Any, kwargs: Any) -> tuple[Mapping[str, Any], Any, Any]:
        """The layer's weights by row, and the arguments with the row in the place of each expert that was chosen."""
        routed = routed_tokens(args, kwargs)
        if routed is None:
            raise ConfigError(
                f"{self.path} is given something else than tokens, their experts and their weights: once experts have "
                "moved it would use wrong ones, so the config must not have movable_experts"
            )
        if self._runtime.config.expert_bank:
            self._experts.require_reads_rows()
        found = self._runtime.look_up(self._layer, routed.chosen.contiguous())
        weights: Mapping[str, Any] = found.weights
        self._count_rows(len(next(iter(weights.values()))))
        return weights, *with_choice(args, kwargs, routed, found.rows)

    def _show(self, weights: Mapping[str, Any]) -> None:
        for name, weight in weights.items():
            if name in self._placeholders:
                self._module._parameters[name] = weight
            else:
                self._experts.in_kernels[name].show(weight)

    def _hide(self) -> None:
        self._module._parameters.update(self._placeholders)
        for name, weight in self._experts.in_kernels.items():
            weight.hide(f"{self.path}.{name}", self._runtime.device)
        self._count_rows(self._experts.num_experts)

    def _count_rows(self, number: int) -> None:
        """Let transformers' own code know of so many rows of the weights."""
        if hasattr(self._module, "num_experts"):
            self._module.num_experts = number

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """What `Module.to` and its like call: whatever else the module holds may move, the experts may not."""
        self.require_stays(fn)
        self._module._parameters.update(dict.fromkeys(self._placeholders))
        try:
            type(self._module)._apply(self._module, fn, recurse)
        finally:
            self._module._parameters.update(self._placeholders)
        return self._module  # type: ignore[no-any-return]

    def require_stays(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise `StateError` if ``fn``, which `Module.to` would apply to each parameter, would change the experts."""
        for name, spec in self._weights.items():
            empty = torch.empty(0, dtype=spec.dtype, device=self._runtime.device)
            moved = fn(empty)
            if (moved.dtype, moved.device) != (empty.dtype, empty.device):
                raise StateError(
                    f"{self.path}.{name} cannot become {moved.dtype} on {moved.device}: it is spread over the group, "
                    f"and stays {empty.dtype} on {empty.device}"
                )

    def _refuse_state_dict(self, *_: Any) -> NoReturn:
        raise StateError(
            f"the experts of {self.path} are spread over the group and in no state dict; "
            "save or load the whole model before they are spread"
        )


def _refuse_adapter(wrapper: Module, name: str, module: Module | None) -> None:
    """Raise `StateError` if ``wrapper``, to which ``module`` is given, is an adapter of peft's over spread experts.

    Its own code would find out in its first forward pass.
    """
    spread = getattr(vars(module).get("_apply"), "__self__", None) if module is not None else None
    if isinstance(spread, SpreadExperts) and any(base.__name__ == "BaseTunerLayer" for base in type(wrapper).__mro__):
        raise StateError(
            f"{spread.path} cannot be adapted: its experts are spread over the group; adapt other modules, or merge "
            "the adapter into the checkpoint before it is loaded"
        )


register_module_module_registration_hook(_refuse_adapter)


class _NoBackward(torch.autograd.Function):
    """Passes the output of an experts module on, connected to its inputs, and refuses the backward pass."""

    @staticmethod
    def forward(ctx: Any, path: str, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.path = path
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise StateError(
            f"a backward pass reaches {ctx.path}, whose experts have left this rank since; train with the whole model"
        )

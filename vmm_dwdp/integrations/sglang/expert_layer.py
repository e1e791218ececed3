"""One `FusedMoE` layer from its construction to clean-up: where its tensors are, and what its routing looks like."""

from __future__ import annotations

from typing import Any, Final

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang.expert_tensor import ExpertBlocks, find, replace
from vmm_dwdp.integrations.sglang.expert_view import ExpertView
from vmm_dwdp.integrations.sglang.rows import Telling
from vmm_dwdp.integrations.sglang.schemes import NotServedError, Scheme, runner_of, scheme_of
from vmm_dwdp.integrations.sglang.settings import DISABLE
from vmm_dwdp.layout.placement import ExpertPlacement
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.runtime import DWDPRuntime

NO_UPDATES: Final = (
    "the weights of a running model cannot be updated while DWDP spreads its experts; restart with the new ones"
)

# What `FusedMoE.bind_full_expert_weights` overwrites, and `restore` puts back.
_LAYER_STATE: Final = ("moe_ep_size", "moe_ep_rank", "_num_local_routed", "num_local_experts", "_dwdp_bound")
_DISPATCHER_STATE: Final = (
    "moe_ep_size",
    "moe_ep_rank",
    "num_local_experts",
    "num_local_routed_experts",
    "local_expert_mapping",
    "expert_mask_gpu",
)


class ExpertLayer:
    """The per-expert tensors of one layer.

    A tensor of at least a page in an equal share of the experts is spread: its bytes are in the runtime's memory. A
    smaller one is replicated: every rank keeps all of it, as SGLang's own DWDP does.

    From its construction until `load` the layer has one expert's part of each parameter, as which experts this rank is
    to load may depend on layers that are not constructed yet.

    Args:
        module: a `FusedMoE` just constructed, with an equal share of the experts in its parameters.
        page_nbytes: bytes per page of the device's memory.
        telling: how its kernels are told rows of a bank, if they are: then every tensor of an expert is spread, small
            ones too.

    Raises:
        NotServedError: the layer's quantisation method, MoE runner or tensors are not supported; it is as constructed.
    """

    def __init__(self, module: Any, page_nbytes: int, *, telling: Telling | None = None) -> None:
        self.module = module
        self.telling = telling
        self.number = int(module.layer_id)
        self.num_experts = int(module.num_experts)
        self.finished = False
        self.loads: tuple[int, ...] = ()  # the experts that are loaded on this rank, in the order of its parameters
        self._share = int(module.num_local_experts)
        self._page = page_nbytes
        self._scheme: Scheme = scheme_of(module)
        self._spread: dict[str, ExpertBlocks] = {}
        self._replicated: list[str] = []
        self._view: ExpertView | None = None
        self._state = _routing_state(module)
        if self._scheme.kept:
            try:
                self._refuse_unknown(self._share)
                self._sort(self._share)
            except ConfigError as error:
                raise NotServedError(str(error), runner_of(module)) from error
        self._set_aside = [
            each for each in module._parameters.values() if each is not None and each.shape[:1] == (self._share,)
        ]
        for parameter in self._set_aside:
            parameter.data = parameter.data[:1].clone()

    # -- loading -----------------------------------------------------------------------------------------------------
    def _sort(self, num_experts: int) -> None:
        """Tell which tensors, of which the module has so many experts, are to be spread, and which replicated."""
        for name in self._scheme.tensors:
            tensor = find(self.module, name)
            if tensor is None:
                if name not in self._scheme.optional:
                    raise ConfigError(f"layer {self.number} has no tensor {name}, which its kernels read")
                continue
            if tensor.shape[0] != num_experts:
                raise ConfigError(f"{name} of layer {self.number} has {tensor.shape[0]} experts, not {num_experts}")
            block = ExpertBlocks.of(f"{name} of layer {self.number}", tensor)
            if self._is_large(block.nbytes):
                self._spread[name] = block
            else:
                self._replicated.append(name)
        if not self._spread:
            raise ConfigError(f"the experts of layer {self.number} are smaller than a page of {self._page} bytes")

    def _is_large(self, expert_nbytes: int) -> bool:
        return expert_nbytes > 0 and (self.telling is not None or expert_nbytes * self._share >= self._page)

    def weights(self) -> dict[str, WeightSpec]:
        """What of the layer is spread, by its bytes; where post-processing is still to make it, what it is made of."""
        nbytes = {name: block.nbytes for name, block in self._spread.items()}
        if not nbytes:
            parts = {str(place): each[0].nbytes for place, each in enumerate(self._set_aside)}
            nbytes = {name: each for name, each in parts.items() if self._is_large(each)} or parts
        return {name: WeightSpec((self.module.num_experts, each), torch.uint8) for name, each in nbytes.items()}

    def load(self, runtime: DWDPRuntime) -> None:
        """From now on the module's parameters have the experts that the owners of this rank hold, and SGLang's loader
        puts each in its place: into the shard, where they are all of one. Else into host memory if there is some that
        is an owner, so that the model is never whole on the GPU, until `finish`."""
        self._runtime = runtime
        placement = ExpertPlacement(self.module.num_experts, runtime.config)
        held = [expert for owner in runtime.held_owners for expert in placement.experts(owner)]
        self.loads = tuple(held) or (0,)  # which post-processing can look at, where this rank holds none
        places = {expert: place for place, expert in enumerate(self.loads)}
        self.module._map_global_expert_id_to_local_expert_id = lambda expert_id: places.get(expert_id, -1)
        self.module.num_local_experts = self.module.moe_runner_config.num_local_experts = len(self.loads)
        shards = self._shards(placement)
        for parameter in self._set_aside:
            full = shards.get(id(parameter))
            if full is None:
                is_staged = runtime.config.host_experts and self._is_large(parameter[0].nbytes)
                full = _room_for(parameter.data, len(self.loads), torch.device("cpu") if is_staged else runtime.device)
            parameter.data = full.copy_(parameter.data)  # what the constructor put there, such as scales of one
        self._set_aside.clear()  # what post-processing replaces is to be freed

    def _shards(self, placement: ExpertPlacement) -> dict[int, torch.Tensor]:
        """The memory of parameters that are loaded where they stay, by their identity."""
        if not self._scheme.kept:
            return {}
        self._runtime.add_layer(self.number, self.weights())
        sole = [owner for owner in self._runtime.held_owners if tuple(placement.experts(owner)) == self.loads]
        return {
            id(getattr(self.module, name)): block.from_bytes(self._runtime.local_shard(self.number, name, owner))
            for owner in sole
            for name, block in self._spread.items()
        }

    def give_back(self, device: torch.device) -> None:
        """Before `load`: the module's tensors are as its constructor made them."""
        for parameter in self._set_aside:
            parameter.data = _room_for(parameter.data, self._share, device).copy_(parameter.data)

    def post_process(self, own: Any, module: Any) -> None:
        """Around the quantisation method's post-processing, which the loader calls layer by layer, and updates too.

        Raises:
            ConfigError: the layer's kernels read assembled tensors already, or see `finish`.
        """
        self._require_loading()
        if not self.finished:  # once is enough, and twice would quantise what is quantised
            self._to_device()
            own(module)
            self.finish()

    def restore_weights(self, own: Any, module: Any) -> None:
        """Around what undoes post-processing, for an update. Raises `ConfigError` once the layer is bound."""
        self._require_loading()
        own(module)

    def _require_loading(self) -> None:
        if self._view is not None:
            raise ConfigError(NO_UPDATES)

    def _to_device(self) -> None:
        """Bring what is staged in host memory to the device, for post-processing."""
        for parameter in self.module.parameters(recurse=False):
            if parameter.device != self._runtime.device and not self._scheme.kept:
                parameter.data = parameter.data.to(self._runtime.device)

    def finish(self) -> None:
        """Move what post-processing made into the shard, tensor by tensor, and free what only it needed.

        Raises:
            ConfigError: it made something that the table of schemes does not know.
        """
        if self.finished:
            return
        try:
            self._take_over()
        except ConfigError as error:
            raise ConfigError(f"{error}; start with {DISABLE}=1, which leaves the experts to SGLang") from error
        self.finished = True

    def _take_over(self) -> None:
        if not self._scheme.kept:
            self._free_scratch()
            self._sort(len(self.loads))
            self._runtime.add_layer(self.number, self.weights())
        self._refuse_unknown(len(self.loads))
        for name, declared in self._spread.items():
            tensor = find(self.module, name)
            if tensor is None:
                raise ConfigError(f"post-processing of layer {self.number} removed {name}, which its kernels read")
            block = ExpertBlocks.of(f"{name} of layer {self.number}", tensor)
            if block.nbytes != declared.nbytes:
                raise ConfigError(
                    f"post-processing made an expert of {name} in layer {self.number} {block.nbytes} bytes long; "
                    f"it was declared with {declared.nbytes}"
                )
            self._move(name, block, tensor)
            self._spread[name] = block
            del tensor
            if self._runtime.device.type == "cuda":
                torch.cuda.empty_cache()  # the freed tensor's memory goes back to the driver, for the next shard

    def _move(self, name: str, block: ExpertBlocks, tensor: torch.Tensor) -> None:
        """Copy to every owner's shard; the module keeps no experts, as SGLang would move them back to where they came
        from. What was loaded into the shard stays."""
        written = block.to_bytes(tensor)
        loaded_in_place = False
        for owner in self._runtime.held_owners:
            shard = self._runtime.local_shard(self.number, name, owner)
            if shard.numel() and shard.data_ptr() == tensor.data_ptr():
                loaded_in_place = True
            elif shard.numel():
                first = self.loads.index(self._runtime.local_experts(self.number, owner).start)
                shard.copy_(written[first : first + len(shard)])
        if not loaded_in_place:
            replace(self.module, name, torch.empty_like(tensor[:0]))

    def _free_scratch(self) -> None:
        read = {id(getattr(self.module, name, None)) for name in self._scheme.tensors}
        for name in self._scheme.scratch:
            held = getattr(self.module, name, None)
            if isinstance(held, torch.Tensor) and id(held) not in read:  # some are two names of one parameter
                held.data = held.data.new_empty(0)

    def _refuse_unknown(self, num_loaded: int) -> None:
        """A per-expert tensor that is not in the table would keep this rank's experts only. It is known by how many it
        has, unless tensors of other things have as many: then another rank finds it."""
        total = self.module.num_experts
        if num_loaded == total or num_loaded == 1 != self._share:
            return
        scheme = self._scheme
        known = {*scheme.tensors, *scheme.scratch, *scheme.maximum}
        for holder in (self.module._parameters, self.module._buffers, vars(self.module)):
            for name, value in holder.items():
                values = value if isinstance(value, tuple | list) else (value,)
                per_expert = any(
                    isinstance(each, torch.Tensor) and each.ndim and each.shape[0] == num_loaded for each in values
                )
                if per_expert and name not in known:
                    raise ConfigError(f"layer {self.number} has a per-expert tensor {name} that DWDP does not know")

    # -- replicated tensors ------------------------------------------------------------------------------------------
    def replicated(self) -> dict[str, torch.Tensor]:
        """The small tensors of the experts `loads`, as bytes ``[n, nbytes]`` in host memory."""
        return {name: self._block(name).to_bytes(self._find(name)).cpu() for name in self._replicated}

    def maxima(self) -> dict[str, torch.Tensor]:
        """What post-processing reduced over the experts that it saw, in host memory."""
        found = {name: find(self.module, name) for name in self._scheme.maximum}
        return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}

    def set_replicated(self, name: str, experts: torch.Tensor) -> None:
        """Bytes ``[E, nbytes]`` of all experts."""
        replace(self.module, name, self._block(name).from_bytes(experts.to(self._runtime.device)))

    def set_maximum(self, name: str, value: torch.Tensor) -> None:
        replace(self.module, name, value.to(self._runtime.device))

    def _find(self, name: str) -> torch.Tensor:
        tensor = find(self.module, name)
        assert tensor is not None
        return tensor

    def _block(self, name: str) -> ExpertBlocks:
        return ExpertBlocks.of(name, self._find(name))

    # -- after publish -----------------------------------------------------------------------------------------------
    def bind(self) -> ExpertView:
        """Give the layer all experts: nothing of the spread ones until the view shows them."""
        for name in self._replicated:
            replace(self.module, name, self._find(name).to(self._runtime.device))
        self.module.bind_full_expert_weights({})
        as_experts = self.telling is not None and self.telling.as_experts
        self._view = ExpertView(self.module, self._spread, self._runtime.device, as_experts=as_experts)
        return self._view

    def restore(self) -> None:
        """Routing as it was after construction; the expert tensors are empty, so that nothing refers to the runtime."""
        if self._view is not None:
            self._view.remove()
        vars(self.module).pop("_map_global_expert_id_to_local_expert_id", None)
        for name in self._scheme.tensors:
            tensor = find(self.module, name)
            if tensor is not None:
                replace(self.module, name, torch.empty_like(tensor[:0]))
        for target, name, value in self._state:
            setattr(target, name, value)


def _room_for(expert: torch.Tensor, number: int, device: torch.device) -> torch.Tensor:
    """Memory for so many experts that are each as ``expert``, ``[1, ...]``, is."""
    shape, stride = ExpertBlocks(tuple(expert.shape[1:]), expert.stride()[1:], expert.dtype).assembled(number)
    return torch.empty_strided(shape, stride, dtype=expert.dtype, device=device)


def _routing_state(module: Any) -> list[tuple[Any, str, Any]]:
    targets = [(module, _LAYER_STATE), (module.dispatcher, _DISPATCHER_STATE)]
    targets.append((module.moe_runner_config, ("num_local_experts",)))
    return [(target, name, getattr(target, name)) for target, names in targets for name in names]

"""One `FusedMoE` layer from its construction to clean-up: where its tensors are, and what its routing looks like."""

from __future__ import annotations

from typing import Any, Final

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang.expert_tensor import ExpertBlocks, find, replace
from vmm_dwdp.integrations.sglang.expert_view import ExpertView
from vmm_dwdp.integrations.sglang.schemes import NotServedError, Scheme, runner_of, scheme_of
from vmm_dwdp.integrations.sglang.settings import DISABLE
from vmm_dwdp.layout.placement import HOST, Owner
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

    A tensor of at least a page on this rank is spread: its bytes are in the runtime's memory. A smaller one is
    replicated: every rank keeps all of it, as SGLang's own DWDP does.

    Args:
        module: a `FusedMoE` just constructed, with the experts ``first_expert`` onwards in its parameters.
        page_nbytes: bytes per page of the device's memory.

    Raises:
        NotServedError: the layer's quantisation method, MoE runner or tensors are not supported.
    """

    def __init__(self, module: Any, runtime: DWDPRuntime, first_expert: int, page_nbytes: int) -> None:
        self.module = module
        self.number = int(module.layer_id)
        self.finished = False
        self._runtime = runtime
        self._first = first_expert
        self._page = page_nbytes
        self._scheme: Scheme = scheme_of(module)
        self._spread: dict[str, ExpertBlocks] = {}
        self._replicated: list[str] = []
        self._view: ExpertView | None = None
        self._state = _routing_state(module)
        if self._scheme.kept:
            try:
                self._refuse_unknown()
                self._declare()
            except ConfigError as error:
                raise NotServedError(str(error), runner_of(module)) from error
            for name, block in self._spread.items():
                self._bind_loaded(name, block)
        elif runtime.config.group_size == 1:
            self._stage()

    # -- loading -----------------------------------------------------------------------------------------------------
    def _declare(self) -> None:
        """Tell the runtime which tensors it will hold, by their bytes."""
        num_loaded = self.module.num_local_experts
        for name in self._scheme.tensors:
            tensor = find(self.module, name)
            if tensor is None:
                if name not in self._scheme.optional:
                    raise ConfigError(f"layer {self.number} has no tensor {name}, which its kernels read")
                continue
            if tensor.shape[0] != num_loaded:
                raise ConfigError(f"{name} of layer {self.number} has {tensor.shape[0]} experts, not {num_loaded}")
            block = ExpertBlocks.of(f"{name} of layer {self.number}", tensor)
            if block.nbytes * num_loaded >= self._page:
                self._spread[name] = block
            else:
                self._replicated.append(name)
        if not self._spread:
            raise ConfigError(f"the experts of layer {self.number} are smaller than a page of {self._page} bytes")
        total = self.module.num_experts
        specs = {name: WeightSpec((total, block.nbytes), torch.uint8) for name, block in self._spread.items()}
        self._runtime.add_layer(self.number, specs)

    def _sole_owner(self) -> Owner | None:
        """The owner, of those that this rank fills, that holds every expert in the module's parameters."""
        loaded = range(self._first, self._first + self.module.num_local_experts)
        for owner in self._owners():
            if self._runtime.local_experts(self.number, owner) == loaded:
                return owner
        return None

    def _owners(self) -> list[Owner]:
        return [self._runtime.rank, HOST] if self._runtime.config.host_experts else [self._runtime.rank]

    def _bind_loaded(self, name: str, block: ExpertBlocks) -> None:
        """Let the loader write into the shard, where it is one; else into host memory, until `finish`."""
        tensor = find(self.module, name)
        assert tensor is not None
        owner = self._sole_owner()
        if owner is None:
            replace(self.module, name, tensor.cpu())
            return
        shard = self._runtime.local_shard(self.number, name, owner)
        placed = block.from_bytes(shard)
        placed.copy_(tensor)  # what the constructor put there, such as scales of one
        replace(self.module, name, placed)

    def give_back(self) -> None:
        """Before anything is loaded: the module's tensors are as its constructor made them, in torch's memory again."""
        for name in self._spread:
            tensor = self._find(name)
            replace(self.module, name, torch.empty_like(tensor, device=self._runtime.device).copy_(tensor))

    def _stage(self) -> None:
        """Keep large parameters in host memory until post-processing, so that the model is never whole on the GPU."""
        for parameter in self.module.parameters(recurse=False):
            if parameter.nbytes >= self._page:
                parameter.data = parameter.data.cpu()

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
            self._declare()
        self._refuse_unknown()
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
        for owner in self._owners():
            shard = self._runtime.local_shard(self.number, name, owner)
            if shard.numel() and shard.data_ptr() == tensor.data_ptr():
                loaded_in_place = True
            elif shard.numel():
                experts = self._runtime.local_experts(self.number, owner)
                shard.copy_(written[experts.start - self._first : experts.stop - self._first])
        if not loaded_in_place:
            replace(self.module, name, torch.empty_like(tensor[:0]))

    def _free_scratch(self) -> None:
        read = {id(getattr(self.module, name, None)) for name in self._scheme.tensors}
        for name in self._scheme.scratch:
            held = getattr(self.module, name, None)
            if isinstance(held, torch.Tensor) and id(held) not in read:  # some are two names of one parameter
                held.data = held.data.new_empty(0)

    def _refuse_unknown(self) -> None:
        """A per-expert tensor that is not in the table would keep this rank's experts only."""
        num_loaded, total = self.module.num_local_experts, self.module.num_experts
        if num_loaded == total:
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
        """This rank's experts of the small tensors, as bytes ``[n, nbytes]`` in host memory."""
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
        self._view = ExpertView(self.module, self._spread, self._runtime.device)
        return self._view

    def restore(self) -> None:
        """Routing as it was after construction; the expert tensors are empty, so that nothing refers to the runtime."""
        if self._view is not None:
            self._view.remove()
        for name in self._scheme.tensors:
            tensor = find(self.module, name)
            if tensor is not None:
                replace(self.module, name, torch.empty_like(tensor[:0]))
        for target, name, value in self._state:
            setattr(target, name, value)


def _routing_state(module: Any) -> list[tuple[Any, str, Any]]:
    targets = [(module, _LAYER_STATE), (module.dispatcher, _DISPATCHER_STATE)]
    targets.append((module.moe_runner_config, ("num_local_experts",)))
    return [(target, name, getattr(target, name)) for target, names in targets for name in names]

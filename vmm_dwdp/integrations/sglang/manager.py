"""What SGLang calls its DWDP manager, over this library's runtime."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.config import DWDPConfig, Mode
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang.expert_layer import ExpertLayer
from vmm_dwdp.integrations.sglang.expert_view import ViewedRuntime
from vmm_dwdp.integrations.sglang.schemes import caution

_log = logging.getLogger("vmm_dwdp")

# Modules of models that hand expert weights to kernels of their own, past the quantisation method.
_OWN_KERNELS: Final = frozenset({"sglang.srt.models.beam", "sglang.srt.models.qwen4_exp"})


class ExpertManager:
    """The experts of one model, from the construction of its first MoE layer to `cleanup`.

    `adopt` takes every `FusedMoE` as it is constructed, before weights are loaded. The five methods after it are those
    that SGLang's forward pass calls on the manager of its own DWDP.

    Args:
        config: equal on all ranks.
        rank: this process's place in the group.
        group: SGLang's process group of these ranks for host memory; constructing is collective.
        device: where the model is.
        revision: of its checkpoint, on which all ranks must agree; ``None`` if it is not known.
    """

    def __init__(
        self, config: DWDPConfig, rank: int, group: dist.ProcessGroup, device: torch.device, revision: str | None
    ) -> None:
        driver = open_driver(device)
        self.runtime = ViewedRuntime(config, rank, device, group, driver=driver)
        self._revision = revision
        self._group = group
        self._page_nbytes = driver.granularity()
        self._layers: dict[int, ExpertLayer] = {}
        self._running = False
        self.closed = False

    # -- while the model is constructed and loaded -------------------------------------------------------------------
    def adopt(self, module: Any) -> None:
        """Take over the expert tensors of a `FusedMoE` that was just constructed.

        Raises:
            NotServedError: its weights or its MoE runner are not served; the layer is as it was constructed.
            ConfigError: experts would be read wrongly; the sentence says why.
        """
        number = int(module.layer_id)
        if number in self._layers:
            raise ConfigError(f"two MoE layers have the number {number}; DWDP needs a number of its own for each")
        if module.num_fused_shared_experts and self.runtime.config.group_size > 1:
            raise ConfigError("DWDP cannot spread fused shared experts; start with --disable-shared-experts-fusion")
        for layer in self._layers.values():
            if layer.module.num_experts != module.num_experts:
                raise ConfigError(
                    f"DWDP needs as many experts in every MoE layer: layer {layer.number} has "
                    f"{layer.module.num_experts}, layer {number} has {module.num_experts}"
                )
        first = self.runtime.rank * module.num_local_experts
        layer = ExpertLayer(module, self.runtime, first, self._page_nbytes)
        cautioned = caution(module) if not self._layers and self.runtime.rank == 0 else None
        if cautioned is not None:
            _log.info(cautioned)
        self._layers[number] = layer
        wrappers: dict[str, Any] = {
            "process_weights_after_loading": layer.post_process,
            "apply": partial(self._apply, layer),
        }
        if hasattr(module.quant_method, "restore_weights_before_loading"):  # 0.5.23
            wrappers["restore_weights_before_loading"] = layer.restore_weights
        for name, wrapper in wrappers.items():
            setattr(module.quant_method, name, partial(wrapper, getattr(module.quant_method, name)))

    def give_back(self) -> None:
        """Undo `adopt` before anything is loaded: the layers are as they were constructed, and no memory is held.
        Collective, since the first rank takes with it the directory in which the others may still be about to meet.

        Layers have two places in GPU memory meanwhile. If it raises, they are as after `cleanup`.
        """
        try:
            dist.barrier(group=self._group)
            for layer in self._layers.values():
                layer.give_back()
            for layer in self._layers.values():
                _unhook(layer)
            self._layers.clear()
        finally:
            self.cleanup()

    def _apply(self, of: ExpertLayer, apply: Any, layer: Any, dispatch_output: Any) -> Any:
        """Around the quantisation method's `apply`, which every path that runs a layer's experts calls: the forward
        pass, deferred finalisation, and models that call it themselves. Here the number of tokens is known."""
        if not self._running:
            return apply(layer=layer, dispatch_output=dispatch_output)
        with self.runtime.layer(of.number, tokens=len(dispatch_output.hidden_states), top_k=of.module.top_k):
            return apply(layer=layer, dispatch_output=dispatch_output)

    # -- SGLang's five methods ---------------------------------------------------------------------------------------
    def setup(self, model: torch.nn.Module) -> None:
        """Publish the loaded shards, and give every layer the assembled tensors of all experts. Collective.

        If it raises, the layers are as after `cleanup`.

        Raises:
            ConfigError: the model has MoE layers that were not adopted, or runs them by kernels of its own.
            DWDPError: memory could not be had, or a rank did not come.
        """
        try:
            self._require_served(model)
            for layer in self._layers.values():
                layer.finish()
            self._replicate()
            self.runtime.publish(revision=self._revision)
            mode: Mode = "in_place" if self.runtime.config.reads_in_place else "staged"
            for layer in self._layers.values():
                self.runtime.views[layer.number] = layer.bind()
                with self.runtime.layer(layer.number, mode=mode):
                    pass  # what the layer shows is made now, not in the first pass
            self._running = True
        except BaseException:
            self.cleanup()
            raise

    def _require_served(self, model: torch.nn.Module) -> None:
        """Raise `ConfigError` if some experts of ``model`` would be read past this manager."""
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        if type(model).__module__ in _OWN_KERNELS:
            raise ConfigError(f"{type(model).__name__} runs its experts by kernels of its own, which DWDP cannot serve")
        adopted = {id(layer.module) for layer in self._layers.values()}
        for name, module in model.named_modules():
            if isinstance(module, FusedMoE) and id(module) not in adopted:
                raise ConfigError(f"{name} was constructed before vmm-dwdp was loaded, so its experts cannot be spread")

    def prefetch_first_layers(self) -> None:
        """A pass begins. The first layers are already being fetched, unless the last pass ended early."""
        self.runtime.reset()

    def wait_prefetch(self, layer_idx: int) -> None:
        """Nothing: SGLang's forward pass calls it before tokens are dispatched, and weights are read in `apply`."""

    def record_compute_and_prefetch_next(self, layer_idx: int) -> None:
        """Nothing: the layer was released after `apply`."""

    def cleanup(self) -> None:
        """Put the layers back to how they were constructed, with empty expert tensors, and free all memory."""
        if self.closed:
            return
        self.closed = True
        self._running = False
        for layer in self._layers.values():
            _unhook(layer)
            layer.restore()
        self._layers.clear()
        self.runtime.close()

    def _replicate(self) -> None:
        """Give every rank all experts of the tensors that are smaller than a page."""
        size = self.runtime.config.group_size
        if size == 1:
            return
        for layer in self._layers.values():
            gathered: list[Any] = [None] * size
            dist.all_gather_object(gathered, (layer.replicated(), layer.maxima()), group=self._group)
            replicated, maxima = zip(*gathered, strict=True)
            for name in replicated[0]:
                layer.set_replicated(name, torch.cat([shard[name] for shard in replicated]))
            for name in maxima[0]:
                layer.set_maximum(name, torch.stack([found[name] for found in maxima]).amax(dim=0))


def _unhook(layer: ExpertLayer) -> None:
    """Let the layer's quantisation method be as its class."""
    for name in ("process_weights_after_loading", "restore_weights_before_loading", "apply"):
        vars(layer.module.quant_method).pop(name, None)

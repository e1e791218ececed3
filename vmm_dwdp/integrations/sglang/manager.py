"""What SGLang calls its DWDP manager, over this library's runtime."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.config import DWDPConfig, Mode
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import shared_experts, sizes
from vmm_dwdp.integrations.sglang.block_order import BlockOrder
from vmm_dwdp.integrations.sglang.expert_layer import ExpertLayer
from vmm_dwdp.integrations.sglang.expert_view import ViewedRuntime
from vmm_dwdp.integrations.sglang.progress import Progress
from vmm_dwdp.integrations.sglang.rows import names_experts
from vmm_dwdp.integrations.sglang.schemes import caution, runner_of, telling_of, without_rows
from vmm_dwdp.integrations.sglang.settings import Stated
from vmm_dwdp.layout.placement import ExpertPlacement

if TYPE_CHECKING:
    from vmm_dwdp.integrations.sglang.metrics import Metrics

_log = logging.getLogger("vmm_dwdp")

# Modules of models that hand expert weights to kernels of their own, past the quantisation method.
_OWN_KERNELS: Final = frozenset({"sglang.srt.models.beam", "sglang.srt.models.qwen4_exp"})


class ExpertManager:
    """The experts of one model, from the construction of its first MoE layer to `cleanup`.

    `adopt` takes every `FusedMoE` as it is constructed, and `begin_loading` follows once all are, before weights are
    loaded. The five methods after them are those that SGLang's forward pass calls on the manager of its own DWDP.

    Args:
        stated: equal on all ranks.
        rank: this process's place in the group.
        group: SGLang's process group of these ranks for host memory; `begin_loading` is collective in it.
        device: where the model is.
        revision: of its checkpoint, on which all ranks must agree; ``None`` if it is not known.
        static_fraction: of a GPU's memory that SGLang gives to weights and the KV cache.
        metrics_of: the rank as SGLang's metrics are to name it; ``None`` if it shows none.
    """

    def __init__(
        self,
        stated: Stated,
        rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
        revision: str | None,
        static_fraction: float,
        metrics_of: int | None = None,
    ) -> None:
        self._stated = stated
        self._rank = rank
        self._group = group
        self._device = device
        self._revision = revision
        self._static_fraction = static_fraction
        self._metrics_of = metrics_of
        self._metrics: Metrics | None = None
        self._driver = open_driver(device)
        self._runtime: ViewedRuntime | None = None
        self._layers: dict[int, ExpertLayer] = {}
        self._running = False
        self._bypassed = False  # whether experts were to be read that were not named
        self._progress: Progress | None = None
        self._order: BlockOrder | None = None  # of a rank that reads in place, from several owners
        self._in_place: dict[int, int] = {}  # the address of each layer's first weight, where it is read so
        self.block_order: BlockOrder | None = None  # for the layer that is read now
        self.closed = False

    @property
    def runtime(self) -> ViewedRuntime:
        """That holds the experts. Raises `ConfigError` before `begin_loading`."""
        if self._runtime is None:
            raise ConfigError(
                "DWDP cannot spread experts that are loaded before SGLang has constructed the whole model"
            )
        return self._runtime

    # -- while the model is constructed and loaded -------------------------------------------------------------------
    def adopt(self, module: Any) -> None:
        """Take over the expert tensors of a `FusedMoE` that was just constructed.

        Raises:
            NotServedError: its weights or its MoE runner are not served; the layer is as it was constructed.
            ConfigError: experts would be read wrongly; the sentence says why.
        """
        number = int(module.layer_id)
        if self._runtime is not None:
            raise ConfigError(f"layer {number} is constructed after the model, so its experts cannot be spread")
        if number in self._layers:
            raise ConfigError(f"two MoE layers have the number {number}; DWDP needs a number of its own for each")
        if module.num_fused_shared_experts and self._stated.config.group_size > 1:
            raise ConfigError("DWDP cannot spread fused shared experts; start with --disable-shared-experts-fusion")
        for layer in self._layers.values():
            if layer.module.num_experts != module.num_experts:
                raise ConfigError(
                    f"DWDP needs as many experts in every MoE layer: layer {layer.number} has "
                    f"{layer.module.num_experts}, layer {number} has {module.num_experts}"
                )
        telling = telling_of(module) if self._stated.config.expert_bank else None
        layer = ExpertLayer(module, self._driver.granularity(), telling=telling)
        cautioned = caution(module) if not self._layers and self._rank == 0 else None
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
        """Undo `adopt`, before `begin_loading`: the layers are as they were constructed."""
        for layer in self._layers.values():
            layer.give_back(self._device)
            _unhook(layer)
        self._layers.clear()
        self.cleanup()

    def begin_loading(self, model: torch.nn.Module) -> None:
        """All layers of ``model`` are constructed: settle how many experts each rank holds, take the memory, and let
        SGLang's loader write into it. Collective. A second call changes nothing. If it raises, the layers are as after
        `cleanup`.

        Raises:
            ConfigError: the experts do not fit, or cannot be spread as stated; or a rank has a part of a shared expert.
            DWDPError: memory could not be had.
        """
        if self._runtime is not None:
            return
        self._leave_out_a_bank_that_nobody_reads()
        try:
            if self._stated.config.group_size > 1:
                shared_experts.require_whole(model)
            with torch.device("cpu"):  # the default, for what is made here, is that of the model
                self._runtime = ViewedRuntime(
                    self._config(), self._rank, self._device, self._group, driver=self._driver
                )
            for layer in self._layers.values():
                layer.load(self._runtime)
        except BaseException:
            self.cleanup()
            raise

    def _leave_out_a_bank_that_nobody_reads(self) -> None:
        """Which would take memory for nothing."""
        if self._stated.config.expert_bank and not any(layer.telling for layer in self._layers.values()):
            if self._rank == 0:
                _log.warning(without_rows(next(iter(self._layers.values())).module))
            self._stated = replace(self._stated, config=replace(self._stated.config, expert_bank=0))

    def _config(self) -> DWDPConfig:
        stated = self._stated
        if not stated.is_open:
            return stated.config
        weights = {number: layer.weights() for number, layer in self._layers.items()}
        page = self._driver.granularity()
        where = (self._rank, page, self._device, self._static_fraction, self._group)
        found = sizes.settled(stated, weights, *where)
        if self._rank == 0:
            total = next(iter(self._layers.values())).module.num_experts
            held = len(ExpertPlacement(total, found).experts(0))
            _log.info("of %d experts each rank holds %d, and host memory %d", total, held, found.host_experts)
        return found

    def require_loadable(self, module: Any, *, at_once: bool) -> None:
        """Raise `ConfigError` if SGLang's loader would put what it has for ``module`` into a wrong place.

        Args:
            at_once: whether it is given a rank's experts together, as the model has cut them out of the checkpoint.
        """
        config = self.runtime.config
        unequal = config.host_experts > 0 or config.num_local_experts is not None
        if at_once and config.group_size > 1 and unequal:
            raise ConfigError(
                f"layer {module.layer_id} is loaded by equal shares of its experts, as the model cuts them out of the "
                "checkpoint: with --dwdp-size there can be no host_experts and no num_local_experts"
            )

    def _apply(self, of: ExpertLayer, apply: Any, layer: Any, dispatch_output: Any) -> Any:
        """Around the quantisation method's `apply`, which every path that runs a layer's experts calls: the forward
        pass, deferred finalisation, and models that call it themselves. Here the number of tokens is known."""
        if not self._running:
            return apply(layer=layer, dispatch_output=dispatch_output)
        with self.runtime.layer(of.number, tokens=len(dispatch_output.hidden_states), top_k=of.module.top_k):
            if self._order is not None:
                in_place = self.runtime.views[of.number].address == self._in_place[of.number]
                self.block_order = self._order if in_place else None
            if of.telling is None or not self._names_experts(dispatch_output.topk_output):
                return apply(layer=layer, dispatch_output=dispatch_output)
            with of.telling.told(dispatch_output, partial(self.runtime.look_up, of.number)) as told:
                return apply(layer=layer, dispatch_output=told)

    def _names_experts(self, topk_output: Any) -> bool:
        """Whether experts can be looked up in the bank. If not, they are read in place, which is said once."""
        if names_experts(topk_output):
            return True
        if not self._bypassed:
            self._bypassed = True
            _log.warning(
                "experts are read in place without a bank: SGLang's %s does not say which ones tokens chose",
                type(topk_output).__name__,
            )
        return False

    def of_experts(self, shape: Sequence[int]) -> Sequence[int]:
        """Of weights that a kernel of these layers reads, without rows of a bank: what its tiles are chosen by."""
        num_experts = next(iter(self._layers.values())).num_experts
        return shape if shape[0] <= num_experts else (num_experts, *shape[1:])

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
            runtime = self.runtime
            for layer in self._layers.values():
                layer.finish()
            self._replicate()
            runtime.publish(revision=self._revision)
            mode: Mode = "in_place" if runtime.config.reads_in_place else "staged"
            for layer in self._layers.values():
                runtime.views[layer.number] = layer.bind()
                with runtime.layer(layer.number, mode=mode):  # what it shows is made now, not in the first pass
                    self._in_place[layer.number] = runtime.views[layer.number].address
                    if layer.telling is not None:
                        nobody = torch.full((1, layer.module.top_k or 1), -1, dtype=torch.int32, device=runtime.device)
                        runtime.look_up(layer.number, nobody)
            self._order = self._block_order()
            self._progress = Progress(runtime.stats)
            if self._metrics_of is not None:
                from vmm_dwdp.integrations.sglang.metrics import Metrics  # not before: see there

                self._metrics = Metrics(self._metrics_of, runtime.stats)
            self._running = True
        except BaseException:
            self.cleanup()
            raise

    def _block_order(self) -> BlockOrder | None:
        placement = ExpertPlacement(next(iter(self._layers.values())).num_experts, self.runtime.config)
        runners = {runner_of(layer.module) for layer in self._layers.values()}
        if not self.runtime.config.reads_in_place or len(placement.owners) == 1 or runners != BlockOrder.RUNNERS:
            return None
        bank = self.runtime.stats().bank
        return BlockOrder(placement, self._rank, bank.rows.values() if bank else (), self._device)

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
        said = None if self._progress is None else self._progress.line()
        if said is not None:
            _log.info("DWDP, rank %d: %s", self._rank, said)
        if self._metrics is not None:
            self._metrics.write()

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
        if self._runtime is not None:
            self._runtime.close()

    def _replicate(self) -> None:
        """Give every rank all experts of the tensors that are smaller than a page."""
        size = self.runtime.config.group_size
        if size == 1:
            return
        for layer in self._layers.values():
            gathered: list[Any] = [None] * size
            dist.all_gather_object(gathered, (layer.loads, layer.replicated(), layer.maxima()), group=self._group)
            loads, replicated, maxima = zip(*gathered, strict=True)
            for name in replicated[0]:
                shards = {
                    expert: shard[name][place]
                    for held, shard in zip(loads, replicated, strict=True)
                    for place, expert in enumerate(held)
                }
                layer.set_replicated(name, torch.stack([shards[expert] for expert in range(len(shards))]))
            for name in maxima[0]:
                layer.set_maximum(name, torch.stack([found[name] for found in maxima]).amax(dim=0))


def _unhook(layer: ExpertLayer) -> None:
    """Let the layer's quantisation method be as its class."""
    for name in ("process_weights_after_loading", "restore_weights_before_loading", "apply"):
        vars(layer.module.quant_method).pop(name, None)

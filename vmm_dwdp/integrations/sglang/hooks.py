"""The hooks into SGLang: what runs around its functions once the plugin is registered.

SGLang logs and swallows an exception of a plugin, and goes on with its own DWDP. So nothing is refused while the plugin
registers: refusals are raised inside hooked functions, where the caller sees them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import arguments, contract, graphs, remedies, rows, settings, shared_experts
from vmm_dwdp.integrations.sglang.expert_layer import NO_UPDATES
from vmm_dwdp.integrations.sglang.manager import ExpertManager
from vmm_dwdp.integrations.sglang.schemes import NotServedError, scheme_of

_log = logging.getLogger("vmm_dwdp")

_Original = Callable[..., Any]

_NO_EXPORTS = (
    "the weights of a running model cannot be saved, sent or checked while DWDP spreads its experts; do it without DWDP"
)

_standing: set[str] = set()  # what is hooked besides what `register` hooks
_standing_lock = threading.Lock()
_manager: ExpertManager | None = None
_left_to_sglang = False  # whether SGLang's own DWDP is to take the model that is being constructed


def register() -> None:
    """The plugin: SGLang calls it once in every process.

    Until an engine turns out to have arguments of ours, only what finds that out is hooked: where arguments are
    checked, and on a rank where its model is constructed.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if settings.disabled():
        return
    check = contract.check_arguments()
    if check is not None:
        HookRegistry.register(check, check_arguments, HookType.AROUND)
    elif settings.wanted(dwdp_size=1):
        # No Exception: SGLang would swallow it and start with the experts on the GPU.
        raise SystemExit(_not_known(contract.difference()))
    if contract.tells_ranks():
        HookRegistry.register(contract.CONSTRUCT_MODEL, construct_model, HookType.AROUND)


def _not_known(difference: str | None) -> str:
    return (
        f"vmm-dwdp does not know this SGLang ({contract.version()}): {difference}. Use a version that it was tested "
        f"with, or set {settings.DISABLE}=1 for SGLang's own DWDP"
    )


def _require_known() -> None:
    difference = contract.difference()
    if difference is not None:
        raise ConfigError(_not_known(difference))


def hook_model() -> None:
    """If experts are to be spread, let the hooks of such a model stand in this process from now on.

    A second call changes nothing.

    Raises:
        ConfigError: this SGLang is not known.
    """
    dwdp_size = _active_dwdp_size()
    if not settings.wanted(dwdp_size):
        return
    _require_known()
    hooks: dict[str, _Original] = {
        contract.fused_moe("__init__"): construct_layer,
        contract.CHOOSE_TILES: choose_tiles,
        contract.ALIGN_BLOCKS: align_blocks,
        contract.ALIGN_ONE_TOKEN: rows.tell_blocks,
        contract.fused_moe("weight_loader"): load_weight,
        contract.fused_moe("weight_loader_fused"): load_weights_at_once,
        contract.INIT_DWDP: init_dwdp,
    }
    hooks |= dict.fromkeys(contract.updates(), update_weights)
    hooks |= dict.fromkeys(contract.SEND, send_weights)
    hooks |= dict.fromkeys((*contract.SAVE, contract.CHECK_WEIGHTS), read_weights)
    hooks |= dict.fromkeys(contract.begin_session(), begin_session)
    hooks |= dict.fromkeys(contract.session(), prepare_session)
    if dwdp_size > 1:  # each rank has tokens of its own
        hooks |= dict.fromkeys(contract.LINEARS, shared_experts.construct_linear)
        hooks |= {contract.SUM_OVER_RANKS: shared_experts.sum_over_ranks, contract.IS_LOCAL: graphs.is_local}
    _hook(hooks)


def _hook(hooks: dict[str, _Original]) -> None:
    """SGLang's registry applies what is registered while plugins are loaded; this is later, and raises what it logs."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    with _standing_lock:
        for path, hook in hooks.items():
            if path not in _standing:
                HookRegistry._apply_target(path, [(HookType.AROUND, hook, HookSource("vmm_dwdp", "vmm-dwdp"))])
                _standing.add(path)


def manager() -> ExpertManager | None:
    """The manager of the model that is being constructed or runs in this process."""
    return None if _manager is None or _manager.closed else _manager


def _are_spread() -> bool:
    """Whether experts are spread, by us or by SGLang's own DWDP: its tensors have some experts' bytes only."""
    from sglang.srt.runtime_context import get_global_dwdp_manager

    return manager() is not None or get_global_dwdp_manager() is not None


def check_arguments(original: _Original, server_args: Any) -> Any:
    """Around SGLang's check of its arguments, in the process that starts the engine: refuse before memory is taken."""
    dwdp_size = _dwdp_size(server_args)
    if not settings.wanted(dwdp_size):
        return original(server_args)
    _require_known()
    _hook({contract.CHECK_FINAL_ARGUMENTS: check_final_arguments})
    config = settings.stated(dwdp_size).config
    arguments.check(server_args, dwdp_size)
    # A fused one would be one of those that are spread.
    arguments.change(server_args, "disable_shared_experts_fusion", True)
    decode_graphs = graphs.are_left_on(arguments.view(server_args), config)
    if dwdp_size <= 1 or decode_graphs:
        arguments.change(server_args, "disable_prefill_cuda_graph", True)  # in pieces; a pass is captured whole
    found = original(server_args)
    if decode_graphs:
        arguments.change(server_args, "disable_cuda_graph", False)
    return found


def check_final_arguments(original: _Original, server_args: Any) -> None:
    """Around the last of SGLang's checks in the same process, which itself still changes some: refuse what is new, and
    say what will not be served, as far as it can be known now."""
    original(server_args)
    dwdp_size = _dwdp_size(server_args)
    if not settings.wanted(dwdp_size):
        return
    if contract.version() not in contract.TESTED:
        _log.warning("vmm-dwdp was tested with SGLang %s, not %s", ", ".join(contract.TESTED), contract.version())
    arguments.check(server_args, dwdp_size)
    arguments.check_graphs(server_args)
    runner = arguments.runner_for_gpt_oss(server_args) if dwdp_size > 1 else None
    if runner is not None:
        arguments.change(server_args, "moe_runner_backend", runner)
        _log.info("gpt-oss: --moe-runner-backend %s, as on one GPU, since with DWDP every rank has all experts", runner)
    not_served = arguments.foretold(server_args)
    if not_served is not None:
        if dwdp_size <= 1:
            raise ConfigError(remedies.refusal(not_served, server_args))
        _log.warning(remedies.fallback(not_served))


def construct_layer(original: _Original, module: Any, *args: Any, **kwargs: Any) -> None:
    """Around `FusedMoE.__init__`: the layer's expert tensors go to the manager before the next layer takes memory.

    All ranks construct the same layers, so all come to the same answer whether a layer is served.
    """
    original(module, *args, **kwargs)
    if _left_to_sglang or not settings.wanted(_active_dwdp_size()):
        return
    try:
        scheme_of(module)  # before a device is opened for it
        _current_manager().adopt(module)
    except NotServedError as not_served:
        _leave_to_sglang(not_served)


def _leave_to_sglang(not_served: NotServedError) -> None:
    """Give back the layers that were taken over; SGLang's own DWDP takes all of them, once they are loaded.

    Raises:
        ConfigError: SGLang has no way of its own, since experts were to be in host memory.
    """
    global _left_to_sglang
    from sglang.srt.runtime_context import get_parallel, get_server_args

    found, server_args, dwdp_size = manager(), get_server_args(), _active_dwdp_size()
    arguments.check(server_args, dwdp_size)  # with these, SGLang's own would read wrong bytes, too
    if dwdp_size <= 1:
        if found is not None:
            found.cleanup()
        raise ConfigError(remedies.refusal(not_served, server_args))
    if found is not None:
        found.give_back()
    graphs.switch_off()
    _left_to_sglang = True
    if get_parallel().tp_rank == 0 and arguments.foretold(server_args) is None:
        _log.warning(remedies.fallback(not_served))


def init_dwdp(original: _Original, model_runner: Any) -> None:
    """Around `ModelRunner.maybe_init_dwdp`: our manager instead of SGLang's."""
    global _left_to_sglang
    from sglang.srt.runtime_context import set_global_dwdp_manager

    if model_runner.is_draft_worker or not settings.wanted(_active_dwdp_size()):
        original(model_runner)
        return
    if _left_to_sglang:
        _left_to_sglang = False  # the next model may be another
        original(model_runner)
        return
    found = manager()
    if found is None:
        model = type(model_runner.model).__name__
        raise ConfigError(f"{model} has no MoE layers, so DWDP has nothing to spread; start without it")
    set_global_dwdp_manager(found)
    found.setup(model_runner.model)


def construct_model(original: _Original, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Around what constructs a model for whatever loads it then."""
    hook_model()
    model: torch.nn.Module = original(*args, **kwargs)
    found = manager()
    if found is not None:
        found.begin_loading(model)
    elif _left_to_sglang:  # whose own DWDP skips the sum as well, and would have fused them but for us
        shared_experts.require_whole(model)
    return model


def choose_tiles(original: _Original, w1_shape: Any, w2_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what chooses the tiles of SGLang's Triton kernels by the shapes of weights: those of the experts."""
    found = manager()
    if found is not None:
        w1_shape, w2_shape = found.of_experts(w1_shape), found.of_experts(w2_shape)
    return original(w1_shape, w2_shape, *args, **kwargs)


def align_blocks(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around what sorts tokens by expert for SGLang's grouped products, which go through experts in that order."""
    found = manager()
    order = None if found is None else found.block_order
    return rows.tell_blocks(original if order is None else partial(order.align, original), *args, **kwargs)


def load_weight(original: _Original, module: Any, *args: Any, **kwargs: Any) -> None:
    """Around the loader of `FusedMoE` for one expert, or for all that the model has cut out for this rank."""
    expert_id = kwargs["expert_id"] if "expert_id" in kwargs else args[4]
    _require_loadable(module, at_once=expert_id is None)
    original(module, *args, **kwargs)


def load_weights_at_once(original: _Original, module: Any, *args: Any, **kwargs: Any) -> None:
    """Around its loader for all of them."""
    _require_loadable(module, at_once=True)
    original(module, *args, **kwargs)


def _require_loadable(module: Any, *, at_once: bool) -> None:
    """Once layers read assembled tensors, nobody may write to them."""
    found = manager()
    if found is None:
        return
    if module._dwdp_bound:
        raise ConfigError(NO_UPDATES)
    found.require_loadable(module, at_once=at_once)


def update_weights(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's weight updates, which answer whether they succeeded and why not."""
    if manager() is not None:
        return False, NO_UPDATES
    return original(*args, **kwargs)


def begin_session(original: _Original, updater: Any, request: Any) -> Any:
    """Around SGLang's answer to the request for a session of updates."""
    if not _are_spread():
        return original(updater, request)
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    return BeginWeightUpdateReqOutput(success=False, message=NO_UPDATES)


def prepare_session(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around what undoes post-processing of the whole model for a session, and does it again after it."""
    if _are_spread():
        raise ConfigError(NO_UPDATES)
    return original(*args, **kwargs)


def send_weights(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around what sends weights to another engine, and answers whether it did and why not."""
    if _are_spread():
        return False, _NO_EXPORTS
    return original(*args, **kwargs)


def read_weights(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around what reads the weights of the whole model, or overwrites them, where SGLang passes an exception on."""
    if _are_spread():
        raise ConfigError(_NO_EXPORTS)
    return original(*args, **kwargs)


def _current_manager() -> ExpertManager:
    global _manager
    found = manager()
    if found is None:
        from sglang.srt.runtime_context import get_parallel, get_server_args

        dwdp_size = _active_dwdp_size()
        server_args = get_server_args()
        arguments.check(server_args, dwdp_size)
        stated, revision = settings.stated(dwdp_size), arguments.revision(server_args)
        # The ranks between which SGLang divides experts: with tensor parallelism alone, each has a part of every one.
        rank, group = get_parallel().moe_ep_rank, get_parallel().moe_ep_group.cpu_group
        fraction = arguments.static_fraction(server_args)
        # SGLang's own place of the rank: without --dwdp-size each may be the only one that divides whole experts.
        metrics_of = get_parallel().tp_rank if arguments.shows_metrics(server_args) else None
        found = _manager = ExpertManager(stated, rank, group, _device(), revision, fraction, metrics_of)
    return found


def _device() -> torch.device:
    """The device on which the model is being constructed: SGLang's default device at that time."""
    return torch.empty(0).device


def _dwdp_size(server_args: Any) -> int:
    return int(getattr(server_args, "dwdp_size", 1) or 1)


def _active_dwdp_size() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(getattr(get_parallel(), "dwdp_size", 1))  # an SGLang without DWDP has none

"""The hooks into SGLang: what runs around its functions once the plugin is registered.

SGLang logs and swallows an exception of a plugin, and goes on with its own DWDP. So nothing is refused while the plugin
registers: refusals are raised inside hooked functions, where the caller sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import contract, settings
from vmm_dwdp.integrations.sglang.manager import ExpertManager

_Original = Callable[..., Any]

# Arguments of the engine with which expert weights would move, be shared out otherwise or be read by another path, and
# the value with which they do nothing.
_EXCLUDED: dict[str, Any] = {
    "enable_eplb": False,
    "enable_two_batch_overlap": False,
    "enable_single_batch_overlap": False,
    "enable_memory_saver": False,
    "enable_lora": None,
    "enable_paged_experts": False,
    "speculative_algorithm": None,
    "cpu_offload_gb": 0,
    "offload_group_size": -1,
    "pp_size": 1,
}

_manager: ExpertManager | None = None


def register() -> None:
    """The plugin: SGLang calls it once in every process."""
    if settings.disabled():
        return
    difference = contract.difference()
    if difference is None:
        _register_all()
    else:
        _register_refusal(difference)


def _register_all() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    arguments = contract.check_arguments()
    assert arguments is not None
    hooks: dict[str, _Original] = {
        arguments: check_arguments,
        contract.fused_moe("__init__"): construct_layer,
        contract.fused_moe("weight_loader"): load_weight,
        contract.fused_moe("weight_loader_fused"): load_weight,
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_init_dwdp": init_dwdp,
    }
    hooks |= dict.fromkeys(contract.updates(), update_weights)
    for path, hook in hooks.items():
        HookRegistry.register(path, hook, HookType.AROUND)


def _register_refusal(difference: str) -> None:
    """Make starting an engine with DWDP fail, by whatever of SGLang can still be hooked."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    sentence = (
        f"vmm-dwdp does not know this SGLang ({contract.version()}): {difference}. Use a version that it was tested "
        f"with, or set {settings.DISABLE}=1 for SGLang's own DWDP"
    )

    def refuse(original: _Original, *args: Any, **kwargs: Any) -> Any:
        if settings.wanted(_dwdp_size(args[0])):
            raise ConfigError(sentence)
        return original(*args, **kwargs)

    path = contract.check_arguments()
    if path is not None:
        HookRegistry.register(path, refuse, HookType.AROUND)
    elif settings.wanted(dwdp_size=1):
        raise SystemExit(sentence)  # no Exception: SGLang would swallow it and start with the experts on the GPU


def manager() -> ExpertManager | None:
    """The manager of the model that is being constructed or runs in this process."""
    return None if _manager is None or _manager.closed else _manager


def check_arguments(original: _Original, server_args: Any) -> Any:
    """Around SGLang's check of its arguments, in the process that starts the engine: refuse before memory is taken."""
    dwdp_size = _dwdp_size(server_args)
    if not settings.wanted(dwdp_size):
        return original(server_args)
    settings.config(dwdp_size)
    for name, neutral in _EXCLUDED.items():
        value = getattr(server_args, name, neutral)
        if value not in (neutral, None, False):
            raise ConfigError(f"DWDP cannot be used with {name}={value!r}")
    if dwdp_size <= 1:
        for name in ("tp_size", "dp_size", "ep_size"):
            if getattr(server_args, name, 1) > 1:
                raise ConfigError(f"experts in host memory without --dwdp-size are for one GPU, not for {name} above 1")
        _set_argument(server_args, "disable_prefill_cuda_graph", True)  # captured in pieces; a pass is captured whole
    return original(server_args)


def construct_layer(original: _Original, module: Any, *args: Any, **kwargs: Any) -> None:
    """Around `FusedMoE.__init__`: the layer's expert tensors go to the manager before the next layer takes memory."""
    original(module, *args, **kwargs)
    if settings.wanted(_active_dwdp_size()):
        _current_manager().adopt(module)


def init_dwdp(original: _Original, model_runner: Any) -> None:
    """Around `ModelRunner.maybe_init_dwdp`: our manager instead of SGLang's."""
    from sglang.srt.runtime_context import set_global_dwdp_manager

    if model_runner.is_draft_worker or not settings.wanted(_active_dwdp_size()):
        original(model_runner)
        return
    found = manager()
    if found is None:
        model = type(model_runner.model).__name__
        raise ConfigError(f"{model} has no MoE layers, so DWDP has nothing to spread; start without it")
    set_global_dwdp_manager(found)
    found.setup(model_runner.model)


def load_weight(original: _Original, module: Any, *args: Any, **kwargs: Any) -> None:
    """Around the loaders of `FusedMoE`: once layers read assembled tensors, nobody may write to them."""
    if module._dwdp_bound:
        raise ConfigError(_no_updates())
    original(module, *args, **kwargs)


def update_weights(original: _Original, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's weight updates, which answer whether they succeeded and why not."""
    if manager() is not None:
        return False, _no_updates()
    return original(*args, **kwargs)


def _no_updates() -> str:
    return "the weights of a running model cannot be updated while DWDP spreads its experts; restart with the new ones"


def _current_manager() -> ExpertManager:
    global _manager
    found = manager()
    if found is None:
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        dwdp_size = _active_dwdp_size()
        rank = parallel.tp_rank if dwdp_size > 1 else 0
        found = _manager = ExpertManager(settings.config(dwdp_size), rank, parallel.tp_group.cpu_group, _device())
    return found


def _device() -> torch.device:
    """The device on which the model is being constructed: SGLang's default device at that time."""
    return torch.empty(0).device


def _dwdp_size(server_args: Any) -> int:
    return int(getattr(server_args, "dwdp_size", 1) or 1)


def _set_argument(server_args: Any, name: str, value: object) -> None:
    """Change an argument while SGLang resolves them: later versions record a change instead of making it."""
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution
    except ImportError:
        setattr(server_args, name, value)
    else:
        declare_resolution(server_args, "vmm_dwdp", **{name: value})


def _active_dwdp_size() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dwdp_size)

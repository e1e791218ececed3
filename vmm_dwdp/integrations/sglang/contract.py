"""What this integration relies on inside SGLang, checked before anything is changed."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"
_MAP = "_map_global_expert_id_to_local_expert_id"  # to a place among a rank's experts; its layers get their own
_COMPONENTS = "sglang.srt.model_executor.model_runner_components"
_WEIGHT_UPDATER = f"{_COMPONENTS}.weight_updater.WeightUpdater"
_WEIGHT_EXPORTER = f"{_COMPONENTS}.weight_exporter.WeightExporter"

TESTED = ("0.5.17", "0.5.20", "0.5.22", "0.5.23")  # the versions with which this integration's tests run

# Where the arguments are checked, in the process that starts the engine: 0.5.23, 0.5.17.
_CHECK_ARGUMENTS = (
    "sglang.srt.arg_groups.parallel_hook.handle_dwdp",
    "sglang.srt.server_args.ServerArgs._handle_dwdp",
)
# What gives the config of the checkpoint that an engine's arguments name: 0.5.23, 0.5.17.
_MODEL_CONFIG = (
    "sglang.srt.arg_groups.model_override_base.model_config_of",
    "sglang.srt.server_args.ServerArgs.get_model_config",
)
CHECK_FINAL_ARGUMENTS = "sglang.srt.server_args.ServerArgs.check_server_args"  # what the engine calls last of all
CONSTRUCT_MODEL = "sglang.srt.model_loader.loader._initialize_model"  # what every loader calls before it loads
# What sorts tokens by expert, in blocks, for SGLang's Triton kernels and Marlin; and one token's experts for Marlin.
ALIGN_BLOCKS = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.moe_align_block_size"
ALIGN_ONE_TOKEN = "sglang.kernels.ops.moe.moe_align_single_token.moe_align_single_token"
INIT_DWDP = "sglang.srt.model_executor.model_runner.ModelRunner.maybe_init_dwdp"
CHOOSE_TILES = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.try_get_optimal_moe_config"
# The constructors of linear layers that may be cut over ranks, and the sum over all of them in a pass.
LINEARS = tuple(
    f"sglang.srt.layers.linear.{name}.__init__"
    for name in ("ColumnParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear")
)
# Whether a rank's decode graphs are chosen by its own batch alone.
IS_LOCAL = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._forward_is_dp_local"
_WHOLE: tuple[dict[str, Any], ...] = ({"parallel_group": "replicated"}, {"tp_rank": 0, "tp_size": 1})  # 0.5.23, 0.5.17
_PARALLEL = "sglang.srt.runtime_context.get_parallel"  # whose dwdp_size every process of an engine has
SUM_OVER_RANKS = "sglang.srt.distributed.communication_op.tensor_model_parallel_all_reduce"
CHECK_WEIGHTS = "sglang.srt.utils.weight_checker.WeightChecker.handle"
SAVE = (f"{_WEIGHT_EXPORTER}.save_sharded_model", f"{_WEIGHT_EXPORTER}.save_remote_model")
SEND = (
    f"{_WEIGHT_EXPORTER}.init_weights_send_group_for_remote_instance",
    f"{_WEIGHT_EXPORTER}.send_weights_to_remote_instance",
)
# Sessions of updates, since 0.5.23: what answers to the request for one, and what then does the work.
_BEGIN_SESSION = (
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.begin_weight_update"
)
_SESSION = (f"{_WEIGHT_UPDATER}.begin_weight_update", f"{_WEIGHT_UPDATER}.end_weight_update")
_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "update_weights_from_distributed",  # 0.5.17
    "load_weights_from_distributed",  # 0.5.23
)


@dataclass(frozen=True)
class _Expected:
    """A function of SGLang: parameters that it must have, and names that its body must use."""

    path: str
    parameters: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


_EXPECTED = (
    _Expected(f"{_FUSED_MOE}.__init__", ("num_experts", "layer_id", "num_fused_shared_experts"), ("create_weights",)),
    _Expected(f"{_FUSED_MOE}.bind_full_expert_weights", ("weights",), ("_dwdp_bound", "replace_expert_tensor")),
    _Expected(
        f"{_FUSED_MOE}.forward_impl",
        (),
        ("_dwdp_bound", "wait_prefetch", "run_moe_core", "record_compute_and_prefetch_next"),
    ),
    _Expected(f"{_FUSED_MOE}.run_moe_core", ("dispatch_output",), ("quant_method", "apply")),
    _Expected(f"{_FUSED_MOE}.weight_loader", ("param", "expert_id"), (_MAP, "_weight_loader_impl")),
    _Expected(f"{_FUSED_MOE}.{_MAP}", ("expert_id",)),
    _Expected(CONSTRUCT_MODEL),
    _Expected(CHOOSE_TILES, ("w1_shape", "w2_shape")),
    _Expected(ALIGN_BLOCKS, ("topk_ids", "block_size", "num_experts")),
    _Expected(ALIGN_ONE_TOKEN, ("topk_ids", "block_size")),
    *(_Expected(path, ("prefix",)) for path in LINEARS),
    _Expected(LINEARS[-1], (), ("input_size_per_partition",)),
    _Expected(SUM_OVER_RANKS),
    _Expected(IS_LOCAL, ("model_runner",)),
    _Expected(f"{_FUSED_MOE}.weight_loader_fused", ("param",), ()),
    _Expected(INIT_DWDP, (), ("DwdpManager", "set_global_dwdp_manager", "setup")),
    _Expected("sglang.srt.plugins.hook_registry.HookRegistry._apply_target", ("target", "hooks")),
    _Expected(_PARALLEL),
    _Expected(CHECK_FINAL_ARGUMENTS),
    _Expected(CHECK_WEIGHTS, ("action",)),
    *(_Expected(path) for path in (*SAVE, *SEND)),
    _Expected("sglang.srt.runtime_context.get_server_args"),
    _Expected("sglang.srt.arg_groups.overrides.resolved_view", ("server_args",)),
    _Expected("sglang.srt.runtime_context.get_global_dwdp_manager"),
    _Expected("sglang.srt.runtime_context.set_global_dwdp_manager", ("manager",), ()),
    _Expected("sglang.srt.distributed.parallel_state.destroy_model_parallel", (), ("cleanup",)),
)


def version() -> str:
    """SGLang's version, or ``unknown``."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def difference() -> str | None:
    """The first thing in which the installed SGLang differs from what this integration was written for."""
    for expected in _EXPECTED:
        try:
            function = inspect.unwrap(pkgutil.resolve_name(expected.path))
        except (ImportError, AttributeError) as error:
            return f"{expected.path} cannot be used ({error})"
        missing = set(expected.parameters) - set(inspect.signature(function).parameters)
        if missing:
            return f"{expected.path} has no parameter {min(missing)}"
        unused = set(expected.names) - set(_names_in(function.__code__))
        if unused:
            return f"{expected.path} does not use {min(unused)}"
    for either in (_CHECK_ARGUMENTS, _MODEL_CONFIG):
        if not any(map(_exists, either)):
            return f"neither {' nor '.join(either)} exists"
    for path in LINEARS:
        if whole(pkgutil.resolve_name(path)) is None:
            return f"{path} has no parameter that keeps it whole"
    if not updates():
        return f"{_WEIGHT_UPDATER} has none of {', '.join(_UPDATES)}"
    return None


def check_arguments() -> str | None:
    """The path of the function that checks the engine's arguments, if there is one."""
    return next((path for path in _CHECK_ARGUMENTS if _exists(path)), None)


def tells_ranks() -> bool:
    """Whether a rank is told where its model is constructed, and by which arguments of its engine."""
    return _exists(CONSTRUCT_MODEL) and _exists(_PARALLEL)


def model_config(server_args: Any) -> Any:
    """SGLang's config of the checkpoint that the arguments name."""
    path = next(path for path in _MODEL_CONFIG if _exists(path))
    return pkgutil.resolve_name(path)(server_args)


def whole(linear: Callable[..., None]) -> dict[str, Any] | None:
    """The arguments with which the constructor of a linear layer does not cut it over ranks."""
    accepted = inspect.signature(linear).parameters
    return next((each for each in _WHOLE if set(each) <= set(accepted)), None)


def updates() -> list[str]:
    """The paths of the methods that write new weights into a running model."""
    paths = [f"{_WEIGHT_UPDATER}.{name}" for name in _UPDATES]
    return [path for path in paths if _exists(path)]


def begin_session() -> list[str]:
    """The path of the method that answers to the request for a session of updates, if this SGLang has sessions."""
    return [path for path in (_BEGIN_SESSION,) if _exists(path)]


def session() -> list[str]:
    """The paths of the methods that undo post-processing for a session and do it again after it, if there are any."""
    return [path for path in _SESSION if _exists(path)]


def fused_moe(method: str) -> str:
    """The path of a method of `FusedMoE`."""
    return f"{_FUSED_MOE}.{method}"


def _exists(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def _names_in(code: Any) -> set[str]:
    nested = (constant for constant in code.co_consts if inspect.iscode(constant))
    return {*code.co_names, *(name for inner in nested for name in _names_in(inner))}

"""One process of an SGLang engine without its server: SGLang's plugins, arguments, groups and MoE configuration."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vmm_dwdp.integrations.sglang import hooks, settings

MODEL = Path(__file__).parent / "qwen3_moe"  # a small Qwen3-MoE: its config, no weights
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def server_args(**arguments: Any) -> Any:
    """SGLang's own arguments of an engine on this machine's device."""
    from sglang.srt.server_args import ServerArgs

    stated = {"moe_runner_backend": "triton", "attention_backend": "triton" if DEVICE == "cuda" else None}
    stated |= {"load_format": "dummy", **arguments}
    return ServerArgs(model_path=str(MODEL), device=DEVICE, skip_tokenizer_init=True, **stated)


def start(rank: int, size: int, port: int) -> None:
    """Become rank ``rank`` of an engine with ``size`` ranks, as far as a model can be constructed in it.

    Plugins are found by SGLang's own loader. ``size`` above 1 means ``--dwdp-size``.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.distributed import parallel_state

    os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # NCCL refuses ranks that share a GPU
    parallel_state.set_custom_all_reduce(False)
    use_runner("triton", rank, size)
    parallel_state.init_distributed_environment(
        world_size=size,
        rank=rank,
        local_rank=0,  # on a machine with one GPU all ranks share it
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    widths = {"tensor_model_parallel_size": size, "expert_model_parallel_size": size}  # 0.5.17; later as published
    accepted = inspect.signature(parallel_state.initialize_model_parallel).parameters
    parallel_state.initialize_model_parallel(
        backend="gloo", **{name: value for name, value in widths.items() if name in accepted}
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(DEVICE)


def use_runner(backend: str, rank: int, size: int) -> None:
    """Let layers that are constructed from now on use this MoE runner."""
    publish(server_args(tp_size=size, dwdp_size=size, moe_runner_backend=backend), rank)


def publish(stated: Any, rank: int) -> None:
    """Let these be the engine's arguments, for layers that are constructed from now on, also by a test itself."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe import initialize_moe_config

    if hasattr(runtime_context, "SpawnRanks"):  # 0.5.23
        placement = {"ranks": runtime_context.SpawnRanks(world_rank=rank, gpu_id=0)}
    else:
        placement = {}
    runtime_context.publish(stated, role="test", **placement)
    initialize_moe_config(*([stated] if inspect.signature(initialize_moe_config).parameters else []))
    if not settings.disabled():
        hooks.hook_model()


def init_dwdp(model: torch.nn.Module) -> Any:
    """What a `ModelRunner` does once its model is loaded; returns the manager that SGLang now has, if any."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    ModelRunner.maybe_init_dwdp(SimpleNamespace(is_draft_worker=False, model=model, server_args=None))
    return manager()


def manager() -> Any:
    """SGLang's, if it has any."""
    from sglang.srt.runtime_context import get_global_dwdp_manager

    return get_global_dwdp_manager()


def shut_down() -> None:
    """What SGLang does with its manager at the end."""
    from sglang.srt.runtime_context import set_global_dwdp_manager

    manager().cleanup()
    set_global_dwdp_manager(None)


def end_of_model() -> None:
    """Shut down, also where a model failed before SGLang had its manager."""
    from vmm_dwdp.integrations.sglang import hooks

    if manager() is not None:
        shut_down()
    elif (ours := hooks.manager()) is not None:
        ours.cleanup()

"""What of SGLang is another function once this library is installed: where none of its arguments is given, that which
finds out that none is."""

from __future__ import annotations

import importlib
import os
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_process
import experts
from ports import free_port

from vmm_dwdp.integrations.sglang import contract, hooks
from vmm_dwdp.testing import run_group

MODULES = (  # of the process that starts an engine and of a rank, with what they import
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.glm4_moe",
    "sglang.srt.weight_cache.ipc_loader",
)
KINDS = (types.FunctionType, type, staticmethod, classmethod, property)
CHECK = (
    "sglang.srt.server_args.ServerArgs._handle_dwdp"
    if contract.version() == "0.5.17"
    else "sglang.srt.arg_groups.parallel_hook.handle_dwdp"
)
CONSTRUCT = {
    "sglang.srt.model_loader.loader._initialize_model",
    "sglang.srt.weight_cache.ipc_loader._initialize_model",  # the same function, which it imports
}
SPREAD = {  # some of what stands where experts are spread
    "sglang.srt.server_args.ServerArgs.check_server_args",
    "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.__init__",
    "sglang.srt.model_executor.model_runner.ModelRunner.maybe_init_dwdp",
    "sglang.srt.utils.weight_checker.WeightChecker.handle",
}
OVER_RANKS = {  # and some of what does besides where each rank has tokens of its own
    "sglang.srt.distributed.communication_op.tensor_model_parallel_all_reduce",
    "sglang.srt.layers.linear.tensor_model_parallel_all_reduce",
    "sglang.srt.layers.linear.RowParallelLinear.__init__",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._forward_is_dp_local",
}


def attributes() -> dict[str, Any]:
    """Functions, properties and classes by the name under which modules of SGLang and their classes have them."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name != "sglang" and not name.startswith("sglang."):
            continue
        for attribute, value in list(vars(module).items()):
            if not isinstance(value, KINDS):
                continue
            found[f"{name}.{attribute}"] = value
            if isinstance(value, type) and value.__module__ == name:
                own = {f"{name}.{attribute}.{key}": each for key, each in vars(value).items()}
                found |= {key: each for key, each in own.items() if isinstance(each, KINDS)}
    return found


def start(rank: int, *, port: int, environment: dict[str, str], size: int) -> set[str]:
    """Those that are others once an engine's arguments are final, and it has constructed a model of MoE layers."""
    os.environ.update(environment)
    for name in MODULES:
        importlib.import_module(name)
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    plain = attributes()
    assert len(plain) > 10_000
    with patch.object(hooks, "hook_model"):  # which is for tests that construct layers themselves
        engine_process.start(rank, size, port)
    stated = engine_process.server_args(tp_size=size, dwdp_size=size)
    getattr(stated, "resolve_once", lambda: None)()  # 0.5.23; 0.5.17 resolves while constructing
    stated.check_server_args()
    model = SimpleNamespace(constructor=lambda **_: experts.model("bf16"), architecture="of experts")
    with patch.object(loader, "get_model_architecture", lambda _: (model.constructor, model.architecture)):
        loader._initialize_model(ModelConfig(model_path=str(engine_process.MODEL)), LoadConfig())
    ours = hooks.manager()
    if ours is not None:
        ours.cleanup()
    return {name for name, value in attributes().items() if value is not plain.get(name, value) or is_hook(value)}


def is_hook(value: Any) -> bool:
    """Whether SGLang's registry of hooks made it, also in a module that was not there before."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return code is not None and code.co_qualname.startswith("_wrap_fn.")


def others(size: int = 1, **environment: str) -> set[str]:
    [found, *more] = run_group(partial(start, port=free_port(), environment=environment, size=size), size)
    assert all(each == found for each in more)
    return found


def test_without_arguments_of_ours_only_what_finds_that_out_is_another() -> None:
    assert others() == {CHECK, *CONSTRUCT}


def test_disabled_nothing_is() -> None:
    assert others(VMM_DWDP_DISABLE="1") == set()


def test_with_experts_in_host_memory_what_ranks_say_to_each_other_is_sglangs(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 4\n")
    found = others(VMM_DWDP_CONFIG=str(config))
    assert found >= {CHECK, *CONSTRUCT, *SPREAD}
    assert not found & OVER_RANKS


def test_with_dwdp_size_all_stand() -> None:
    assert others(size=2) >= {CHECK, *CONSTRUCT, *SPREAD, *OVER_RANKS}

"""What SGLang does with the plugin, and what it tells a user who asks for something that DWDP cannot do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_process
import experts
import torch
from ports import free_port

from vmm_dwdp import DWDPRuntime, ExchangeError
from vmm_dwdp.integrations.sglang import hooks
from vmm_dwdp.testing import run_group


def sentence(call: Callable[[], Any]) -> str:
    """What the exception says that ``call`` raises, with its type."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# -- the process that starts an engine ---------------------------------------------------------------------------------
def start_engines(rank: int, *, config: str) -> dict[str, str]:
    """What `sglang.Engine` says to arguments that DWDP cannot serve."""
    from sglang.srt.entrypoints.engine import Engine

    def engine(**arguments: Any) -> Callable[[], Any]:
        return partial(Engine, model_path=str(engine_process.MODEL), device="cpu", load_format="dummy", **arguments)

    group = {"tp_size": 2, "dwdp_size": 2}
    told = {
        "lora": sentence(engine(**group, enable_lora=True)),
        "offload": sentence(engine(**group, cpu_offload_gb=4)),
        "memory saver": sentence(engine(**group, enable_memory_saver=True)),
        "SGLang's own check": sentence(engine(tp_size=4, dwdp_size=2)),
    }
    os.environ["VMM_DWDP_CONFIG"] = config
    told["group size"] = sentence(engine(**group))
    told["expert parallelism"] = sentence(engine(tp_size=2, ep_size=2))
    return told


def test_arguments_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 4\n")
    [told] = run_group(partial(start_engines, config=str(config)), 1)
    assert told == {
        "lora": "ConfigError: DWDP cannot be used with enable_lora=True",
        "offload": "ConfigError: DWDP cannot be used with cpu_offload_gb=4",
        "memory saver": "ConfigError: DWDP cannot be used with enable_memory_saver=True",
        "SGLang's own check": "AssertionError: dwdp_size (2) must equal tp_size (4)",
        "group size": f"ConfigError: {config} states group_size 1, but --dwdp-size is 2",
        "expert parallelism": "ConfigError: experts in host memory without --dwdp-size are not for ep_size above 1",
    }


def start_another_sglang(rank: int, *, removed: str) -> str:
    """What `sglang.Engine` says when SGLang lacks a method that the plugin needs."""
    import pkgutil

    from sglang.srt.entrypoints.engine import Engine

    owner, _, name = removed.rpartition(".")
    delattr(pkgutil.resolve_name(owner), name)
    return sentence(partial(Engine, model_path=str(engine_process.MODEL), device="cpu", tp_size=2, dwdp_size=2))


def test_an_unknown_sglang_is_refused_where_it_is_seen() -> None:
    removed = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.bind_full_expert_weights"
    [told] = run_group(partial(start_another_sglang, removed=removed), 1)
    known = r"Use a version that it was tested with, or set VMM_DWDP_DISABLE=1 for SGLang's own DWDP"
    assert re.fullmatch(
        rf"ConfigError: vmm-dwdp does not know this SGLang \(.+\): {removed} cannot be used \(.+\)\. {known}", told
    )


def start_disabled(rank: int) -> bool:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    os.environ["VMM_DWDP_DISABLE"] = "1"
    load_plugins()
    return not HookRegistry._hooks and not hasattr(ModelRunner.maybe_init_dwdp, "__wrapped__")


def test_disabled_means_nothing_is_hooked() -> None:
    assert run_group(start_disabled, 1) == [True]


# -- the process of a rank ---------------------------------------------------------------------------------------------
def run_rank(rank: int, *, port: int, config: str) -> dict[str, Any]:
    """One GPU with experts in host memory: the manager, every path to the experts, updates, and refusals."""
    os.environ["VMM_DWDP_CONFIG"] = config
    engine_process.start(rank, 1, port)
    seen: dict[str, Any] = {"no layers": sentence(lambda: engine_process.init_dwdp(torch.nn.Linear(2, 2)))}

    model = experts.model("bf16")
    experts.load(model)
    manager = engine_process.init_dwdp(model)
    seen["manager"] = f"{type(manager).__module__}.{type(manager).__name__}"
    seen["paths"] = each_path(model, manager)
    layer = model.layers[0]
    seen["late"] = sentence(lambda: experts.model("bf16"))
    loaded = torch.zeros(experts.INTERMEDIATE, experts.HIDDEN)
    seen["loader"] = sentence(lambda: layer.weight_loader(layer.w13_weight, loaded, "experts.w13_weight", "w1", 0))
    seen["updates"] = updates()
    engine_process.shut_down()

    seen["dummy weights"] = dummy_weights()
    model = experts.model("bf16")
    experts.load(model)
    manager = hooks.manager()
    assert manager is not None
    with patch.object(DWDPRuntime, "publish", side_effect=ExchangeError("rank 1 did not come")):
        seen["setup"] = sentence(partial(engine_process.init_dwdp, model))
    seen["left after it"] = [manager.runtime.ledger.open(), model.layers[0].w13_weight.numel()]

    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    model = experts.model("bf16")
    experts.load(model)
    manager = hooks.manager()
    assert manager is not None
    beam = type("Beam", (torch.nn.Module,), {"__module__": "sglang.srt.models.beam"})
    seen["own kernels"] = sentence(partial(engine_process.init_dwdp, beam()))
    seen["left after that"] = manager.runtime.ledger.open()

    model = experts.model("bf16")
    layer = model.layers[0]
    seen["early"] = sentence(lambda: layer.weight_loader(layer.w13_weight, loaded, "experts.w13_weight", "w1", 0))
    seen["early setup"] = sentence(partial(engine_process.init_dwdp, model))

    small = partial(FusedMoE, hidden_size=512, intermediate_size=512, top_k=2)
    small(num_experts=8, layer_id=0)
    seen["counts"] = sentence(lambda: small(num_experts=16, layer_id=1))
    seen["number"] = sentence(lambda: small(num_experts=8, layer_id=0))
    engine_process.use_runner("flashinfer_cutlass", 0, 1)
    seen["scheme"] = sentence(lambda: small(num_experts=8, layer_id=2))
    seen["after it"] = hooks.manager()

    engine_process.use_runner("triton", 0, 1)
    kept = [small(num_experts=8, layer_id=0)]
    with patch.object(hooks.settings, "wanted", return_value=False):  # the plugin comes later than this layer
        kept.append(small(num_experts=8, layer_id=1))
    seen["unknown layer"] = sentence(partial(engine_process.init_dwdp, torch.nn.ModuleList(kept)))
    engine_process.shut_down()
    return seen


def each_path(model: Any, manager: Any) -> dict[str, bool]:
    """Whether the outputs of every path that runs the experts are equal, and each acquired every layer once."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    hidden = torch.randn(7, experts.HIDDEN)
    weights, chosen = torch.rand(7, experts.NUM_EXPERTS).softmax(dim=-1).topk(experts.TOP_K)
    routed = StandardTopKOutput(weights.float(), chosen.to(torch.int32), None)

    def dispatched() -> Any:
        return StandardDispatchOutput(hidden_states=hidden.clone(), hidden_states_scale=None, topk_output=routed)

    paths = {
        "forward": lambda layer: layer.forward(hidden.clone(), routed),
        "deferred finalise": lambda layer: layer.forward_deferred_finalize(hidden.clone(), routed),
        "core": lambda layer: layer.run_moe_core(dispatched()).hidden_states,
        "method": lambda layer: layer.quant_method.apply(layer, dispatched()).hidden_states,
    }
    expected = [paths["forward"](layer) for layer in model.layers]
    right = {}
    for name, path in paths.items():
        before = [counts.hits for counts in manager.runtime.stats().layers.values()]
        manager.prefetch_first_layers()
        outputs = [path(layer) for layer in model.layers]
        after = [counts.hits for counts in manager.runtime.stats().layers.values()]
        right[name] = all(map(torch.equal, outputs, expected)) and after == [count + 1 for count in before]
    return right


def dummy_weights() -> bool:
    """Whether ``--load-format dummy`` gives the experts the weights that they have without DWDP."""
    from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

    with patch.object(hooks.settings, "wanted", return_value=False):
        plain = experts.model("bf16")
    spread = hooks.construct_model(lambda: experts.model("bf16"))
    for model in (plain, spread):
        initialize_dummy_weights(model)
        for layer in model.layers:
            layer.quant_method.process_weights_after_loading(layer)
    manager = engine_process.init_dwdp(spread)
    equal = []
    for ours, theirs in zip(spread.layers, plain.layers, strict=True):
        with manager.runtime.layer(ours.layer_id):
            equal += [torch.equal(ours.w13_weight, theirs.w13_weight), torch.equal(ours.w2_weight, theirs.w2_weight)]
    engine_process.shut_down()
    return all(equal) and len(plain.layers[0].w13_weight.unique()) > 1


def updates() -> set[tuple[bool, str]]:
    """What SGLang's weight updates answer."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    names = [name for name in dir(WeightUpdater) if re.match("(update|load)_weights_from", name)]
    assert len(names) == 4
    return {getattr(WeightUpdater, name)(SimpleNamespace()) for name in names}


def test_one_rank(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 8\n")
    [seen] = run_group(partial(run_rank, port=free_port(), config=str(config)), 1)
    no_updates = (
        "the weights of a running model cannot be updated while DWDP spreads its experts; restart with the new ones"
    )
    early = "DWDP cannot spread experts that are loaded before SGLang has constructed the whole model"
    assert seen == {
        "no layers": "ConfigError: Linear has no MoE layers, so DWDP has nothing to spread; start without it",
        "manager": "vmm_dwdp.integrations.sglang.manager.ExpertManager",
        "paths": {"forward": True, "deferred finalise": True, "core": True, "method": True},
        "loader": f"ConfigError: {no_updates}",
        "dummy weights": True,
        "setup": "ExchangeError: rank 1 did not come",
        "left after it": [[], 0],
        "own kernels": "ConfigError: Beam runs its experts by kernels of its own, which DWDP cannot serve",
        "left after that": [],
        "late": "ConfigError: layer 0 is constructed after the model, so its experts cannot be spread",
        "early": f"ConfigError: {early}",
        "early setup": f"ConfigError: {early}",
        "unknown layer": "ConfigError: 1 was constructed before vmm-dwdp was loaded, so its experts cannot be spread",
        "updates": {(False, no_updates)},
        "scheme": "ConfigError: DWDP cannot spread experts of UnquantizedFusedMoEMethod (bf16) with the MoE runner "
        "flashinfer_cutlass; it can with --moe-runner-backend triton or --moe-runner-backend triton_kernel",
        "after it": None,
        "counts": "ConfigError: DWDP needs as many experts in every MoE layer: layer 0 has 8, layer 1 has 16",
        "number": "ConfigError: two MoE layers have the number 0; DWDP needs a number of its own for each",
    }

"""Experts that are not served: SGLang's own DWDP takes them, on every rank, and the plugin refuses nothing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_process
import experts
import generations
import pytest
import test_loading
import torch
from ports import free_port

from vmm_dwdp.errors import DWDPError
from vmm_dwdp.integrations.sglang import contract, hooks
from vmm_dwdp.testing import run_group

SIZE = 2
MIXED = ("bf16", "fp8 block")
NOT_SERVED: dict[str, set[str]] = {
    "Ampere": set(),
    "Hopper": set(),
    "Blackwell": {"Qwen3 bf16", "Qwen3 FP8", "DeepSeek FP8", "Kimi K2 Thinking", "gpt-oss"},
    "consumer Blackwell": {"gpt-oss"},
}


class OwnManager:
    """Stands for SGLang's `DwdpManager`, which needs GPUs: what it was given."""

    def __init__(self, server_args: Any) -> None:
        self.model: Any = None

    def setup(self, model: Any) -> None:
        self.model = model

    def cleanup(self) -> None:
        pass


# -- the processes of two ranks ----------------------------------------------------------------------------------------
def run_rank(rank: int, *, port: int, models: dict[str, Path]) -> dict[str, Any]:
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import manager

    manager.open_driver = lambda device: HostDriver(test_loading.PAGE_NBYTES)
    plain = each_default(lambda model: runner_of(arguments(model)), models)  # the plugin is not loaded yet
    engine_process.start(rank, SIZE, port)
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe import dwdp

    with patch.object(dwdp, "DwdpManager", OwnManager):
        defaults = each_default(partial(start_default, rank=rank), models)
        mixed = {kind: start_mixed(kind, rank) for kind in MIXED}
        with patch.object(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", True):
            engine_process.use_runner("deep_gemm", rank, SIZE)
            layer(0, experts.quantisation("fp8 block"))
            deep_gemm = type(engine_process.init_dwdp(torch.nn.Module())).__name__
    return {"plain": plain, "defaults": defaults, "mixed": mixed, "deep_gemm of Blackwell": deep_gemm}


def each_default(start: Callable[[Path], Any], models: dict[str, Path]) -> dict[tuple[str, str], Any]:
    found = {}
    for generation, capability in generations.CAPABILITIES.items():
        with generations.machine(capability):
            found |= {(generation, model): start(folder) for model, folder in models.items()}
    return found


def arguments(model: Path) -> Any:
    """Those of an engine with ``--dwdp-size`` and nothing said of runners, as SGLang resolves them."""
    from sglang.srt.server_args import ServerArgs

    stated = ServerArgs(
        model_path=str(model), device="cpu", load_format="dummy", skip_tokenizer_init=True, tp_size=SIZE, dwdp_size=SIZE
    )
    getattr(stated, "resolve_once", lambda: None)()  # 0.5.23; 0.5.17 resolves while constructing
    stated.check_server_args()
    return stated


def runner_of(stated: Any) -> str:
    from sglang.srt.arg_groups.overrides import resolved_view

    return str(resolved_view(stated).moe_runner_backend)


def start_default(model: Path, rank: int) -> dict[str, Any]:
    """The default runner of a model, and who serves a layer that is constructed with it."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.layers.quantization import get_quantization_config

    with warnings() as told:
        stated = arguments(model)
        seen: dict[str, Any] = {"runner": runner_of(stated), "foretold": list(told)}
        quantisation = resolved_view(stated).quantization or contract.model_config(stated).quantization
        config = None
        if quantisation is not None:
            stated_in_checkpoint = generations.MODELS[model.name]["quantization_config"]
            config = get_quantization_config(quantisation).from_config(stated_in_checkpoint)
        engine_process.publish(stated, rank)
        model_of_one = torch.nn.Module()
        with experts.without_a_gpu():
            try:
                model_of_one.layer = layer(0, config)
            except DWDPError as error:
                return seen | {"refused": str(error)}
        serves = hooks.manager()
        if serves is None:
            found = engine_process.init_dwdp(model_of_one)
            assert found.model is model_of_one
            seen["served by"] = type(found).__name__
            engine_process.shut_down()
        else:
            seen["served by"] = "vmm-dwdp"
            serves.give_back()
    return seen | {"told": told}


def layer(number: int, quantisation: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    shape = {"num_experts": experts.NUM_EXPERTS, "hidden_size": experts.HIDDEN, "top_k": experts.TOP_K}
    return FusedMoE(
        **shape,
        intermediate_size=experts.INTERMEDIATE,
        layer_id=number,
        quant_config=quantisation,
        prefix=f"model.layers.{number}.mlp.experts",
    )


def start_mixed(kind: str, rank: int) -> dict[str, Any]:
    """A model whose last layer is not served: what the layers before it have, and how it goes on."""
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config

    engine_process.use_runner("triton", rank, SIZE)
    with patch.object(hooks.settings, "wanted", return_value=False):
        plain = experts.model(kind)
        constructed = [constants(each) for each in plain.layers]
        experts.load(plain)

    model = experts.model(kind)
    ours = hooks.manager()
    assert ours is not None
    taken = [{len(each) for each in module.parameters() if each.ndim} == {1} for module in model.layers]
    with warnings() as told:
        last = layer(experts.NUM_LAYERS, BlockInt8Config(True, "dynamic", weight_block_size=[128, 128]))
    seen = {
        "taken over before": all(taken),
        "told": told,
        "as constructed": [constants(each) for each in model.layers] == constructed,
        "hooks": [vars(each.quant_method).keys() & {"apply", "process_weights_after_loading"} for each in model.layers],
        "mapped": Path("/proc/self/maps").read_text().count("memfd:vmm_dwdp"),
    }
    experts.load(model)
    seen["loaded"] = [digests(each) for each in model.layers] == [digests(each) for each in plain.layers]
    model.layers.append(last)
    found = engine_process.init_dwdp(model)
    seen["own manager"] = type(found).__name__, found.model is model
    seen["exports"] = export()
    first = SimpleNamespace(layers=model.layers[:1])
    model.layers[0]._dwdp_bound = True  # as SGLang's own leaves it, and goes on loading
    experts.load(first)
    engine_process.shut_down()

    experts.model(kind)
    after = hooks.manager()
    seen["the next model"] = after is not None and after is not ours
    assert after is not None
    after.give_back()
    return seen


def constants(module: Any) -> dict[str, float]:
    """Of each parameter that the constructor fills with one number, which it is."""
    found = {name: each.detach().float().flatten() for name, each in module.named_parameters() if "scale" in name}
    return {name: float(each[0]) for name, each in found.items() if bool((each == each[0]).all())}


def digests(module: Any) -> dict[str, str]:
    return experts.digests(module, test_loading.tensors_of(module))


def export() -> str:
    from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter

    accepted = inspect.signature(WeightExporter.save_sharded_model).parameters
    try:
        WeightExporter.save_sharded_model(*[SimpleNamespace()] * len(accepted))
    except DWDPError as error:
        return str(error)
    return "exported"


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What this library logs as a warning."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vmm_dwdp").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("vmm_dwdp").removeHandler(handler)


# -- what they saw -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models = generations.write(tmp_path_factory.mktemp("models"))
    return run_group(partial(run_rank, port=free_port(), models=models), SIZE)


@pytest.mark.parametrize("generation", generations.CAPABILITIES)
def test_no_default_runner_is_refused(generation: str, ranks: list[dict[str, Any]]) -> None:
    """With the runner that SGLang chooses for itself, on every rank either this library serves or SGLang's own does."""
    for rank in ranks:
        defaults = {model: seen for (of, model), seen in rank["defaults"].items() if of == generation}
        assert {model: seen.get("refused") for model, seen in defaults.items()} == dict.fromkeys(generations.MODELS)
        plain = {model: rank["plain"][generation, model] for model in defaults}
        if plain["gpt-oss"] == "auto":  # SGLang would dequantise it, for it takes DWDP for expert parallelism
            plain["gpt-oss"] = "triton_kernel"
        assert {model: seen["runner"] for model, seen in defaults.items()} == plain
        served = {model for model, seen in defaults.items() if seen["served by"] == "vmm-dwdp"}
        assert served == generations.MODELS.keys() - NOT_SERVED[generation]
        assert all(defaults[model]["served by"] == "OwnManager" for model in NOT_SERVED[generation])


def test_one_warning_says_why(ranks: list[dict[str, Any]]) -> None:
    """From the process that starts the engine if the arguments decide it, else from the first rank."""
    for number, rank in enumerate(ranks):
        for (generation, model), seen in rank["defaults"].items():
            foretold = model in NOT_SERVED[generation] and seen["runner"] != "auto" and model != "Kimi K2 Thinking"
            assert len(seen["foretold"]) == foretold
            assert len(seen["told"]) == (foretold or (model in NOT_SERVED[generation] and number == 0))
    assert ranks[0]["defaults"]["Blackwell", "Qwen3 FP8"]["told"] == [
        "DWDP cannot spread fp8 experts with the MoE runner flashinfer_trtllm, so SGLang's own DWDP runs instead of "
        "vmm-dwdp; vmm-dwdp can with --moe-runner-backend triton"
    ]


def test_scales_that_post_processing_would_lay_out_anew_are_not_served(ranks: list[dict[str, Any]]) -> None:
    assert [rank["deep_gemm of Blackwell"] for rank in ranks] == ["OwnManager"] * SIZE


@pytest.mark.parametrize("kind", MIXED)
def test_layers_before_one_that_is_not_served_are_given_back(kind: str, ranks: list[dict[str, Any]]) -> None:
    why = "DWDP cannot spread experts of BlockInt8MoEMethod with the MoE runner triton"
    exports = "the weights of a running model cannot be saved, sent or checked while DWDP spreads its experts"
    for number, rank in enumerate(ranks):
        assert rank["mixed"][kind] == {
            "taken over before": True,
            "told": [f"{why}, so SGLang's own DWDP runs instead of vmm-dwdp"] if number == 0 else [],
            "as constructed": True,
            "hooks": [set()] * experts.NUM_LAYERS,
            "mapped": 0,
            "loaded": True,
            "own manager": ("OwnManager", True),
            "exports": f"{exports}; do it without DWDP",
            "the next model": True,
        }

"""Readers and writers of weights that never acquire: each is told so, and no byte is changed by trying."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_process
import experts
import pytest
import test_loading
import torch
from ports import free_port

from vmm_dwdp.errors import DWDPError
from vmm_dwdp.testing import run_group

NO_UPDATES = (
    "the weights of a running model cannot be updated while DWDP spreads its experts; restart with the new ones"
)
NO_EXPORTS = (
    "the weights of a running model cannot be saved, sent or checked while DWDP spreads its experts; do it without DWDP"
)
FIRST_WEIGHTS = {"wna16": "w13_weight_packed", "awq": "w13_qweight", "gptq": "w13_qweight"}
NOT_HERE = (
    "{} is spread over the group and is here only between acquire and release of its layer: "
    "it cannot be read, written, moved or copied now"
)


def sentence(call: Callable[[], Any]) -> str:
    try:
        return f"answered {call()!r}"
    except DWDPError as error:
        return str(error)


def run_rank(rank: int, *, port: int, config: str) -> dict[str, dict[str, Any]]:
    """For each kind of weights, with its experts in host memory: what each reader and writer is told."""
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import manager

    os.environ["VMM_DWDP_CONFIG"] = config
    manager.open_driver = lambda device: HostDriver(test_loading.PAGE_NBYTES)
    engine_process.start(rank, 1, port)
    found = {}
    for kind, runner in test_loading.KINDS.items():
        engine_process.use_runner(runner, rank, 1)
        with experts.without_a_gpu():
            model = experts.model(kind)
            experts.load(model)
            ours = engine_process.init_dwdp(model)
            seen: dict[str, Any] = {"before": test_loading.one_pass(model, ours, "staged")}
            seen["outside"] = not_here(model)
            found_by_name = model.layers[0].named_parameters()
            seen["first"] = next((name for name, p in found_by_name if p.nbytes >= test_loading.PAGE_NBYTES), None)
            seen["told"] = {name: sentence(call) for name, call in attempts(model).items()}
            seen["raised"] = interrupted(model, ours)
            seen["after"] = test_loading.one_pass(model, ours, "staged")
            seen["outside afterwards"] = not_here(model)
        engine_process.shut_down()
        found[kind] = seen
    return found


def not_here(model: Any) -> bool:
    """Whether all layers' tensors of at least a page are meta tensors."""
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    named = [(layer, name) for layer in model.layers for name in scheme_of(layer).tensors]
    tensors = [tensor for layer, name in named for tensor in experts.tensors(layer, [name], optional=True)]
    return all(tensor.is_meta for tensor in tensors if tensor.nbytes >= test_loading.PAGE_NBYTES)


def attempts(model: Any) -> dict[str, Callable[[], Any]]:
    """What SGLang does to whole models, by the functions in which it does it."""
    from sglang.srt.managers.scheduler_components import weight_updater as scheduler
    from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.model_loader.loader import DefaultModelLoader, ShardedStateLoader
    from sglang.srt.utils.weight_checker import WeightChecker

    exporter, checker = SimpleNamespace(get_model=lambda: model), SimpleNamespace(_get_model=lambda: model)
    cpu = torch.device("cpu")
    made = {
        "save sharded": lambda: WeightExporter.save_sharded_model(exporter, "nowhere"),
        "save remote": lambda: WeightExporter.save_remote_model(exporter, "redis://nowhere"),
        "send": lambda: WeightExporter.send_weights_to_remote_instance(exporter, "127.0.0.1", "1", "group"),
        "group to send": lambda: WeightExporter.init_weights_send_group_for_remote_instance(
            exporter, "127.0.0.1", "1", 0, 1, "group"
        ),
        "checksum": lambda: WeightChecker.handle(checker, "checksum"),
        "reset": lambda: WeightChecker.handle(checker, "reset_tensors"),
        "post-process again": lambda: [
            layer.quant_method.process_weights_after_loading(layer) for layer in model.layers
        ],
        # Past the functions that are hooked:
        "export": lambda: ShardedStateLoader.save_model(model, "nowhere"),
        "broadcast": lambda: [torch.distributed.broadcast(weight, src=0) for weight in model.parameters()],
        "copy": lambda: [weight.copy_(torch.zeros_like(weight)) for weight in model.parameters()],
        "snapshot": lambda: [parameter.data.detach().cpu() for parameter in model.parameters()],
    }
    if hasattr(scheduler.SchedulerWeightUpdaterManager, "begin_weight_update"):  # 0.5.23
        updater = SimpleNamespace(_session=None, _select_runners=lambda selector: [])
        begin = partial(scheduler.SchedulerWeightUpdaterManager.begin_weight_update, updater)
        made["session"] = lambda: (lambda answer: (answer.success, answer.message))(begin(SimpleNamespace(selector="")))
        made["session's begin"] = lambda: WeightUpdater.begin_weight_update(exporter)
        made["session's end"] = lambda: WeightUpdater.end_weight_update(exporter, run_post_load=False)
        made["begin"] = lambda: DefaultModelLoader.restore_weights_before_loading(model, cpu)
        made["end"] = lambda: DefaultModelLoader.postprocess_weights(model, cpu)
    return made


def interrupted(model: Any, ours: Any) -> list[bool]:
    """Whether a layer's tensors are there in `apply`, and gone after an exception from it."""
    layer = model.layers[0]
    name = test_loading.tensors_of(layer)[0]
    seen = []

    def fail(**_: Any) -> None:
        [tensor] = experts.tensors(layer, [name])
        seen.append(tensor.is_meta)
        raise KeyboardInterrupt

    hooked = layer.quant_method.apply
    layer.quant_method.apply = partial(hooked.func, hooked.args[0], fail)
    try:
        layer.quant_method.apply(layer, SimpleNamespace(hidden_states=torch.zeros(1, experts.HIDDEN)))
    except KeyboardInterrupt:
        seen.append(experts.tensors(layer, [name])[0].is_meta)
    layer.quant_method.apply = hooked
    return seen


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    config = tmp_path_factory.mktemp("config") / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 5\n")
    [found] = run_group(partial(run_rank, port=free_port(), config=str(config)), 1)
    return found


@pytest.mark.parametrize("kind", test_loading.KINDS)
def test_only_meta_tensors_outside_acquire_and_release(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    seen = kinds[kind]
    assert seen["outside"]
    assert seen["outside afterwards"]
    assert seen["raised"] == [False, True]


@pytest.mark.parametrize("kind", test_loading.KINDS)
def test_no_byte_is_changed_by_trying(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    assert kinds[kind]["after"] == kinds[kind]["before"]


@pytest.mark.parametrize("kind", test_loading.KINDS)
def test_whoever_did_not_acquire_is_told(kind: str, kinds: dict[str, dict[str, Any]]) -> None:
    told = kinds[kind]["told"]
    if "session" in told:
        assert told.pop("session") == f"answered {(False, NO_UPDATES)!r}"
        assert {told.pop(name) for name in ("session's begin", "session's end", "begin", "end")} == {NO_UPDATES}
    assert told.pop("post-process again") == NO_UPDATES
    assert {told.pop(name) for name in ("save sharded", "save remote", "checksum", "reset")} == {NO_EXPORTS}
    assert {told.pop(name) for name in ("send", "group to send")} == {f"answered {(False, NO_EXPORTS)!r}"}
    first = kinds[kind]["first"]
    if kind == "mxfp4":  # the weights are attributes of the quantisation method, and only biases, if any, parameters
        assert first in (None, "w13_weight_bias")
    else:
        assert first == FIRST_WEIGHTS.get(kind.split()[0], "w13_weight")
    if first is not None:
        assert set(told.values()) == {NOT_HERE.format(f"{first} of layer 0")}


def with_adapters(rank: int, *, port: int, config: str) -> list[str]:
    """What SGLang's LoRA layer around spread experts is told, in each layer."""
    os.environ["VMM_DWDP_CONFIG"] = config
    engine_process.start(rank, 1, port)
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.lora.layers import FusedMoEWithLoRA

    model = experts.model("bf16")
    experts.load(model)
    engine_process.init_dwdp(model)
    hidden = torch.zeros(7, experts.HIDDEN)
    weights, chosen = torch.rand(7, experts.NUM_EXPERTS).softmax(dim=-1).topk(experts.TOP_K)
    routed = StandardTopKOutput(weights.float(), chosen.to(torch.int32), None)
    backend = SimpleNamespace(name="torch_native", max_loras_per_batch=1)
    told = []
    for layer in model.layers:
        adapted = FusedMoEWithLoRA(layer, backend)
        adapted._lora_runner = SimpleNamespace(run=lambda _, quant_info, lora_info: quant_info.w13_weight.sum())
        told.append(sentence(partial(adapted._forward_with_lora, hidden, routed, None)))
    engine_process.shut_down()
    return told


def test_adapters_on_experts_read_no_other_layers_weights(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 8\n")
    [told] = run_group(partial(with_adapters, port=free_port(), config=str(config)), 1)
    assert told == [NOT_HERE.format(f"w13_weight of layer {number}") for number in range(experts.NUM_LAYERS)]

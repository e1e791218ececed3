"""A bank under SGLang, where there is no SGLang: what a layer shows while it is read by rows, and who is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fused_moe import fused_moe, moe_layer, weight
from support.groups import PAGE

from vmm_dwdp import ConfigError, DWDPConfig
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.sglang import hooks
from vmm_dwdp.integrations.sglang import manager as manager_module
from vmm_dwdp.integrations.sglang.manager import ExpertManager
from vmm_dwdp.integrations.sglang.settings import Stated

EXPERTS, ROWS, TOP_K, LAYERS = 8, 3, 2, 2
# An expert of each weight takes two pages, and scales of all share a page.
CONFIG = DWDPConfig(
    group_size=1, host_experts=6, mode="in_place", expert_bank=LAYERS * 2 * (2 * ROWS + 1) * PAGE, checksums=True
)


def module(number: int, runner: str = "triton", kind: str = "channel") -> Any:
    """A layer of weights in bf16 for triton_kernels, in MXFP4 for Marlin, and else in FP8 with a scale per ``kind``."""
    made = fused_moe(EXPERTS, EXPERTS, w13_weight=weight(EXPERTS), w2_weight=weight(EXPERTS))
    fp8 = type("CompressedTensorsW8A8Fp8MoE", (), {"weight_quant": SimpleNamespace(strategy=kind)})
    vars(made).update(vars(moe_layer("UnquantizedFusedMoEMethod", runner)))
    if runner != "triton_kernel":
        made.scheme = fp8() if runner == "triton" else type("Mxfp4MoEMethod", (), {})()
        for name in ("w13_weight_scale", "w2_weight_scale"):
            made.register_parameter(name, torch.nn.Parameter(torch.zeros(EXPERTS), requires_grad=False))
    made.layer_id, made.top_k, made.num_fused_shared_experts = number, TOP_K, 0
    made.bind_full_expert_weights = lambda _: None
    made.quant_method.process_weights_after_loading = lambda _: None
    made.quant_method.apply = read
    return made


def read(layer: Any, dispatch_output: Any) -> Any:
    """What a kernel reads: the bytes of the experts that it is told."""
    told = dispatch_output.topk_output.topk_ids.long()
    return told, layer.num_experts, {name: tensor[told].clone() for name, tensor in layer._parameters.items()}


class Routed(SimpleNamespace):
    def _replace(self, **changes: Any) -> Routed:
        return Routed(**{**vars(self), **changes})


def dispatched(*chosen: tuple[int, ...]) -> Routed:
    ids = torch.tensor(chosen, dtype=torch.int32)
    return Routed(hidden_states=torch.zeros(len(ids), 4), topk_output=Routed(topk_ids=ids))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a manager of a config with modules: as yet without memory."""
    started: list[ExpertManager] = []
    monkeypatch.setattr(manager_module, "open_driver", lambda _: HostDriver(PAGE))

    def start(config: DWDPConfig, modules: list[Any]) -> ExpertManager:
        place: Any = tmp_path / "group"
        started.append(ExpertManager(Stated(config), 0, place, torch.device("cpu"), None, 0.9))
        for each in modules:
            started[0].adopt(each)
        return started[0]

    yield start
    for each in started:
        each.cleanup()
        assert each._runtime is None or each.runtime.ledger.open() == []


def loaded(
    manager: ExpertManager, modules: list[Any], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, torch.Tensor]]:
    """Load and publish; returns the experts of each layer."""
    monkeypatch.setattr(manager, "_require_served", lambda _: None)
    manager.begin_loading(torch.nn.Module())
    whole = []
    for number, each in enumerate(modules):
        generator = torch.Generator().manual_seed(number)
        whole.append({})
        for name, parameter in each._parameters.items():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            whole[-1][name] = parameter.data.clone()
    manager.setup(torch.nn.Module())
    return whole


def test_kernels_are_told_rows_and_read_every_tensor_of_the_experts_there(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are smaller than a page as well; and between passes a layer has its experts only."""
    modules = [module(number) for number in range(LAYERS)]
    manager = opened(CONFIG, modules)
    whole = loaded(manager, modules, monkeypatch)
    assert manager.runtime.stats().bank is not None
    passes = [((2, 5),), ((5, 7), (2, 5)), ((0, 6),), ((6, 7), (1, 3)), ((-1, 4),), tuple([(2, 3)] * 33)] * 2
    for chosen in [*passes, *[((6, 7), (3, 4))] * 6]:
        for each, experts in zip(modules, whole, strict=True):
            rows, counted, found = each.quant_method.apply(layer=each, dispatch_output=dispatched(*chosen))
            assert counted == ROWS + EXPERTS
            expected = torch.tensor(chosen)
            for name, tensor in experts.items():
                assert torch.equal(found[name][expected >= 0], tensor[expected[expected >= 0]]), name
            assert torch.equal(rows < 0, expected < 0)
            assert each.num_experts == len(each.w13_weight) == EXPERTS
            del found
    for counts in manager.runtime.bank_counts().values():
        assert 0 < counts.hits < counts.uses
        assert counts.copied > ROWS
    manager.runtime.check_integrity(verify=True)


def test_a_bank_with_fewer_rows_than_a_token_has_experts_is_refused_before_the_first_pass(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [module(number) for number in range(LAYERS)]
    for each in modules:
        each.top_k = ROWS + 1
    with pytest.raises(ConfigError, match="has 3 rows, and a token uses 4 experts"):
        loaded(opened(CONFIG, modules), modules, monkeypatch)


def test_where_no_kernel_is_told_rows_there_is_no_bank_and_it_is_said(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = [module(number, kind="tensor") for number in range(LAYERS)]
    manager = opened(CONFIG, modules)
    with caplog.at_level(logging.WARNING, "vmm_dwdp"):
        whole = loaded(manager, modules, monkeypatch)
    sentence = "experts are read in place without a bank: fp8 tensor with the MoE runner triton is told no rows"
    assert [record.getMessage() for record in caplog.records] == [sentence]
    assert manager.runtime.stats().bank is None
    routed = Routed(hidden_states=torch.zeros(2, 4), topk_output=Routed(topk_ids=torch.tensor([[3, 6]])))
    _, counted, found = modules[1].quant_method.apply(layer=modules[1], dispatch_output=routed)
    assert counted == EXPERTS
    assert torch.equal(found["w2_weight"], whole[1]["w2_weight"][None, [3, 6]])
    del found


def test_tiles_are_chosen_as_without_a_bank(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = opened(CONFIG, [module(0)])
    monkeypatch.setattr(hooks, "_manager", manager)
    given = ((ROWS + EXPERTS, 96, 64), (ROWS + EXPERTS, 64, 48))
    asked = hooks.choose_tiles(lambda *shapes, **named: (shapes, named), *given, 2, dtype=None)
    assert asked == (((EXPERTS, 96, 64), (EXPERTS, 64, 48), 2), {"dtype": None})
    monkeypatch.setattr(hooks, "_manager", None)
    assert hooks.choose_tiles(lambda *shapes: shapes, *given) == given

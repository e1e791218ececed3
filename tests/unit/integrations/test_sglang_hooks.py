"""Which of SGLang's functions are hooked, and when; against SGLang itself: `tests/sglang/test_standing.py`."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

from vmm_dwdp import ConfigError
from vmm_dwdp.integrations.sglang import contract, hooks

OVER_RANKS = {*contract.LINEARS, contract.SUM_OVER_RANKS, contract.IS_LOCAL}


class Registry:
    """SGLang's, as far as the plugin calls it: what was registered, and what was applied later."""

    def __init__(self) -> None:
        self.registered: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()

    def register(self, path: str, hook: Any, kind: str) -> None:
        assert kind == "around"
        self.registered[path] += 1

    def _apply_target(self, path: str, found: list[tuple[str, Any, Any]]) -> None:
        [(kind, _, _)] = found
        assert kind == "around"
        self.applied[path] += 1


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    module = ModuleType("hook_registry")
    vars(module).update(HookRegistry=made, HookType=type("HookType", (), {"AROUND": "around"}), HookSource=tuple_of)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", module)
    monkeypatch.setattr(contract, "_exists", lambda path: True)
    monkeypatch.setattr(contract, "difference", lambda: None)
    monkeypatch.setattr(hooks, "_standing", set())
    monkeypatch.delenv("VMM_DWDP_CONFIG", raising=False)
    monkeypatch.delenv("VMM_DWDP_DISABLE", raising=False)
    return made


def tuple_of(*given: str) -> tuple[str, ...]:
    return given


def construct(monkeypatch: pytest.MonkeyPatch, dwdp_size: int) -> None:
    """A model without experts, on a rank of such an engine."""
    monkeypatch.setattr(hooks, "_active_dwdp_size", lambda: dwdp_size)
    model = torch.nn.Linear(1, 1)
    assert hooks.construct_model(lambda: model) is model


def test_what_is_hooked_in_every_engine_finds_out_what_it_is_asked_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks.register()
    construct(monkeypatch, 1)
    stated = type("ServerArgs", (), {"dwdp_size": 1})()
    assert hooks.check_arguments(lambda arguments: arguments, stated) is stated
    assert registry.registered == {contract.check_arguments(): 1, contract.CONSTRUCT_MODEL: 1}
    assert registry.applied == {}


def test_experts_in_host_memory_leave_alone_what_ranks_say_to_each_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMM_DWDP_CONFIG", "dwdp.yaml")
    construct(monkeypatch, 1)
    assert registry.applied[contract.INIT_DWDP] == 1
    assert not registry.applied.keys() & OVER_RANKS


def test_a_second_model_hooks_nothing_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        construct(monkeypatch, 2)
    assert registry.applied.keys() > OVER_RANKS
    assert set(registry.applied.values()) == {1}


def test_an_sglang_that_is_not_known_is_refused_where_experts_are_to_be_spread(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "difference", lambda: "its layers are round")
    hooks.register()
    construct(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"vmm-dwdp does not know this SGLang \(.*\): its layers are round\. Use"):
        construct(monkeypatch, 2)
    stated = type("ServerArgs", (), {"dwdp_size": 2})()
    with pytest.raises(ConfigError, match="its layers are round"):
        hooks.check_arguments(lambda arguments: arguments, stated)
    assert registry.applied == {}


def test_one_that_checks_nothing_that_is_known_does_not_start_with_a_config(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "_exists", lambda path: False)
    monkeypatch.setattr(contract, "difference", lambda: "its layers are round")
    hooks.register()
    assert registry.registered == {}
    monkeypatch.setenv("VMM_DWDP_CONFIG", "dwdp.yaml")
    with pytest.raises(SystemExit, match="its layers are round"):
        hooks.register()


def test_disabled_hooks_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_DWDP_DISABLE", "1")
    hooks.register()
    assert registry.registered == {}

"""Who has decode graphs with ``--dwdp-size``; against SGLang itself: `tests/sglang/test_decode_graphs.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vmm_dwdp.integrations.sglang import arguments, contract, graphs, hooks


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rank of SGLang's knows, as far as it is asked for it."""
    found = SimpleNamespace(
        get_parallel=lambda: SimpleNamespace(dwdp_size=1),
        get_exec=lambda: SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=found.config)),
        config=SimpleNamespace(decode=SimpleNamespace(backend="full"), prefill=SimpleNamespace(backend="full")),
    )
    backends = ModuleType("cuda_graph_config")
    vars(backends).update(Backend=SimpleNamespace(DISABLED="disabled"))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", found)
    monkeypatch.setitem(sys.modules, "sglang.srt.model_executor.cuda_graph_config", backends)
    return found


@pytest.mark.parametrize("sglangs_own", [True, False])
def test_each_rank_of_dwdp_goes_by_its_own_batch_and_no_other(context: Any, sglangs_own: bool) -> None:
    assert graphs.is_local(lambda runner: runner == "mine" and sglangs_own, "mine") is sglangs_own
    context.get_parallel = lambda: SimpleNamespace(dwdp_size=2)
    assert graphs.is_local(lambda runner: sglangs_own, "mine") is True


def test_those_of_decode_are_switched_off_where_sglangs_own_dwdp_takes_the_model(context: Any) -> None:
    graphs.switch_off()
    assert (context.config.decode.backend, context.config.prefill.backend) == ("disabled", "full")


def changes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, config: str, *, dwdp_size: int = 2, disabled: bool = False
) -> dict[str, Any]:
    """Which graphs are on after SGLang's check of its arguments, which switches those of DWDP off."""
    stated = SimpleNamespace(dwdp_size=dwdp_size, disable_cuda_graph=disabled, disable_prefill_cuda_graph=False)

    def check(given: Any) -> None:
        given.disable_cuda_graph = given.disable_cuda_graph or given.dwdp_size > 1

    path = folder / "dwdp.yaml"
    path.write_text(f"group_size: {dwdp_size}\n{config}")
    monkeypatch.setenv("VMM_DWDP_CONFIG", str(path))
    monkeypatch.setattr(contract, "difference", lambda: None)
    monkeypatch.setattr(hooks, "_hook", lambda hooks: None)
    monkeypatch.setattr(arguments, "check", lambda *given: None)
    monkeypatch.setattr(arguments, "view", lambda given: given)
    monkeypatch.setattr(arguments, "change", setattr)
    hooks.check_arguments(check, stated)
    return {
        "decode": not stated.disable_cuda_graph,
        "prefill": not (stated.disable_cuda_graph or stated.disable_prefill_cuda_graph),
    }


@pytest.mark.parametrize(
    ("config", "given", "decode"),
    [
        ("mode: auto\n", {}, True),
        ("mode: in_place\n", {}, True),
        ("", {}, True),  # auto
        ("mode: staged\n", {}, False),  # nothing is read in place
        ("mode: auto\n", {"disabled": True}, False),
        ("mode: staged\nhost_experts: 4\n", {"dwdp_size": 1}, True),  # as the arguments say
        ("mode: staged\nhost_experts: 4\n", {"dwdp_size": 1, "disabled": True}, False),
    ],
)
def test_those_of_decode_stay_where_few_tokens_are_read_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, given: dict[str, Any], decode: bool
) -> None:
    assert changes(monkeypatch, tmp_path, config, **given) == {"decode": decode, "prefill": False}

"""Arguments that DWDP cannot be used with, and those that it can, as SGLang resolves them."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_process
import pytest

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import arguments, contract
from vmm_dwdp.testing import run_group

DWDP = {"tp_size": 2, "dwdp_size": 2}
LATE = {  # what SGLang's own first look at DWDP's arguments does not see
    "adapters": ({"lora_paths": ["a=adapter"], "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}, "lora_paths=["),
    "prefill graphs": ({"cuda_graph_backend_prefill": "breakable"}, "prefill graphs of the backend 'breakable'"),
}
NOT_SERVED = {"moe_runner_backend": "flashinfer_trtllm"}
TWO_HOSTS = {**DWDP, "nnodes": 2, "node_rank": 0, "dist_init_addr": "127.0.0.1:5000"}


def resolve(rank: int, *, config: str, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What starting an engine says to each set of arguments, up to where it would start processes."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    told = {}
    for name, given in cases.items():
        os.environ.pop("VMM_DWDP_CONFIG", None)
        if "dwdp_size" not in given:
            os.environ["VMM_DWDP_CONFIG"] = config
        try:
            stated = engine_process.server_args(**given)
            getattr(stated, "resolve_once", lambda: None)()  # 0.5.23; 0.5.17 resolves while constructing
            stated.check_server_args()
            told[name] = "accepted"
        except ConfigError as error:
            told[name] = str(error)
    return told


def test_arguments_are_checked_when_they_are_final(tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 4\n")
    harmless = {"ep_num_redundant_experts": 2, "enable_torch_compile": True, "disable_prefill_cuda_graph": True}
    cases = {name: given for name, (given, _) in LATE.items()} | {"two hosts": TWO_HOSTS, "harmless": harmless}
    cases |= {"not served": NOT_SERVED, "not served by us": NOT_SERVED | DWDP}
    [told] = run_group(partial(resolve, config=str(config), cases=cases), 1)

    assert told.pop("two hosts") == "DWDP cannot be used with nnodes=2: its ranks map each other's memory"
    assert told.pop("harmless") == "accepted"
    runner = "DWDP cannot spread bf16 experts with the MoE runner flashinfer_trtllm"
    others = "--moe-runner-backend triton or --moe-runner-backend triton_kernel"
    assert told.pop("not served") == f"{runner}; it can with {others}"
    assert told.pop("not served by us") == "accepted"  # and SGLang's own DWDP runs: test_fallback.py
    assert told.keys() == LATE.keys()
    for name, (_, part) in LATE.items():
        assert told[name].startswith(f"DWDP cannot be used with {part}")


def fuses(**given: Any) -> bool:
    """Whether an engine with these arguments may fuse shared experts with the routed ones."""
    from sglang.srt.arg_groups.overrides import resolved_view

    stated = engine_process.server_args(**given)
    getattr(stated, "resolve_once", lambda: None)()
    stated.check_server_args()
    return not resolved_view(stated).disable_shared_experts_fusion


def fusion(rank: int) -> list[bool]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return [fuses(), fuses(**DWDP)]


def test_shared_experts_are_not_fused_with_those_that_are_spread() -> None:
    assert run_group(fusion, 1) == [[True, False]]


def resolve_as(rank: int, *, version: str) -> list[str]:
    """What is logged as a warning where SGLang says that it is of ``version``."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vmm_dwdp").addHandler(handler)
    with patch.object(contract, "version", return_value=version):
        assert resolve(rank, config="", cases={"group": DWDP}) == {"group": "accepted"}
    return told


def test_a_version_that_was_not_tested_is_told_once() -> None:
    listed = {path.stem.rpartition("-")[2] for path in Path(__file__).parent.glob("requirements-*.txt")}
    assert set(contract.TESTED) == listed
    [told] = run_group(partial(resolve_as, version="0.5.99"), 1)
    assert told == ["vmm-dwdp was tested with SGLang 0.5.17, 0.5.20, 0.5.22, 0.5.23, not 0.5.99"]
    assert run_group(partial(resolve_as, version="0.5.23"), 1) == [[]]


@pytest.mark.parametrize("name", arguments._EXCLUDED)
def test_each_excluded_argument_is_one_of_sglang(name: str) -> None:
    from sglang.srt.server_args import ServerArgs

    later = {"enable_paged_experts"} | {
        argument for argument in arguments._EXCLUDED if "kernel" in argument or "megamoe" in argument
    }
    of_17 = contract.version() == "0.5.17"
    if (contract.version() != "0.5.23" and name in later) or (of_17 and name == "startup_weight_load_mode"):
        pytest.skip("this SGLang has none")
    assert name in ServerArgs.__annotations__


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("dcp_size", 2, "DWDP cannot be used with dcp_size=2"),
        ("elastic_ep_backend", "mooncake", "DWDP cannot be used with elastic_ep_backend='mooncake'"),
        ("moe_a2a_backend", "deepep", "DWDP cannot be used with moe_a2a_backend='deepep'"),
        ("kt_weight_path", "experts", "DWDP cannot be used with kt_weight_path='experts'"),
        ("weight_cache_mode", "auto", "DWDP cannot be used with weight_cache_mode='auto'"),
        ("startup_weight_load_mode", "overlap", "DWDP cannot be used with startup_weight_load_mode='overlap'"),
        ("enable_nvidia_megakernel", True, "DWDP cannot be used with enable_nvidia_megakernel=True"),
        ("load_format", "sharded_state", "DWDP cannot be used with load_format='sharded_state', whose loader"),
        ("load_format", "layered", "DWDP cannot be used with load_format='layered', whose loader"),
        ("ep_size", 2, "experts in host memory without --dwdp-size are not for ep_size above 1"),
        ("attn_dp_size", 2, "experts in host memory without --dwdp-size are not for attn_dp_size above 1"),
    ],
)
def test_an_excluded_argument_is_refused_by_name(name: str, value: Any, sentence: str) -> None:
    stated = SimpleNamespace(**{"load_format": "auto", "nnodes": 1, name: value})
    with pytest.raises(ConfigError) as told:
        arguments.check(stated, dwdp_size=1)
    assert str(told.value).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elastic_ep_backend", "none"),
        ("moe_a2a_backend", "none"),
        ("tp_size", 2),
        *[("load_format", name) for name in ("auto", "safetensors", "dummy", "fastsafetensors")],
    ],
)
def test_what_does_nothing_is_accepted(name: str, value: Any) -> None:
    arguments.check(SimpleNamespace(**{"load_format": "auto", "nnodes": 1, name: value}), dwdp_size=1)

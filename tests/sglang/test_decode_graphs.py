"""CUDA graphs of decoding with ``--dwdp-size``: who has them, and that each rank goes by its own batch."""

from __future__ import annotations

import inspect
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_process
import ports
import pytest
import torch
from answers import PROMPTS

from vmm_dwdp.testing import run_group

GROUP = {"tp_size": 2, "dwdp_size": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # what the config says besides the group's size, and arguments
    "nothing stated": ("", GROUP),
    "staged": ("mode: staged\n", GROUP),
    "in place": ("mode: in_place\n", GROUP),
    "auto": ("mode: auto\n", GROUP),
    "auto, but without graphs": ("mode: auto\n", GROUP | {"disable_cuda_graph": True}),
    "auto, but without decode graphs": ("mode: auto\n", GROUP | {"disable_decode_cuda_graph": True}),
}
ON, OFF = ("full", "disabled"), ("disabled", "disabled")


def resolve(rank: int, *, folder: Path) -> dict[str, Any]:
    """The backends of decode and prefill graphs of each case; and then what a rank of the last one would capture."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.utils.common import require_attn_tp_gather, require_mlp_tp_gather

    from vmm_dwdp.integrations.sglang import graphs

    found: dict[str, Any] = {}
    for name, (config, given) in CASES.items():
        path = folder / f"{name}.yaml"
        path.write_text(f"group_size: 2\n{config}")
        os.environ["VMM_DWDP_CONFIG"] = str(path)
        stated = engine_process.server_args(**given)
        getattr(stated, "resolve_once", lambda: None)()
        stated.check_server_args()
        resolved = resolved_view(stated).cuda_graph_config
        found[name] = (resolved.decode.backend, resolved.prefill.backend)
        if name == "auto":
            auto = stated
    engine_process.publish(auto, rank)
    asked = [auto] if inspect.signature(require_mlp_tp_gather).parameters.keys() & {"server_args"} else []
    model_runner = SimpleNamespace(is_draft_worker=False, server_args=auto)
    found["SGLang gathers"] = (require_mlp_tp_gather(*asked), require_attn_tp_gather(*asked))
    found["ours gathers"] = not DecodeCudaGraphRunner._forward_is_dp_local(model_runner)
    graphs.switch_off()
    read = auto if asked else get_exec().graph  # what SGLang reads where it captures
    found["switched off"] = read.cuda_graph_config.decode.backend
    del os.environ["VMM_DWDP_CONFIG"]
    engine_process.publish(engine_process.server_args(), rank)
    found["without DWDP"] = DecodeCudaGraphRunner._forward_is_dp_local(model_runner)
    return found


def test_graphs_are_on_where_few_tokens_are_read_in_place(tmp_path: Path) -> None:
    [found] = run_group(partial(resolve, folder=tmp_path), 1)
    assert {name: found[name] for name in CASES} == {
        "nothing stated": ON,
        "staged": OFF,
        "in place": ON,
        "auto": ON,
        "auto, but without graphs": OFF,
        "auto, but without decode graphs": OFF,
    }
    assert found["SGLang gathers"] == (True, False)  # the longest batch of all ranks, which with DWDP nobody knows
    assert not found["ours gathers"]
    assert found["switched off"] == "disabled"  # where SGLang's own DWDP takes the model
    assert not found["without DWDP"]


def decode(rank: int, *, checkpoint: Path, config: Path, graphs: bool) -> list[list[int]]:
    """What an engine of two GPUs answers."""
    os.environ["VMM_DWDP_CONFIG"] = str(config)
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=str(checkpoint),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        moe_runner_backend="triton",
        cuda_graph_max_bs_decode=8,
        max_total_tokens=4096,
        max_running_requests=8,
        random_seed=0,
        port=ports.port_of_an_engine(),
        disable_decode_cuda_graph=not graphs,
        **GROUP,
    )
    try:
        greedy = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
        answers = engine.generate(input_ids=PROMPTS * 2, sampling_params=greedy)
        return [answer["output_ids"] for answer in answers]
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def eager(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Of an engine that copies everything ahead, without graphs: `test_forward.py` compares such passes with plain."""
    config = tmp_path_factory.mktemp("eager") / "dwdp.yaml"
    config.write_text("group_size: 2\nmode: staged\n")
    [found] = run_group(partial(decode, checkpoint=checkpoint, config=config, graphs=False), 1)
    assert len({token for answer in found for token in answer}) > 8
    return found


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "stated",
    ["mode: in_place", "mode: auto", "mode: auto\nnum_local_experts: 3\nhost_experts: 3"],
    ids=("in place", "auto", "unequal shares and host memory"),
)
def test_tokens_of_graphs_are_those_without(
    stated: str, eager: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """Also where ranks' shares overlap, with experts in host memory besides."""
    config = tmp_path / "dwdp.yaml"
    config.write_text(f"group_size: 2\n{stated}\n")
    assert run_group(partial(decode, checkpoint=checkpoint, config=config, graphs=True), 1) == [eager]

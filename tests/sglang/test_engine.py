"""SGLang's own offline engine, on the CPU: the same tokens with its experts spread as without, prefill and decode."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import engine_process
import psutil
import pytest
import torch
from safetensors.torch import save_file

from vmm_dwdp.testing import run_group

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 8, 256, 1024, 512
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(40, 80)), [11]]

Tokens = list[list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with random weights, at a scale at which every layer matters."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    config = json.loads((engine_process.MODEL / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    head = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * HIDDEN**0.5,
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for number in range(NUM_LAYERS):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": matrix(queries, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(keys, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(keys, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, queries),
            f"{layer}.self_attn.q_norm.weight": torch.ones(head),
            f"{layer}.self_attn.k_norm.weight": torch.ones(head),
            f"{layer}.mlp.gate.weight": matrix(NUM_EXPERTS, HIDDEN),
        }
        for expert in range(NUM_EXPERTS):
            shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
            for name, shape in shapes.items():
                tensors[f"{layer}.mlp.experts.{expert}.{name}_proj.weight"] = matrix(*shape)
    save_file(tensors, folder / "model.safetensors")
    return folder


def generate(
    rank: int, *, checkpoint: Path, size: int, environment: dict[str, str], save: bool = False, **arguments: Any
) -> tuple[Tokens, int]:
    """What an engine of ``size`` ranks answers to the prompts, and how many of its processes have our memory.

    With ``save`` it is asked between two answers to save its weights, which it has to refuse.
    """
    os.environ.update(environment)
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=str(checkpoint),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        moe_runner_backend="triton",
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        disable_cuda_graph=True,
        max_total_tokens=2048,
        max_running_requests=4,
        random_seed=0,
        tp_size=size,
        dwdp_size=1 if "VMM_DWDP_CONFIG" in environment else size,
        **arguments,
    )
    try:
        greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answers = engine.generate(input_ids=PROMPTS, sampling_params=greedy)
        if save:
            with pytest.raises(AssertionError, match="cannot be saved, sent or checked while DWDP spreads its experts"):
                engine.save_sharded_model(path=str(checkpoint / "saved"), pattern=None, max_size=None)
            answers = engine.generate(input_ids=PROMPTS, sampling_params=greedy)
        maps = [Path(f"/proc/{child.pid}/maps").read_text() for child in psutil.Process().children(recursive=True)]
        return [answer["output_ids"] for answer in answers], sum("memfd:vmm_dwdp" in each for each in maps)
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def ordinary(checkpoint: Path) -> Tokens:
    [(tokens, spread)] = run_group(partial(generate, checkpoint=checkpoint, size=1, environment={}), 1)
    assert spread == 0
    assert [len(answer) for answer in tokens] == [8] * len(PROMPTS)
    assert len({token for answer in tokens for token in answer}) > 8
    return tokens


TWO_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # a core for each rank, on a machine with one NUMA node
    "SGLANG_NCCL_SO_PATH": "none",  # which a CUDA build of torch brings, and SGLang uses on the CPU too
}


def test_an_engine_with_two_ranks(checkpoint: Path, ordinary: Tokens) -> None:
    assert run_group(partial(generate, checkpoint=checkpoint, size=2, environment=TWO_RANKS), 1) == [(ordinary, 2)]


@pytest.mark.parametrize(("mode", "size"), [("staged", 2), ("auto", 1)])
def test_an_engine_with_experts_in_host_memory(
    mode: str, size: int, checkpoint: Path, ordinary: Tokens, tmp_path: Path
) -> None:
    """With tensor parallelism each rank has a part of every expert, and a pool of host memory of its own."""
    config = tmp_path / "dwdp.yaml"
    config.write_text(f"group_size: 1\nhost_experts: 5\nmode: {mode}\n")
    environment = {"VMM_DWDP_CONFIG": str(config)} | (TWO_RANKS if size == 2 else {})
    run = partial(generate, checkpoint=checkpoint, size=size, environment=environment, save=True)

    assert run_group(partial(run, ep_num_redundant_experts=2 if size == 1 else 0), 1) == [(ordinary, size)]

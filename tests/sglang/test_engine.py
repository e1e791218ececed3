"""SGLang's own offline engine, on the CPU: the same tokens with its experts spread as without, prefill and decode."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import psutil
import pytest

from vmm_dwdp.testing import run_group

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(40, 80)), [11]]

Tokens = list[list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"))


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
        chunked_prefill_size=16,  # so that the longest prompt takes several passes
        disable_cuda_graph=True,
        max_total_tokens=2048,
        max_running_requests=4,
        random_seed=0,
        tp_size=size,
        **arguments,
    )
    try:
        greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answers = engine.generate(input_ids=PROMPTS, sampling_params=greedy)
        again = engine.generate(input_ids=PROMPTS[2], sampling_params=greedy)
        assert again["output_ids"] == answers[2]["output_ids"]
        assert again["meta_info"]["cached_tokens"] > 0
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


def test_an_engine_with_two_ranks(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    """Whose shares overlap, and with experts in host memory besides: ranks hold 3 of 8 each, from 0 and 2 on."""
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 2\nnum_local_experts: 3\nhost_experts: 3\n")
    environment = TWO_RANKS | {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=checkpoint, size=2, environment=environment, dwdp_size=2)

    assert run_group(run, 1) == [(ordinary, 2)]


def test_an_engine_with_experts_in_host_memory(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 5\nmode: auto\n")
    environment = {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=checkpoint, size=1, environment=environment, save=True)

    assert run_group(partial(run, ep_num_redundant_experts=2), 1) == [(ordinary, 1)]

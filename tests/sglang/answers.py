"""What SGLang's own offline engine answers to a few prompts, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ports
import psutil
import pytest

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(40, 80)), [11]]
TWO_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # a core for each rank, on a machine with one NUMA node
    "SGLANG_NCCL_SO_PATH": "none",  # which a CUDA build of torch brings, and SGLang uses on the CPU too
}

Tokens = list[list[int]]


def generate(
    rank: int,
    *,
    checkpoint: Path,
    size: int,
    environment: dict[str, str],
    save: bool = False,
    attention: str = "torch_native",
    **arguments: Any,
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
        attention_backend=attention,
        sampling_backend="pytorch",
        grammar_backend="none",
        moe_runner_backend="triton",
        chunked_prefill_size=16,  # so that the longest prompt takes several passes
        disable_cuda_graph=True,
        max_total_tokens=2048,
        max_running_requests=4,
        random_seed=0,
        port=ports.port_of_an_engine(),
        tp_size=size,
        **arguments,
    )
    try:
        greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answers = engine.generate(input_ids=PROMPTS, sampling_params=greedy)
        again = engine.generate(input_ids=PROMPTS[2], sampling_params=greedy)
        assert again["output_ids"] == answers[2]["output_ids"]
        if size == 1:  # else it may be another rank's turn, whose cache has not seen it
            assert again["meta_info"]["cached_tokens"] > 0
        if save:
            with pytest.raises(AssertionError, match="cannot be saved, sent or checked while DWDP spreads its experts"):
                engine.save_sharded_model(path=str(checkpoint / "saved"), pattern=None, max_size=None)
            answers = engine.generate(input_ids=PROMPTS, sampling_params=greedy)
        maps = [Path(f"/proc/{child.pid}/maps").read_text() for child in psutil.Process().children(recursive=True)]
        return [answer["output_ids"] for answer in answers], sum("memfd:vmm_dwdp" in each for each in maps)
    finally:
        engine.shutdown()

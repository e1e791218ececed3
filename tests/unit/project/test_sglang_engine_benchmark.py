"""What `benchmarks/sglang_engine.py` refuses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import sglang_engine
from engine_processes import Failed

from vmm_dwdp.planning.gpus import load_gpu

H100 = load_gpu("h100")
ATTENTION, EXPERT = 2048 * 2048 * 2 + 2 * 512 * 2048, 3 * 2048 * 768  # 16 heads of 128, 4 of them keys
NUMBERS = 4 * (ATTENTION + 8 * EXPERT)  # that one token meets


@pytest.mark.parametrize(("weights", "ranks", "nbytes"), [("bf16", 1, 2.0), ("fp8", 2, 1.0), ("wna16", 1, 0.5)])
def test_no_engine_is_faster_than_its_gpus(weights: str, ranks: int, nbytes: float) -> None:
    arguments = argparse.Namespace(layers=4, hidden=2048, experts=64, intermediate=768, weights=weights, tp=ranks)
    arguments.prompts, arguments.prompt_tokens = 4, [256, 1024]
    rate = ranks * H100.peak_flops["fp8" if weights == "fp8" else "bf16"] / (2 * NUMBERS)
    step = NUMBERS * nbytes / H100.memory_bandwidth / ranks * 1e3
    possible = {"prefill of 256: tokens/s": 1, "prefill of 1024: tokens/s": 0.99 * rate, "decode ms/step": 1.01 * step}

    sglang_engine._require_possible(possible, arguments, H100)
    sglang_engine._require_possible({name: possible[name] for name in list(possible)[:2]}, arguments, H100)

    for impossible in ({"prefill of 1024: tokens/s": 1.01 * rate}, {"decode ms/step": 0.99 * step}):
        with pytest.raises(Failed, match="cannot be"):
            sglang_engine._require_possible(possible | impossible, arguments, H100)
    with pytest.raises(Failed, match="a step takes"):
        sglang_engine._require_possible(possible | {"decode ms/step": -0.1}, arguments, H100)

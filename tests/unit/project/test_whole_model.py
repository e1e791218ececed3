"""`benchmarks/whole_model.py`: the bytes that each way to the experts reads, and what it makes of what it sees."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import same_bytes

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import whole_model
from decoder import SHAPES
from expert_formats import FORMATS

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.routing import read_trace

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
DEMO = read_trace(whole_model.TRACES / "demo.npz")
MIXED = read_trace(whole_model.TRACES / "mixed-0.01.npz")
STATED = argparse.Namespace(device=CPU, batch=1, bank=0.25, steps=6, turns=2, distinct_layers=3)


@pytest.mark.parametrize("weights", FORMATS)
def test_states_are_bit_identical_and_hits_are_the_replay_s(weights: str) -> None:
    rows = {row["experts"]: row for row in whole_model.measure(STATED, TINY, weights, DEMO)}
    assert 0 < rows["bank"]["hits"] < rows["bank"]["foresight"] < 1
    assert rows["bank"]["hits"] == pytest.approx(rows["bank"]["replayed"], rel=0.05)
    of_an_expert = {"bf16": 2.0, "fp8": 1 + 4 / 128**2, "mxfp4": 0.5 + 1 / 32}[weights] * 3 * 256 * 128
    assert rows["in place"]["GB"] == pytest.approx(7 * 4 * of_an_expert / 1e9)
    assert rows["bank"]["GB"] == pytest.approx(rows["in place"]["GB"] * (1 - rows["bank"]["hits"]))


def test_sequences_that_decode_together() -> None:
    stated = argparse.Namespace(**{**vars(STATED), "batch": 3, "turns": 1})
    assert whole_model.measure(stated, TINY, "mxfp4", DEMO)[0]["GB"] < 3 * 7 * 4 * (0.5 + 1 / 32) * 3 * 256 * 128 / 1e9


def test_a_scale_that_is_not_in_the_bank_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    banked = whole_model.Readers.banked

    @contextmanager
    def without_scales(self: Any, number: int, chosen: torch.Tensor) -> Any:
        with banked(self, number, chosen) as (weights, rows):
            yield {**weights, "w2_scale": weights["w2_scale"].roll(1, 0)}, rows

    monkeypatch.setattr(whole_model.Readers, "banked", without_scales)
    with pytest.raises(SystemExit, match="'bank' states have other bits"):
        whole_model.measure(STATED, TINY, "mxfp4", DEMO)


@pytest.mark.parametrize("weights", FORMATS)
def test_layers_have_the_bytes_of_the_distinct_ones_and_give_all_back(weights: str) -> None:
    with whole_model.published(TINY, weights, 0.25, 3, CPU) as runtime:
        of_layers = []
        for number in range(TINY.layers):
            with runtime.layer(number) as tensors:
                of_layers.append({name: tensor.clone() for name, tensor in tensors.items()})  # type: ignore[union-attr]
        del tensors  # or its range would stay mapped
        ledger = runtime.ledger
    assert ledger.open() == []
    for number, tensors in enumerate(of_layers):
        for name, tensor in tensors.items():
            assert same_bytes(tensor, of_layers[number % 3][name])
            assert number % 3 == 0 or not same_bytes(tensor, of_layers[0][name])
            experts = tensor.reshape(TINY.experts, -1).view(torch.uint8)
            assert len(experts.unique(dim=0)) == TINY.experts


def test_layers_take_turns_with_the_trace_s_and_sequences_with_turns() -> None:
    shape = SHAPES["Qwen3-30B-A3B"]
    steps, prompt = whole_model.steps_of(MIXED, shape, 2, 3)
    assert steps.shape == (48 + 128, 48, 2, 8)
    assert prompt == 48
    assert steps[50, 23, 1].tolist() == MIXED.decode[2 * (3 + 2) + 1, 2, 3].tolist()
    assert steps[7, 4, 0].tolist() == MIXED.prefill[6, 7, 4].tolist()


def test_tokens_of_half_as_many_experts_use_every_second() -> None:
    steps, _ = whole_model.steps_of(MIXED, SHAPES["gpt-oss-120b"], 1, 0)
    assert steps[48, 0, 0].tolist() == MIXED.decode[0, 0, 0, ::2].tolist()
    with pytest.raises(ConfigError, match="16 experts, 4 a token, and the model 128 and 8"):
        whole_model.steps_of(DEMO, SHAPES["Qwen3-30B-A3B"], 1, 0)


def test_the_bound_is_what_missed_over_the_link_and_a_step_on_the_gpu() -> None:
    shares = {"hits": 0.5, "replayed": 0.5, "foresight": 0.75}
    turns = [
        whole_model.Turn(link, {"in place": 50.0, "bank": 30.0, "gpu": 5.0}, 400.0, shares) for link in (40.0, 60.0)
    ]
    in_place, bank, on_gpu = whole_model.rows_of(turns, "fp8", 2, 5_000_000)
    assert (in_place["GB"], bank["GB"], on_gpu["GB"]) == (2.0, 1.0, 0.0)
    assert in_place["of bound"] == pytest.approx((2 / 50 * 1e3 + 5) / 50)
    assert bank["of bound"] == pytest.approx((1 / 50 * 1e3 + 5) / 30)
    assert on_gpu["of bound"] == 1
    assert (in_place["tokens/s"], bank["bound"]) == (pytest.approx(40), pytest.approx(80))
    assert in_place["read"] == pytest.approx(40)


def test_figures_that_the_hardware_cannot_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = whole_model.Turn(50.0, {"in place": 37.0, "bank": 37.0, "gpu": 1.0}, 400.0, {"hits": 0.5})
    rows = whole_model.rows_of([turn], "fp8", 1, 5_000_000)
    with pytest.raises(SystemExit, match=r"read of .* cannot be: one large copy made 50\.0 GB/s"):
        whole_model.require_possible(rows, 1.0, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rows = whole_model.rows_of([turn._replace(ms={"in place": 45.0, "bank": 30.0, "gpu": 1.0})], "fp8", 1, 5_000_000)
    whole_model.require_possible(rows, 3.3, torch.device("cuda"))
    with pytest.raises(SystemExit, match=r"a step reads 3\.4 GB at least"):
        whole_model.require_possible(rows, 3.4, torch.device("cuda"))

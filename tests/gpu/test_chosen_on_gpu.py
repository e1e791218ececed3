"""The product of few tokens with the experts that each chose, on a GPU: right, and the same bits wherever they lie."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from support.chosen import FORMS, ROUTINGS, SHAPES, operands, relative_error

from vmm_dwdp.kernels import Format, chosen_gemm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import whole_model
from decoder import SHAPES as MODELS
from expert_formats import FORMATS

from vmm_dwdp.planning.routing import read_trace

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (2048, 768), (1536, 2048)])
@pytest.mark.parametrize("form", FORMS)
def test_every_token_has_its_products(form: Format, n: int, k: int, own: bool) -> None:
    for routing in ROUTINGS:
        given, expected = operands(form, routing, n, k, own=own, dtype=torch.bfloat16, device="cuda")
        out = chosen_gemm(*given)
        assert relative_error(out, expected) < 4e-3, routing
        assert not out[(expected == 0).all(2)].any(), routing
        same = chosen_gemm(given.x, given.weight, given.rows.long(), given.scale)
        assert torch.equal(out, same), routing


def test_many_tokens_choose_among_few_experts() -> None:
    given, _ = operands(Format.MXFP4, "one token", 136, 768, own=False, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(128, 768, device="cuda", dtype=torch.bfloat16)
    rows = torch.randint(0, 5, (128, 8), device="cuda")
    out = chosen_gemm(x, given.weight, rows, given.scale)
    for row in range(5):  # each by itself has the same bits as all together
        alone = chosen_gemm(x, given.weight, torch.full_like(rows[:, :1], row), given.scale)
        assert torch.equal(out[rows == row], alone.expand(-1, 8, -1)[rows == row])


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_s_states_are_bit_identical_in_place_from_the_bank_and_on_the_gpu(weights: str) -> None:
    """A CUDA graph each, of 40 steps and 24 of a prompt; `measure` ends the test where bits differ."""
    shape = MODELS["tiny"]._replace(hidden=2048, intermediate=1024)  # an expert fills pages
    trace = read_trace(whole_model.TRACES / "demo.npz")
    for batch in (1, 5):
        stated = argparse.Namespace(
            device=torch.device("cuda"), batch=batch, bank=0.25, steps=40, turns=1, distinct_layers=3
        )
        rows = {row["experts"]: row for row in whole_model.measure(stated, shape, weights, trace)}
        assert 0 < rows["bank"]["hits"] < 1

"""benchmarks/versus_offloaders.py on a GPU: all that can be imported here runs, and each has the GPU's bits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import versus_offloaders
from decode import SHAPES
from findings import Findings
from offloaders import KINDS

pytestmark = pytest.mark.gpu


def test_passes_of_ours_and_of_theirs_have_the_bits_of_the_gpu() -> None:
    """The benchmark compares them itself, and would end: here every figure is there, and ours are captured, too."""
    arguments = argparse.Namespace(
        device=torch.device("cuda"), rivals=["ours", *KINDS], tokens=[1, 4, 64], steps=3, tiny=True
    )
    told: list[Findings] = []
    versus_offloaders.measure(SHAPES["tiny"]._replace(top_k=4), arguments, told.append)
    rows, left_out = told[0].rows, told[0].left_out
    ours = [row for row in rows if str(row["who"]).startswith("ours")]

    assert [row["graph"] for row in ours] == ["yes"] * 5
    assert all("No module named" in why for why in left_out.values()), "what is installed runs"
    assert all(row["host / weights"] is not None for row in rows)

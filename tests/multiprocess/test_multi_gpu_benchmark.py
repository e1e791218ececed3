"""The benchmark for several GPUs runs, and its three parallelisms compute the same; with ranks that share the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dwdp_is_identical_and_the_baselines_agree() -> None:
    options = ["--device", "cpu", "--tiny", "--gpus", "2", "--only", "stack", "--json"]
    command = [sys.executable, "benchmarks/multi_gpu.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = json.loads(printed)["stack"]
    assert [row["spread"] for row in rows] == ["equal"] * 2 + ["unequal"] * 2
    for row in rows:
        assert row["identical"] is True
        assert row["ep error"] < 1e-6, "the same rows through the same kernel, elsewhere"
        assert row["tp error"] < 3e-2, "bfloat16 sums in another order"

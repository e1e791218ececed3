"""The benchmark for several GPUs runs, and its three parallelisms compute the same; with ranks that share the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dwdp_is_identical_and_the_baselines_agree() -> None:
    options = ["--device", "cpu", "--tiny", "--gpus", "2", "--only", "stack", "--preset", "h100", "--json"]
    command = [sys.executable, "benchmarks/multi_gpu.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    report = json.loads(printed)
    rows = report["stack"]
    assert [row["spread"] for row in rows] == ["equal"] * 2 + ["unequal"] * 2
    for row in rows:
        assert row["identical"] is True
        assert row["expert parallel error"] < 1e-6, "the same rows through the same kernel, elsewhere"
        assert row["tensor parallel error"] < 3e-2, "bfloat16 sums in another order"
        assert min(value for column, value in row.items() if column.startswith("predicted")) > 0
    assert [row["spread"] for row in report["crossover"]] == ["equal", "unequal"]

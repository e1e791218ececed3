"""benchmarks/sglang_multi_gpu.py runs as a whole, with two ranks on the CPU, where SGLang's own DWDP cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmm_dwdp.integrations.sglang import contract

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_engines_are_measured_in_turns_and_one_that_fails_has_its_sentence(tmp_path: Path) -> None:
    # On the CPU 0.5.23 wants a core for each of several whole models, which 0.5.17 refuses.
    other = "one" if contract.version() == "0.5.17" else "tp"
    options = ["--device", "cpu", "--tiny", "--gpus", "2", "--json", "--repeats", "1", "--limit", "400"]
    options += ["--variants", "dwdp", "own", other, "--mixes", "8 of 4K", "--logs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/sglang_multi_gpu.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "some engines failed; why is above" in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)

    failures = {row["variant"]: row["failure"] for row in report["engines"]}
    assert failures.pop("own")
    assert failures == {"dwdp auto staged": None, other: None}
    assert [(row["variant"], row["chunk"], row["mix"]) for row in report["prefill"]] == [
        (variant, chunk, "8 of 4K") for variant in failures for chunk in (64, 256)
    ]
    assert [row["sequences a rank"] for row in report["decode"]] == [1, 4, 16] * 2
    assert all(row["same tokens"] == 1 for name in ("prefill", "decode") for row in report[name])
    assert all(row["over own"] is None for row in report["compared"])
    assert all(row["tokens of one GPU"] is (True if other == "one" else None) for row in report["compared"])
    printed = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [row for row in printed if "mix" in row] == report["prefill"]
    assert len({row["digest"] for row in report["prefill"]}) == 1, "whatever the chunk"

    batches = (tmp_path / "dwdp-auto-staged.log").read_text().partition("#new-token: 256")
    assert "#new-token: 64," in batches[0], "chunks of the first size come first"
    assert batches[1], "then those of the second"

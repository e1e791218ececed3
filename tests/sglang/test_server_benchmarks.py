"""The benchmarks that start SGLang's servers run as a whole, on the CPU; their times say nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_prefill_server import mooncake as mooncake

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def rows(script: str, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", f"benchmarks/{script}", "--device", "cpu", "--tiny", "--json"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--limit", "400", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)["servers"]
    return found


def test_sglangs_client_asks_servers_with_and_without_this_library() -> None:
    """On the CPU SGLang's own DWDP cannot run: a row of ``dwdp`` is of this library."""
    found = rows("sglang_serving.py", "--servers", "one", "host", "dwdp")

    assert [(row["server"], row["GPUs"], row["failure"]) for row in found] == [
        ("one", 1, None),
        ("host", 1, None),
        ("dwdp", 2, None),
    ]
    assert found[0]["over one"] == 1
    assert all(row[name] > 0 for row in found for name in ("prompt tokens/s", "answer tokens/s", "TTFT ms", "TPOT ms"))


@pytest.mark.usefixtures("mooncake")
def test_a_pair_answers_as_one_server() -> None:
    found = rows("sglang_prefill_server.py")

    assert [(row["servers"], row["same tokens"], row["failure"]) for row in found] == [
        ("one", True, None),
        ("dwdp", True, None),
        ("host", True, None),
    ]
    assert len({row["digest"] for row in found}) == 1

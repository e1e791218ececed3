"""The same tests pass where nothing was compiled, and all goes through Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm_dwdp.allocator.native import HAS_NATIVE

ROOT = Path(__file__).parents[3]
TESTS = (
    "tests/unit/schedule/test_event_protocol.py",
    "tests/unit/schedule/test_captured_passes.py",
    "tests/unit/test_runtime_states.py",
    "tests/unit/test_threads_and_forks.py",
)


@pytest.mark.skipif(not HAS_NATIVE, reason="nothing is compiled here: these tests run so anyway")
@pytest.mark.timeout(600)
def test_all_of_it_goes_without_c() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "WITHOUT_NATIVE": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_c_is_hidden_where_the_environment_says_so() -> None:
    assert not (HAS_NATIVE and os.environ.get("WITHOUT_NATIVE"))

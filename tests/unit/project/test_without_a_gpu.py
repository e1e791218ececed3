"""What needs a GPU says so in one line where there is none, before it begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "benchmarks/decode.py", "--device", "cuda"],
        [sys.executable, "tests/soak.py", "--device", "cuda"],
        ["tests/gpu/run.sh", "made"],
    ],
    ids=lambda command: Path(command[-1] if command[0] != sys.executable else command[1]).stem,
)
def test_it_is_refused(command: list[str], tmp_path: Path) -> None:
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    made = [str(tmp_path / word) if word == "made" else word for word in command]
    ran = subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)

    assert ran.returncode == 2
    assert "GPU" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []

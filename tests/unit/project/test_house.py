"""The rules that tools can check: lint, format, types."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("ruff", "check"), id="lint"),
        pytest.param(("ruff", "format", "--check"), id="format"),
        pytest.param(("mypy",), id="types"),
    ],
)
def test_tool_finds_nothing(command: tuple[str, ...]) -> None:
    tool = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)

    assert tool.returncode == 0, tool.stdout + tool.stderr


TAKES_NO_OTHER = """
from vmm_dwdp.allocator.driver import Address, Driver, EventId, HandleId, StreamId

def give(driver: Driver, address: Address, handle: HandleId, stream: StreamId, event: EventId) -> None:
    driver.{call}
"""


@pytest.mark.parametrize(
    ("right", "swapped"),
    [
        ("record(event, stream)", "record(stream, event)"),
        ("wait(stream, event)", "wait(event, stream)"),
        ("map(address, 1, handle)", "map(handle, 1, address)"),
        ("synchronize(stream)", "synchronize(event)"),
        ("free(address, 1)", "free(7, 1)"),
    ],
)
def test_a_swapped_pair_does_not_type_check(right: str, swapped: str, tmp_path: Path) -> None:
    def is_accepted(name: str, call: str) -> bool:
        program = tmp_path / f"{name}.py"  # of its own: mypy remembers what it found in a file, by its size and time
        program.write_text(TAKES_NO_OTHER.format(call=call), encoding="utf-8")
        command = [sys.executable, "-m", "mypy", str(program)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0

    assert is_accepted("right", right)
    assert not is_accepted("swapped", swapped)

"""docs/sglang-models.md: what it says fits is what the planner says, and its commands are those of docs/sglang.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vmm_dwdp.cli import main

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "sglang-models.md").read_text()
ROWS = re.findall(r"^\| `vmm-dwdp (plan [^`]*)` \| (.*) \|$", PAGE, re.MULTILINE)
COLUMNS = ("resident_experts", "slots", "replicated", "left_for_kv_cache", "host_pool")
COMMAND = re.compile(r"^.*python -m sglang\.launch_server .*$", re.MULTILINE)


@pytest.mark.parametrize(("command", "figures"), ROWS, ids=[command for command, _ in ROWS])
def test_what_fits(command: str, figures: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(command), "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory_bytes"]

    assert [f"{memory[name] / 2**30:.1f}" for name in COLUMNS] == figures.split(" | ")


def test_there_are_rows() -> None:
    assert len(ROWS) == PAGE.count("vmm-dwdp plan")


def test_commands_are_those_whose_server_is_tested() -> None:
    tested = COMMAND.findall((DOCS / "sglang.md").read_text())

    assert set(COMMAND.findall(PAGE)) <= set(tested)

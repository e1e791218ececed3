"""benchmarks/README.md against what is kept in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()
FIGURES = re.findall(r"^\|.*\| ([\d.]+) \| `(\S+)`(?:: (.+))? \|$", PAGE, re.MULTILINE)


def test_there_are_figures() -> None:
    assert len(FIGURES) > 5


@pytest.mark.parametrize(("seen", "file", "way"), FIGURES)
def test_figure_is_what_was_measured(seen: str, file: str, way: str) -> None:
    kept = (BENCHMARKS / "results" / file).read_text()
    if not way:
        assert re.search(rf"(?<![\d.]){re.escape(seen)}(?![\d.])", kept)
        return
    found = json.loads(kept)
    for step in way.split(" > "):
        found = found[int(step) if isinstance(found, list) else step]
    decimals = len(seen.partition(".")[2])
    assert f"{found:.{decimals}f}" == seen


def test_what_is_named_is_there() -> None:
    named = {*re.findall(r"`python benchmarks/(\w+\.py)", PAGE), *re.findall(r"`(\w+\.py)`", PAGE)}

    assert named <= {path.name for path in BENCHMARKS.glob("*.py")}

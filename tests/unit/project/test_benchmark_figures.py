"""benchmarks/README.md against what is kept in benchmarks/results, and against the benchmarks that there are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()
MEASURED = PAGE.partition("\n## What was measured last\n")[2].partition("\n## ")[0]
PAGES = "".join(path.read_text() for folder in (BENCHMARKS, ROOT / "docs") for path in folder.rglob("*.md"))


class Figure(NamedTuple):
    command: str
    seen: str
    file: str
    way: str | None  # into a JSON file


def figures() -> Iterator[Figure]:
    command = ""
    for row in re.findall(r"^\| (.+) \|$", MEASURED, re.MULTILINE)[1:]:  # after the head
        stated, _, seen, where = map(str.strip, row.split("|"))
        if match := re.match(r"`(.+?)`", stated):
            command = match[1]
        else:
            assert stated.startswith("the same")
        if seen:
            kept = re.fullmatch(r"`(\S+)`(?:: (.+))?", where)
            assert kept is not None
            yield Figure(command, seen, *kept.groups())


FIGURES = list(figures())


@pytest.mark.parametrize("figure", FIGURES)
def test_figure_is_what_was_measured(figure: Figure) -> None:
    kept = (BENCHMARKS / "results" / figure.file).read_text()
    if figure.way is None:
        assert re.search(rf"(?<![\d.]){re.escape(figure.seen)}(?![\d.])", kept)
        return
    found = json.loads(kept)
    for step in figure.way.split(" > "):
        found = found[int(step) if isinstance(found, list) else step]
    decimals = len(figure.seen.partition(".")[2])
    assert f"{found:.{decimals}f}" == figure.seen


@pytest.mark.parametrize(("command", "file"), sorted({figure[::2] for figure in FIGURES if figure.way}))
def test_command_is_the_one_that_ran(command: str, file: str) -> None:
    ran = json.loads((BENCHMARKS / "results" / file).read_text())["machine"]["command"]

    assert "--json" in ran.split()
    assert re.sub(r"^python (?!benchmarks/)", "python benchmarks/", ran).replace(" --json", "") == command


def test_every_benchmark_is_named_and_no_other() -> None:
    named = set(re.findall(r"`(?:python benchmarks/)?(\w+\.py)", PAGE))

    assert named == {path.name for path in BENCHMARKS.glob("*.py")}


def test_every_result_is_named_by_a_page() -> None:
    assert [path.name for path in (BENCHMARKS / "results").iterdir() if path.name not in PAGES] == []

"""The documents say what is true: what they name exists. What they show is run by test_document_code.py."""

import re
from pathlib import Path

import pytest

from vmm_dwdp import __version__

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMED_TESTS = sorted(set(re.findall(r"`(tests/\S+?\.py)::(\w+)`", (ROOT / "docs/invariants.md").read_text())))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|benchmarks|docs|vmm_dwdp)/[\w./-]+)", page.read_text())

    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("file", "test"), NAMED_TESTS, ids=[test for _, test in NAMED_TESTS])
def test_named_tests_exist(file: str, test: str) -> None:
    assert f"def {test}(" in (ROOT / file).read_text()


def test_the_changelog_begins_with_the_version() -> None:
    latest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert latest is not None
    assert latest[1] == __version__


def test_every_invariant_names_a_test() -> None:
    text = (ROOT / "docs/invariants.md").read_text()
    invariants = re.split(r"^(?=\d+\. )", text, flags=re.MULTILINE)[1:]

    assert len(invariants) >= 9
    assert all(re.search(r"`tests/\S+::\w+`", invariant) for invariant in invariants)

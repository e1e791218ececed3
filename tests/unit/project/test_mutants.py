"""`make mutants` takes too long to be a test; that its bugs still fit the source is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants.bugs import BUGS
from mutants.seeded import Bug

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_there_is_one_place_for_the_bug_and_tests_to_find_it(bug: Bug) -> None:
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    assert source.count(bug.old) == 1
    if bug.file.endswith(".py"):  # of C, a bug that the compiler finds counts as one that the tests find
        compile(source.replace(bug.old, bug.new), bug.file, "exec")
    for test in bug.tests:
        file, *name = test.split("::")
        assert all(f"def {part}(" in (ROOT / file).read_text(encoding="utf-8") for part in name)

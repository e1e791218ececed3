"""`make fuzz` for a moment: what was found before, and some thousand inputs more."""

from __future__ import annotations

import os

import pytest
from fuzz.targets import CORPUS, TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.parent.name}-{case.name}" for case in CASES])
@pytest.mark.usefixtures("open_descriptors")
def test_what_was_found_before(case: os.PathLike[str]) -> None:
    path = CORPUS / case
    TARGETS[path.parent.name](path.read_bytes())


def _changed(name: str) -> st.SearchStrategy[bytes]:
    """Bytes of the corpus, cut, joined and changed."""
    known = [case.read_bytes() for case in CASES if case.parent.name == name and case.stat().st_size < 200]

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        first, second = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        start, end = draw(st.integers(0, len(first))), draw(st.integers(0, len(second)))
        return first[:start] + draw(st.binary(max_size=8)) + second[end:]

    return st.one_of(st.binary(), change())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.usefixtures("open_descriptors")
def test_no_input_does_harm(name: str) -> None:
    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(_changed(name))
    def harmless(data: bytes) -> None:
        TARGETS[name](data)

    harmless()

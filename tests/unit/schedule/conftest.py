"""What of a pass goes through Python."""

from __future__ import annotations

from typing import Any

import pytest

from vmm_dwdp.schedule.schedule import Schedule


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The acquires and releases that Python's schedule is asked for."""
    asked: list[tuple[str, int]] = []

    def listed(name: str, original: Any) -> Any:
        def asking(schedule: Schedule, number: int, *rest: Any) -> Any:
            asked.append((name, number))
            return original(schedule, number, *rest)

        return asking

    for name in "acquire", "release":
        monkeypatch.setattr(Schedule, name, listed(name, getattr(Schedule, name)))
    return asked

"""Of tests that need a rendezvous."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Private, and not made yet."""
    return tmp_path / "rendezvous"

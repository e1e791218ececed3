"""Of tests that need a rendezvous."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.doors import Place, TCPPlace, UnixPlace

from vmm_dwdp.group import tcp_door


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Private, and not made yet."""
    return tmp_path / "rendezvous"


@pytest.fixture
def unix(directory: Path) -> UnixPlace:
    """That directory."""
    return UnixPlace(directory)


@pytest.fixture
def tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TCPPlace:
    """Addresses of this host; nobody there is waited for long."""
    monkeypatch.setattr(tcp_door.TCPDoor, "look_seconds", 0.1)
    monkeypatch.setattr(tcp_door, "_ATTEMPT_SECONDS", 0.1)
    return TCPPlace(tmp_path / "tcp")


@pytest.fixture(params=["unix", "tcp"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each kind in turn."""
    found: Place = request.getfixturevalue(request.param)
    return found

"""Fixtures for all tests: drivers, and the proof that a test left nothing behind.

With ``WITHOUT_NATIVE=1`` in the environment the tests run as where there was no C compiler at installation.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

if os.environ.get("WITHOUT_NATIVE"):
    sys.modules["vmm_dwdp.allocator._native"] = None  # type: ignore[assignment]

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger, ResourceStack


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is false here")


def _in_use() -> Counter[str]:
    """What this process has of ours, as the kernel and the interpreter count it."""
    counts: Counter[str] = Counter()
    for descriptor in os.scandir("/proc/self/fd"):
        try:
            counts["memory files"] += "memfd:vmm_dwdp" in os.readlink(descriptor)
        except FileNotFoundError:
            continue  # the descriptor of this very directory
    counts["mapped memory files"] = Path("/proc/self/maps").read_text().count("memfd:vmm_dwdp")
    counts["threads"] = sum(thread.name.startswith("vmm-dwdp") for thread in threading.enumerate())
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            counts["native threads"] += (task / "comm").read_text().startswith("vmm-dwdp")
    return counts


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = _in_use()
    yield
    assert _in_use() == before, "the test left memory or threads behind"


@pytest.fixture
def open_descriptors() -> Iterator[None]:
    """The test leaves as many descriptors of any kind open as it found."""
    before = os.listdir("/proc/self/fd")
    yield
    if os.listdir("/proc/self/fd") != before:
        gc.collect()  # what nobody can reach is as good as closed
    assert os.listdir("/proc/self/fd") == before, "the test left descriptors open"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Each driver in turn; the host's has pages of 4 KiB."""
    return open_driver(torch.device(request.param), granularity=4096 if request.param == "cpu" else None)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """A ledger that must read zero after the test."""
    ledger = Ledger()
    yield ledger
    assert ledger.open() == []


@pytest.fixture
def stack(ledger: Ledger) -> Iterator[ResourceStack]:
    """Closed after the test, before the ledger is read."""
    with ResourceStack() as stack:
        yield stack

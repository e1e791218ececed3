"""Nodes as the kernel lists them, and the thread that gives copies to a driver near its device."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.drivers import NativeDriver
from support.groups import PAGE

from vmm_dwdp.allocator import numa
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.schedule.issue import NativeIssuer, ThreadIssuer, open_issuer

NODE = 3
MANY = 1000  # copies: a thread gives them
DRIVERS: dict[str, Callable[[], HostDriver]] = {"native": NativeDriver, "twin": lambda: HostDriver(PAGE)}


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two nodes; who writes it says which cores each has."""
    (tmp_path / "online").write_text("0,3\n")
    for node in (0, NODE):
        (tmp_path / f"node{node}").mkdir()
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    return tmp_path


@pytest.fixture
def waiting() -> Iterator[int]:
    """The number of a thread that does nothing."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    over.set()
    thread.join()


def test_nodes_are_those_that_are_online(nodes: Path) -> None:
    assert numa.numa_nodes() == [0, 3]
    (nodes / "online").write_text("0-2,5,7-8\n")
    assert numa.numa_nodes() == [0, 1, 2, 5, 7, 8]
    (nodes / "online").unlink()
    assert numa.numa_nodes() == [0]


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_thread_that_gives_copies_stays_near_its_device(
    driver: str, nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, mine = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    (nodes / f"node{NODE}" / "cpulist").write_text(f"{mine},{mine + 1}-{mine + 9}\n")  # some that nobody has
    made = DRIVERS[driver]()
    monkeypatch.setattr(made, "numa_node", NODE)
    issuer = open_issuer(made, Ledger(), MANY)
    try:
        assert isinstance(issuer, NativeIssuer | ThreadIssuer)
        number = issuer._thread.native_id
        assert number not in (None, threading.get_native_id())
        assert os.sched_getaffinity(number) == {mine}
        assert os.sched_getaffinity(0) == allowed, "whoever launches kernels goes where it likes"
    finally:
        issuer.close()
        issuer.free()


@pytest.mark.parametrize("cores", ["", "100000-100003\n", None], ids=["no cores", "cores of others", "unknown"])
def test_a_thread_that_may_not_run_near_the_device_stays_where_it_was(
    cores: str | None, nodes: Path, waiting: int
) -> None:
    if cores is not None:
        (nodes / f"node{NODE}" / "cpulist").write_text(cores)
    before = os.sched_getaffinity(waiting)

    numa.keep_near(waiting, NODE)

    assert os.sched_getaffinity(waiting) == before


def test_what_the_kernel_refuses_is_left(nodes: Path, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (nodes / f"node{NODE}" / "cpulist").write_text("0-100000\n")
    asked = []

    def refuse(thread: int, cores: set[int]) -> None:
        asked.append((thread, cores))
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    numa.keep_near(waiting, NODE)

    assert asked == [(waiting, os.sched_getaffinity(waiting))]

"""A failure at every socket and file operation of set-up, publish and close: named, undone, and a retry works."""

from __future__ import annotations

import os
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.doors import TCPPlace
from support.failing_calls import FILE_CALLS, REASON, SOCKET_CALLS, FailingCalls
from support.groups import PAGE, add_layers, check_pass, fill_shards, random_model

from vmm_dwdp import DWDPConfig, DWDPError, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group.doors import Where

CONFIG = DWDPConfig(group_size=2)
MODEL = random_model({0: {"w": ((4, 1500), torch.float32)}})
# Where a rank answers, or looks whether others live, a failure costs one connection; who asked says so if it matters.
# And a directory that is there already need not be made.
ABSORBED = {"mkdir", "accept", "sendmsg", "recvmsg", "stat", "connect", "socket", "getsockopt"}
MOST_OVER_TCP = 4  # but each rank binds and listens once
MOST = 40  # of the uses: how many there are depends on how often ranks look for each other


def _life(rank: int, rendezvous: Where, timeout: float) -> list[str]:
    """Everything that a rank does; returns what it was told by an error, and leaves nothing open."""
    driver = HostDriver(PAGE)
    try:
        runtime = DWDPRuntime(CONFIG, rank, "cpu", rendezvous, driver=driver)
    except DWDPError as error:
        return _told(error)
    told = []
    try:
        add_layers(runtime, MODEL)
        fill_shards(runtime, MODEL)
        runtime.publish(timeout)
        check_pass(runtime, MODEL)
        runtime.close()
    except DWDPError as error:
        traceback.clear_frames(error.__traceback__)
        told = _told(error)
        with suppress(DWDPError):
            runtime.close()
    assert runtime.close().open() == []
    return told


def _told(error: DWDPError) -> list[str]:
    return [str(error), *getattr(error, "__notes__", [])]


def _lives(rendezvous: Where, timeout: float = 60) -> list[str]:
    """What the ranks of a group were told by errors."""
    with ThreadPoolExecutor(2) as pool:
        return [line for told in pool.map(lambda rank: _life(rank, rendezvous, timeout), range(2)) for line in told]


@pytest.mark.parametrize("call", [*FILE_CALLS, *SOCKET_CALLS])
def test_a_failing_operation_is_named_and_everything_is_undone(call: str, tmp_path: Path) -> None:
    rendezvous = tmp_path / "rendezvous"
    assert _lives(rendezvous) == []
    before = os.listdir("/proc/self/fd")
    at = 0
    for at in range(1, MOST + 1):
        rendezvous.rmdir()
        faults = FailingCalls(call, at)
        with faults.installed():
            told = _lives(rendezvous, timeout=0.3)
        if not faults.failed:
            break
        assert any(REASON in line for line in told) or call in ABSORBED, (at, told)
        assert os.listdir("/proc/self/fd") == before, (at, told)
        assert not any(thread.name.startswith("vmm-dwdp") for thread in threading.enumerate())
        if call == "unlink":  # what cannot be removed stays, and the token for its sake
            for path in rendezvous.glob("*token*"):
                path.unlink()
        rendezvous.mkdir(mode=0o700, exist_ok=True)
        assert list(rendezvous.iterdir()) == [], (at, told)
    assert at > 1, "the call is not used at all"
    assert _lives(rendezvous) == []


@pytest.mark.parametrize("call", SOCKET_CALLS)
def test_the_same_over_tcp(call: str, tmp_path: Path) -> None:
    rendezvous = TCPPlace(tmp_path, group_size=2).rendezvous
    assert _lives(rendezvous) == []
    before = os.listdir("/proc/self/fd")
    for at in range(1, 1 + (2 if call in {"bind", "listen"} else MOST_OVER_TCP)):
        faults = FailingCalls(call, at)
        with faults.installed():
            told = _lives(rendezvous, timeout=0.3)
        assert faults.failed, "the call is not used as often"
        assert any(REASON in line for line in told) or call in ABSORBED, (at, told)
        assert os.listdir("/proc/self/fd") == before, (at, told)
        assert not any(thread.name.startswith("vmm-dwdp") for thread in threading.enumerate())
    assert _lives(rendezvous) == []


def test_a_socket_that_could_not_be_listened_at_is_gone_while_others_are_there(tmp_path: Path) -> None:
    rendezvous = tmp_path / "rendezvous"
    other = DWDPRuntime(CONFIG, 0, "cpu", rendezvous, driver=HostDriver(PAGE))  # the last to leave would remove it
    before = sorted(rendezvous.iterdir())
    runtime = DWDPRuntime(CONFIG, 1, "cpu", rendezvous, driver=HostDriver(PAGE))
    add_layers(runtime, MODEL)
    fill_shards(runtime, MODEL)
    with FailingCalls("listen", 1).installed(), pytest.raises(DWDPError, match=REASON):
        runtime.publish(0.3)
    assert sorted(rendezvous.iterdir()) == before
    assert [each.close().open() for each in (runtime, other)] == [[], []]

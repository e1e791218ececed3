"""Temporary folders of killed processes are swept, and only those: by real processes, killed for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.groups import PAGE

import vmm_dwdp
from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group import rendezvous
from vmm_dwdp.group.rendezvous import Rendezvous
from vmm_dwdp.temporary import sweep, temporary_folder

pytestmark = pytest.mark.usefixtures("open_descriptors")

OF_A_COMMAND = """
from vmm_dwdp.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "weights").write_bytes(bytes(100))
    print(folder, flush=True)
    input()
"""
OF_A_GROUP = """
import socket, sys
from vmm_dwdp.group.rendezvous import Rendezvous
meeting = Rendezvous(sys.argv[1])
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(str(meeting.socket_path(int(sys.argv[2]))))
    print(sys.argv[1], flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for this process and those that it starts."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(vmm_dwdp.__file__).parents[1]))
    return folder


@contextmanager
def running(program: str, *words: str) -> Iterator[Path]:
    """The folder of a process that has made it; the process is killed at the end."""
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Path(process.stdout.readline().strip())
        finally:
            process.send_signal(signal.SIGKILL)


def group_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="vmm-dwdp-"))


def test_what_a_killed_command_leaves_is_swept_once_it_is_dead() -> None:
    with running(OF_A_COMMAND) as folder:
        sweep()
        assert (folder / "weights").exists()
    assert (folder / "weights").exists()
    sweep()
    assert not folder.exists()


def test_a_group_is_swept_once_its_last_rank_is_dead() -> None:
    folder = group_folder()
    with running(OF_A_GROUP, str(folder), "0"):
        with running(OF_A_GROUP, str(folder), "1"):
            pass
        sweep()
        assert {entry.name for entry in folder.iterdir()} == {"token", "rank-0", "rank-1"}
    sweep()
    assert not folder.exists()


def test_a_folder_stays_while_ranks_live_in_it_though_its_command_is_dead() -> None:
    with running(OF_A_COMMAND) as folder:
        pass
    with running(OF_A_GROUP, str(folder / "group"), "0"):
        sweep()
        assert (folder / "weights").exists()
    sweep()
    assert not folder.exists()


def test_the_next_start_sweeps_and_spares_where_it_meets() -> None:
    with running(OF_A_COMMAND) as folder, running(OF_A_GROUP, str(group_folder()), "0") as own:
        pass
    for rank, gone in ((1, False), (0, True)):
        config = DWDPConfig(group_size=2)
        with DWDPRuntime(config, rank, "cpu", own, driver=HostDriver(PAGE)):
            assert own.exists()
        assert folder.exists() != gone


def test_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(OF_A_COMMAND) as folder:
        pass
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    sweep()
    assert (folder / "weights").exists()


def being_made(folder: Path) -> Path:
    made = folder / "vmm-dwdp-abcdefg1"
    made.mkdir()
    return made


def with_more_than_a_group_has(folder: Path) -> Path:
    made = being_made(folder)
    (made / "token").touch()
    (made / "results").touch()
    return made


def of_another_name(folder: Path) -> Path:
    made = folder / "vmm-dwdp-my-group"
    made.mkdir()
    (made / "held").touch()
    return made


def a_link(folder: Path) -> Path:
    target = folder / "target"
    target.mkdir()
    (target / "held").touch()
    (folder / "vmm-dwdp-abcdefg1").symlink_to(target)
    return target


def a_mark_that_is_a_link(folder: Path) -> Path:
    elsewhere = folder / "elsewhere"
    elsewhere.touch()
    made = being_made(folder)
    (made / "held").symlink_to(elsewhere)
    return elsewhere


LEFT_ALONE = [being_made, with_more_than_a_group_has, of_another_name, a_link, a_mark_that_is_a_link]


@pytest.mark.parametrize("make", LEFT_ALONE)
def test_what_is_left_alone(make: Callable[[Path], Path], temporary: Path) -> None:
    made = make(temporary)
    before = sorted(temporary.rglob("*"))
    sweep()
    assert made.exists()
    assert sorted(temporary.rglob("*")) == before


def test_a_folder_is_never_swept_while_it_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep before and after each step by which a folder gets its mark."""
    swept = []

    def with_sweeps(owner: object, name: str) -> None:
        step = getattr(owner, name)

        def stepping(*arguments: object, **keywords: object) -> object:
            sweep()
            try:
                return step(*arguments, **keywords)
            finally:
                sweep()
                swept.append(name)

        monkeypatch.setattr(owner, name, stepping)

    for name in ("mkdtemp", "mkstemp"):
        with_sweeps(tempfile, name)
    for name in ("link", "rename"):
        with_sweeps(os, name)
    with_sweeps(rendezvous._Presence, "share")
    with ExitStack() as folders:
        folder = folders.enter_context(temporary_folder())
        assert (folder / "held").exists()
        meeting = Rendezvous(group_folder())
        folders.callback(meeting.leave)
        assert meeting.token_is_there()
    assert {"mkdtemp", "mkstemp", "link", "rename", "share"} <= set(swept)


def test_a_temporary_folder_goes_at_its_end(temporary: Path) -> None:
    with temporary_folder() as folder:
        (folder / "inside").mkdir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []

"""The directory in which ranks meet is private, and its token is there as long as anybody has read it."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from support.doors import UnixPlace, exchange, serving, soon

from vmm_dwdp import ExchangeError
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.group import rendezvous
from vmm_dwdp.group.rendezvous import TOKEN_NBYTES, Rendezvous

pytestmark = pytest.mark.usefixtures("open_descriptors")


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o740, 0o702, 0o720, 0o777])
def test_a_directory_that_others_may_enter(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ExchangeError, match=r"open to other users .*: chmod 700"):
        Rendezvous(directory)
    assert list(directory.iterdir()) == []


def test_a_directory_of_somebody_else(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(0o700)
    somebody_else = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody_else)
    with pytest.raises(ExchangeError, match="belongs to user"):
        Rendezvous(directory)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_directory(directory: Path, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "elsewhere").mkdir(0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExchangeError, match="not a directory"):
        Rendezvous(directory)


def test_a_file(directory: Path) -> None:
    directory.touch(0o600)
    with pytest.raises(ExchangeError, match="is not a directory: name one, or one to be made"):
        Rendezvous(directory)


def test_a_directory_that_is_read_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write everywhere, so the kernel's answer is given here."""
    directory.mkdir(0o700)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(ExchangeError, match="is read-only"):
        Rendezvous(directory)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_token_that_is_a_link(directory: Path, tmp_path: Path, there: bool) -> None:
    directory.mkdir(0o700)
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.write_bytes(bytes(TOKEN_NBYTES))
    (directory / "token").symlink_to(elsewhere)
    with pytest.raises(ExchangeError, match="symbolic links"):
        Rendezvous(directory)
    assert elsewhere.exists() == there


@pytest.mark.parametrize("nbytes", [0, TOKEN_NBYTES - 1, TOKEN_NBYTES + 1])
def test_a_token_of_another_size(directory: Path, nbytes: int) -> None:
    directory.mkdir(0o700)
    (directory / "token").write_bytes(bytes(nbytes))
    with pytest.raises(ExchangeError, match="not a token of 32 bytes"):
        Rendezvous(directory)


def test_the_token_is_private_equal_for_all_and_another_in_every_directory(tmp_path: Path) -> None:
    first, second, other = Rendezvous(tmp_path / "a"), Rendezvous(tmp_path / "a"), Rendezvous(tmp_path / "b")
    assert first.token == second.token != other.token
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "token").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["token"]


def test_a_second_leave_does_not_take_the_next_group_s_token(directory: Path) -> None:
    before = Rendezvous(directory)
    before.leave()
    after = Rendezvous(directory)
    before.leave()
    assert Rendezvous(directory).token == after.token


def test_a_token_is_there_as_long_as_anybody_has_read_it(directory: Path) -> None:
    """Be it the first who leaves, or one that comes and goes before anybody listens."""
    first, second = Rendezvous(directory), Rendezvous(directory)
    first.leave()
    again = Rendezvous(directory)
    assert again.token == second.token
    second.leave()
    again.leave()
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("before", ["mkstemp", "lstat"])
def test_a_rank_that_enters_when_all_others_have_left_makes_their_directory_anew(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which goes with the last of those who were told of it, and one may be late: the others were refused meanwhile."""
    group, directory = dist.ProcessGroup(0, 1), tmp_path / "told"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(rendezvous, "agree_on_directory", lambda group: directory)
    whose, others = {"mkstemp": tempfile, "lstat": Path}[before], []
    original = getattr(whose, before)

    def late(*given: object, **more: object) -> object:
        if not others and (before == "mkstemp" or given == (directory,)):
            others.append(True)
            Rendezvous(group).leave()
            assert not directory.exists()
        return original(*given, **more)

    monkeypatch.setattr(whose, before, late)
    entered = Rendezvous(group)
    assert others
    assert Rendezvous(group).token == entered.token
    entered.leave()


def test_a_directory_that_was_named_and_cannot_be_made_is_refused_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **more: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(tempfile, "mkstemp", gone)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(ExchangeError, match="cannot be used: No such file or directory"):
        Rendezvous(directory)


def test_the_last_to_leave_removes_what_the_dead_have_left(directory: Path) -> None:
    here = Rendezvous(directory)
    for name in "rank-2", ".rank-1-77":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(directory / name))
    (directory / "rank-notes").touch()
    here.leave()
    assert [entry.name for entry in directory.iterdir()] == ["rank-notes"], "a file is not ours"


@pytest.mark.parametrize("leaves", ["the child", "the parent"])
def test_a_forked_child_neither_leaves_for_its_parent_nor_stays_for_it(directory: Path, leaves: str) -> None:
    here, other = Rendezvous(directory), Rendezvous(directory)
    other.leave()
    ended, end = os.pipe()
    child = os.fork()
    if not child:
        if leaves == "the child":
            here.leave()
        else:
            os.close(end)
            os.read(ended, 1)
        os._exit(0)
    os.close(ended)
    if leaves == "the child":
        os.waitpid(child, 0)
        assert Rendezvous(directory).token == here.token
    here.leave()
    assert list(directory.iterdir()) == [], "the child's copy of the lock counts"
    os.close(end)
    if leaves == "the parent":
        os.waitpid(child, 0)


def test_a_rank_whose_token_was_taken_away_is_told_so(unix: UnixPlace, ledger: Ledger) -> None:
    """By a cleaner of temporary directories, for example: those who come later share another token."""
    early, directory = exchange(unix.door(1), ledger, 1), unix.directory
    (directory / "token").unlink()
    with serving(unix, ledger, 0) as late:
        with pytest.raises(ExchangeError, match=r"does not know this rank's token: .* was emptied, or made anew"):
            early.collect(0, 0, {"device": 2}, soon())
        with pytest.raises(
            ExchangeError, match=r"rank 1 did not come: .*; but a process came that knows another token"
        ):
            late.collect(1, 1, {"device": 2}, time.monotonic())
        early.close()
        assert (directory / "rank-0").is_socket(), "who leaves removes what is its own"
        assert (directory / "token").exists()


def test_a_rank_that_leaves_keeps_its_hands_off_another_s_socket(unix: UnixPlace, ledger: Ledger) -> None:
    before = exchange(unix.door(0), ledger, 0)
    before.serve(soon())
    (unix.directory / "rank-0").unlink()
    with serving(unix, ledger, 0), serving(unix, ledger, 1) as door:
        before.close()
        assert door.alive(0, soon())

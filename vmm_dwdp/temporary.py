"""Temporary folders, and what killed processes have left of them.

[Note: Left folders]
    Two kinds of folders ``vmm-dwdp-XXXXXXXX`` are made in the system's temporary folder: by `temporary_folder`, whose
    process keeps a file ``held`` in it locked, and for the ranks of a process group, which keep their token locked (see
    [Note: Presence] in group/rendezvous.py). The kernel unlocks the files of a process that dies, however it dies. So
    nobody lives in a folder in which all such files can be locked, and those ranks that come to it late belong to a
    group that has lost a rank. A folder without such a file is just being made: it is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PREFIX: Final = "vmm-dwdp-"
_MADE: Final = re.compile(_PREFIX + r"[a-z0-9_]{8}")  # what `tempfile` makes of the prefix
_HELD, _TOKEN = "held", "token"
_OF_A_GROUP: Final = re.compile(r"token|\.token-.*|\.?rank-.*")  # all that ranks put into a rendezvous


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new private folder, removed at the end; if this process is killed, by the next start of a group."""
    with contextlib.ExitStack() as after, tempfile.TemporaryDirectory(prefix=_PREFIX) as made:
        folder = Path(made)
        held = os.open(folder / f".{_HELD}", os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o600)
        after.callback(os.close, held)
        fcntl.flock(held, fcntl.LOCK_SH)
        os.rename(folder / f".{_HELD}", folder / _HELD)  # nobody sees it unlocked
        yield folder


def sweep(spare: str | os.PathLike[str] | None = None) -> None:
    """Remove what this user's killed processes have left in the system's temporary folder; see [Note: Left folders].

    Args:
        spare: a folder that is left alone, because a group is about to meet there.

    What cannot be removed stays; nothing is raised for it.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if _MADE.fullmatch(entry.name) and (spare is None or not _is_same(entry.path, spare)):
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _is_same(path: str, other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _remove_if_left(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    inside = set(os.listdir(folder))
    if _HELD not in inside and not (_TOKEN in inside and all(map(_OF_A_GROUP.fullmatch, inside))):
        return
    with contextlib.ExitStack() as locked:
        if all(_lock(path, locked) for path in folder.rglob("*") if path.name in {_HELD, _TOKEN}):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(path: Path, locked: contextlib.ExitStack) -> bool:
    """Hold the file alone until ``locked`` is left; whether nobody else held it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    locked.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.path.samestat(os.fstat(descriptor), path.lstat())

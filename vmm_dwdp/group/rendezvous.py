"""The private directory in which the ranks of one group find each other, and the token that proves membership.

[Note: Presence]
Whoever has read the token keeps its file locked, shared with all others, until it leaves. The last to leave is the one
that gets the lock for itself alone: it removes the token, and what ranks that died have left there. The kernel unlocks
for a process that dies. A forked child gives up its copy of the descriptor at once, so that it does not stand for its
parent; one that executes another program has none.

A directory that was made for a process group goes with the last of those who came. A rank that is late, when all others
were refused, say, and have left, makes it anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch.distributed as dist

from vmm_dwdp.allocator.machine import machine_id
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ExchangeError

TOKEN_NBYTES: Final = 32
_TOKEN_FILE: Final = "token"
_RETRY_SECONDS: Final = 0.01
_TAKES_SECONDS: Final = 10.0  # far more than anybody takes to make or remove a file


class Rendezvous:
    """A directory of mode 0700 that belongs to this user, with one socket per rank and a token of mode 0600.

    The first rank to come makes what is missing, and the last to leave removes it: see [Note: Presence]. Nothing in it
    is followed if it is a symbolic link.

    Attributes:
        token: equal on all ranks that share the directory, and unreadable to other users.

    Raises:
        ExchangeError: the directory belongs to somebody else, or others may enter it.
    """

    def __init__(self, where: str | os.PathLike[str] | dist.ProcessGroup) -> None:
        """``where``: a directory that all ranks name, or a process group of the ranks (then the call is collective)."""
        self._temporary = isinstance(where, dist.ProcessGroup)
        directory = agree_on_directory(where) if isinstance(where, dist.ProcessGroup) else where
        self.directory = Path(directory)
        self._token_path = self.directory / _TOKEN_FILE
        self._presence: _Presence | None = None
        self._socket: tuple[Path, os.stat_result] | None = None
        try:
            self.token = self._read_token(self._enter(time.monotonic() + _TAKES_SECONDS))
        except BaseException as error:
            with contextlib.suppress(ExchangeError):
                self.leave()
            if isinstance(error, OSError):
                raise ExchangeError(f"the rendezvous {directory} cannot be used: {error.strerror}") from error
            raise

    def socket_path(self, rank: int) -> Path:
        """Where ``rank`` listens."""
        return self.directory / f"rank-{rank}"

    def listens_at(self, path: Path) -> None:
        """This process has made the socket at ``path``: `leave` removes it, unless another has taken its place."""
        self._socket = path, path.lstat()

    def token_is_there(self) -> bool:
        """Whether the directory still has the token that this process has read."""
        return self._presence is not None and self._presence.is_held and self._presence.is_at(self._token_path)

    @contextlib.contextmanager
    def locked(self, deadline: float) -> Iterator[None]:
        """One process at a time, and within one, one thread; the kernel unlocks for a process that dies.

        Raises `OSError` if the directory cannot be locked by the deadline.
        """
        with uninterrupted():
            opened = _Opened(os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            while not opened.alone():
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked")
                time.sleep(_RETRY_SECONDS)
            yield
        finally:
            opened.close()

    def _make(self) -> None:
        """The directory, if it is missing. Raises `ExchangeError` if what is there cannot be used."""
        if not os.path.lexists(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise ExchangeError(f"the rendezvous {self.directory} is not a directory: name one, or one to be made")
        if found.st_uid != os.getuid():
            raise ExchangeError(f"the rendezvous {self.directory} belongs to user {found.st_uid}, not to this one")
        if found.st_mode & 0o077:
            mode = stat.filemode(found.st_mode)
            raise ExchangeError(f"the rendezvous {self.directory} is open to other users ({mode}): chmod 700")
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise ExchangeError(f"the rendezvous {self.directory} is read-only: ranks make files in it")

    def _enter(self, deadline: float) -> _Presence:
        """Be present at the token that is in the directory; or at one of this rank's own, if there is none yet. The
        directory is made if it is missing."""
        while True:
            presence = None
            try:
                self._make()
                with uninterrupted():  # what is taken is `leave`'s to give back
                    presence = self._presence = self._offer() or self._open()
            except FileNotFoundError:
                if not self._temporary or time.monotonic() > deadline:
                    raise
                # all others have come and left meanwhile, and the last has removed it
            if presence is not None:
                if presence.share() and presence.is_at(self._token_path):
                    return presence
                presence.close()  # the last of those before is about to remove it, or has just done so
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps its token locked")
            time.sleep(_RETRY_SECONDS)

    def _offer(self) -> _Presence | None:
        """A new token, by a link that succeeds for one rank only: nobody sees half of it, nor one that is not held."""
        if os.path.lexists(self._token_path):
            return None
        descriptor, offered = tempfile.mkstemp(dir=self.directory, prefix=".token-")
        presence = _Presence(descriptor)
        try:
            os.write(descriptor, secrets.token_bytes(TOKEN_NBYTES))
            presence.share()
            os.link(offered, self._token_path)
        except FileExistsError:
            presence.close()
            return None  # another rank was first
        except BaseException:
            presence.close()
            raise
        finally:
            os.unlink(offered)
        return presence

    def _open(self) -> _Presence | None:
        try:
            return _Presence(os.open(self._token_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def _read_token(self, presence: _Presence) -> bytes:
        token = os.pread(presence.descriptor, TOKEN_NBYTES + 1, 0)
        if len(token) != TOKEN_NBYTES:
            raise ExchangeError(f"{self._token_path} is not a token of {TOKEN_NBYTES} bytes")
        return token

    def leave(self) -> None:
        """Remove what this process has in the directory; the last to leave also removes the token, what the dead have
        left, and a directory made for the group.

        Raises `ExchangeError` if something cannot be removed; another call tries again, and does nothing after success.
        """
        presence = self._presence
        if presence is None or not presence.is_held:  # left already, or a forked child
            return
        try:
            if self._socket is not None and _is_same(*self._socket):
                self._socket[0].unlink(missing_ok=True)
            if presence.alone() and presence.is_at(self._token_path):
                self._remove_all()
            presence.close()
        except OSError as error:
            if presence.is_held:  # so that others do not wait for who has failed to leave
                presence.share()
            raise ExchangeError(f"cannot leave the rendezvous {self.directory}: {error.strerror}") from error

    def _remove_all(self) -> None:
        """The token last: until then nobody enters."""
        for name in os.listdir(self.directory):
            path = self.directory / name
            if name.lstrip(".").startswith("rank-") and stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink(missing_ok=True)
        self._token_path.unlink(missing_ok=True)
        if self._temporary and not os.listdir(self.directory):
            self.directory.rmdir()


class _Opened:
    """A file that can be locked. The descriptor is closed with the object, and in a forked child."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        _opened.add(self)

    def alone(self) -> bool:
        """Hold it alone, if nobody else holds it. Otherwise it is not held any more, and one of the others is last."""
        return _lock(self.descriptor, fcntl.LOCK_EX)


class _Presence(_Opened):
    """An open token."""

    @property
    def is_held(self) -> bool:
        return self.close.alive

    def share(self) -> bool:
        """Hold it together with others; fails while one that leaves holds it alone."""
        return _lock(self.descriptor, fcntl.LOCK_SH)

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` still names this very file."""
        return _is_same(path, os.fstat(self.descriptor))


_opened: Final[weakref.WeakSet[_Opened]] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: the lock goes with the parent's descriptor, and no copy of it keeps it."""
    for opened in list(_opened):
        opened.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), found)
    except FileNotFoundError:
        return False


def agree_on_directory(group: dist.ProcessGroup) -> Path:
    """A new private directory whose name the first rank of ``group`` tells the others. A collective call.

    Raises `ExchangeError`, on all ranks, if they are not on one machine.
    """
    machines: list[bytes | None] = [None] * group.size()
    dist.all_gather_object(machines, machine_id(), group=group)
    if (number := len(set(machines))) > 1:
        raise ExchangeError(
            f"the ranks of the process group are on {number} hosts, between which no file descriptor goes: "
            "give TCPRendezvous(group, interface=...) as rendezvous, for which memory needs fabric handles"
        )
    told: list[str | None] = [tempfile.mkdtemp(prefix="vmm-dwdp-") if group.rank() == 0 else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[0] is None:
        raise ExchangeError("the first rank of the process group told no rendezvous directory")
    return Path(told[0])

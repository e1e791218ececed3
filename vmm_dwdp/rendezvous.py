"""The private directory in which the ranks of one group find each other, and the token that proves membership."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch.distributed as dist

from vmm_dwdp.errors import ExchangeError

TOKEN_NBYTES: Final = 32
_TOKEN_FILE: Final = "token"
_RETRY_SECONDS: Final = 0.01


class Rendezvous:
    """A directory of mode 0700 that belongs to this user, with one socket per rank and a token of mode 0600.

    The first rank to come makes what is missing. Nothing in it is followed if it is a symbolic link.

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
        self._left = False
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise ExchangeError(f"the rendezvous {directory} is not a directory")
            if found.st_uid != os.getuid():
                raise ExchangeError(f"the rendezvous {directory} belongs to user {found.st_uid}, not to this one")
            if found.st_mode & 0o077:
                mode = stat.filemode(found.st_mode)
                raise ExchangeError(f"the rendezvous {directory} is open to other users ({mode}); it must be private")
            self.token = self._agree_on_token()
        except OSError as error:
            with contextlib.suppress(ExchangeError):
                self.leave(None)
            raise ExchangeError(f"the rendezvous {directory} cannot be used: {error.strerror}") from error

    def socket_path(self, rank: int) -> Path:
        """Where ``rank`` listens."""
        return self.directory / f"rank-{rank}"

    @contextlib.contextmanager
    def locked(self, deadline: float) -> Iterator[None]:
        """One process at a time, and within one, one thread; the kernel unlocks for a process that dies.

        Raises `OSError` if the directory cannot be locked by the deadline.
        """
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked") from error
                time.sleep(_RETRY_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _agree_on_token(self) -> bytes:
        """Read the token; or offer one, by a link that succeeds for one rank only: nobody sees half of it."""
        path = self.directory / _TOKEN_FILE
        if not path.exists():
            descriptor, offered = tempfile.mkstemp(dir=self.directory, prefix=".token-")
            try:
                with open(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(TOKEN_NBYTES))
                os.link(offered, path)
            except FileExistsError:
                pass  # another rank was first
            finally:
                os.unlink(offered)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            token = os.read(descriptor, TOKEN_NBYTES + 1)
        finally:
            os.close(descriptor)
        if len(token) != TOKEN_NBYTES:
            raise ExchangeError(f"{path} is not a token of {TOKEN_NBYTES} bytes")
        return token

    def leave(self, rank: int | None) -> None:
        """Remove the socket of ``rank``, unless this process never listened at one (``None``); the last to leave also
        removes the token, and a directory made for the group.

        Raises `ExchangeError` if something cannot be removed; another call tries again, and does nothing after success.
        """
        if self._left:
            return
        try:
            if rank is not None:
                self.socket_path(rank).unlink(missing_ok=True)
            if set(os.listdir(self.directory)) <= {_TOKEN_FILE}:
                (self.directory / _TOKEN_FILE).unlink(missing_ok=True)
                if self._temporary:
                    self.directory.rmdir()
        except FileNotFoundError:
            pass  # another rank, leaving at the same moment, was faster
        except OSError as error:
            raise ExchangeError(f"cannot leave the rendezvous {self.directory}: {error.strerror}") from error
        self._left = True


def agree_on_directory(group: dist.ProcessGroup) -> Path:
    """A new private directory whose name the first rank of ``group`` tells the others. A collective call."""
    told: list[str | None] = [tempfile.mkdtemp(prefix="vmm-dwdp-") if group.rank() == 0 else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[0] is None:
        raise ExchangeError("the first rank of the process group told no rendezvous directory")
    return Path(told[0])

"""Socket and file operations of the exchange that fail where a test tells them to."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

FILE_CALLS: Final = ("mkdir", "stat", "open", "pread", "close", "link", "unlink", "replace", "listdir")
SOCKET_CALLS: Final = ("socket", "getsockopt", "bind", "listen", "connect", "accept", "sendmsg", "recvmsg")
REASON: Final = os.strerror(errno.EMFILE)
_CALLERS: Final = {
    *("rendezvous.py", "unix_door.py", "tcp_door.py", "addresses.py", "transport.py", "sharing.py", "limits.py")
}
_FRAMES: Final = 6  # how far from our code the call may be: pathlib and tempfile make some of them


class FailingCalls:
    """The ``at``-th use of ``call`` by the exchange, the rendezvous or what they use fails for want of descriptors.

    Attributes:
        failed: whether it came to that.
    """

    def __init__(self, call: str, at: int) -> None:
        self.failed = False
        self._call = call
        self._at = at
        self._uses = 0
        self._lock = threading.Lock()

    def count(self) -> None:
        """One more use: raises at the one that is to fail."""
        with self._lock:
            self._uses += 1
            fails = self._uses == self._at
            self.failed |= fails
        if fails:
            raise OSError(errno.EMFILE, REASON)

    @contextmanager
    def installed(self) -> Iterator[None]:
        if self._call in FILE_CALLS:
            with mock.patch.object(os, self._call, self._counted(getattr(os, self._call))):
                yield
        else:
            with mock.patch.object(socket, "socket", self._socket_type()):
                yield

    def _counted(self, made: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            ours = _is_ours(sys._getframe(1))
            if self._call == "close":  # a descriptor is gone even if the kernel has something to tell
                made(*args, **kwargs)
            if ours:
                self.count()
            return None if self._call == "close" else made(*args, **kwargs)

        return counted

    def _socket_type(self) -> type[socket.socket]:
        faults = self

        class Socket(socket.socket):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                if faults._call == "socket" and "fileno" not in kwargs and len(args) < 4:
                    faults.count()
                super().__init__(*args, **kwargs)

        def counted(self: socket.socket, *args: Any) -> Any:
            faults.count()
            return getattr(super(Socket, self), faults._call)(*args)

        if self._call != "socket":
            setattr(Socket, self._call, counted)
        return Socket


def _is_ours(frame: Any) -> bool:
    for _ in range(_FRAMES):
        if frame is None:
            return False
        name = Path(frame.f_code.co_filename).name
        if name in _CALLERS or name == "handles.py":  # whose calls the tests of the driver let fail
            return name in _CALLERS
        frame = frame.f_back
    return False

"""What the operating system allows one process: reserved before anything is taken, and given back."""

from __future__ import annotations

import os
import resource
import threading
from typing import Final

from vmm_dwdp.errors import ConfigError

_lock: Final = threading.Lock()  # guards what follows
_reserved: Final[dict[DescriptorReservation, int]] = {}  # by reservation, how many are not open yet
_raised: tuple[int, int] | None = None  # the soft limit before and after it was raised


class DescriptorReservation:
    """Leave for this process to open ``count`` more files, its soft limit raised if need be.

    Several at once are counted together. `settle` when the files are open: from then on the kernel counts them. The
    soft limit stays raised as long as they are, until the last reservation is closed: below the number of open files
    nobody in this process could open another.

    Raises `ConfigError` if the hard limit is lower, or if not even the open ones can be counted.
    """

    def __init__(self, count: int) -> None:
        global _raised
        with _lock:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            try:
                needed = len(os.listdir("/proc/self/fd")) + sum(_reserved.values()) + count
            except OSError as error:
                raise ConfigError(f"the open files of this process cannot be counted: {error.strerror}") from error
            if hard != resource.RLIM_INFINITY and needed > hard:
                raise ConfigError(
                    f"sharing memory with the other ranks takes {count} file descriptors, "
                    f"but a process may open {hard}, and this one has or awaits {needed - count} others"
                )
            if soft != resource.RLIM_INFINITY and needed > soft:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                _raised = (soft if _raised is None else _raised[0]), hard
            _reserved[self] = count

    def settle(self) -> None:
        """What was reserved is open now, or not needed any more."""
        with _lock:
            if self in _reserved:
                _reserved[self] = 0

    def close(self) -> None:
        """Nothing of it is open any more. The last to close lowers the soft limit, unless others have set it since."""
        global _raised
        with _lock:
            _reserved.pop(self, None)
            if _reserved or _raised is None:
                return
            before, after = _raised
            _raised = None
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft == after:
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, hard) if hard >= 0 else before, hard))

"""Which machine this is: what tells hosts apart that may have been given one name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import socket
from pathlib import Path
from typing import Final

MACHINE_NBYTES: Final = 16


@functools.cache
def machine_id() -> bytes:
    """`MACHINE_NBYTES` bytes, equal in all processes that run on one kernel, in containers too; others after a boot."""
    found = socket.gethostname()  # where there is no /proc
    with contextlib.suppress(OSError):
        found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return hashlib.sha256(found.encode()).digest()[:MACHINE_NBYTES]

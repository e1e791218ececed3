"""The NUMA nodes of this machine, and threads that stay near one."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_NODES = Path("/sys/devices/system/node")  # missing where the kernel knows no NUMA


def numa_nodes() -> list[int]:
    """The numbers of the nodes that are there, in order; node 0 at least."""
    online = _NODES / "online"
    return _numbers(online.read_text()) if online.exists() else [0]


def keep_near(thread: int, node: int) -> None:
    """Let a thread of this process run only on those of its cores that are near ``node``.

    Where none of them is, or it is not known, or the kernel refuses, it stays where it was. Any thread may call it.

    Args:
        thread: its number in the kernel, `threading.Thread.native_id`. A thread may run where the one that made it may.
    """
    with suppress(OSError):
        cores = _numbers((_NODES / f"node{node}" / "cpulist").read_text())
        if near := os.sched_getaffinity(thread) & set(cores):
            os.sched_setaffinity(thread, near)


def _numbers(text: str) -> list[int]:
    """Of the kernel's lists, for example "0-1,3"."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers += range(int(first), int(last or first) + 1)
    return numbers

"""The NUMA nodes of this machine."""

from __future__ import annotations

import re
from pathlib import Path

_ONLINE = Path("/sys/devices/system/node/online")  # for example "0-1,3"; missing where the kernel knows no NUMA


def numa_nodes() -> list[int]:
    """The numbers of the nodes that are there, in order; node 0 at least."""
    if not _ONLINE.exists():
        return [0]
    nodes: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", _ONLINE.read_text()):
        nodes += range(int(first), int(last or first) + 1)
    return nodes

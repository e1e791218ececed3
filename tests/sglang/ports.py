"""TCP ports on this machine: for a process group, and for an engine."""

from __future__ import annotations

import importlib.metadata
import socket


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_of_an_engine() -> int:
    """The first of those that an engine takes, below those that the kernel gives to connections. Tests of another
    version of SGLang, which may run at the same time, have others."""
    patch = int(importlib.metadata.version("sglang").split(".")[2])
    return 8000 + 1000 * (patch % 24)  # an engine takes some of the thousand that follow

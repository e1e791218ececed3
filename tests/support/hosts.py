"""Two hosts on one machine: network namespaces joined by a cable, or, where there can be none, loopback addresses."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

_CLONE_NEWNET: Final = 0x40000000
_NOBODY: Final = "02:00:00:00:00:99"  # an Ethernet address
_NEW_NAMESPACE: Final = ("unshare", "--net", "sh", "-c", "ip link set lo up && echo up && read end")


@dataclass
class Host:
    """One of them.

    Attributes:
        address: at which the other one reaches it.
        process: that lives in its network namespace; ``None``: the host is this machine itself.
        cable: its end of what joins the two.
    """

    address: str
    process: int | None = None
    cable: str = ""

    def run(self, *command: str) -> None:
        """On the host; raises `CalledProcessError` with what went wrong."""
        subprocess.run(["nsenter", f"--net=/proc/{self.process}/ns/net", *command], check=True, capture_output=True)

    @contextmanager
    def silent_to(self, other: Host) -> Iterator[None]:
        """What this host sends to the other one is lost on the way."""
        neighbour = (other.address, "dev", self.cable)
        self.run("ip", "neighbour", "replace", *neighbour, "lladdr", _NOBODY, "nud", "permanent")
        try:
            yield
        finally:
            self.run("ip", "neighbour", "delete", *neighbour)


def enter(process: int) -> None:
    """The calling thread, and those that it starts, are in the network namespace of ``process`` from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{process}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(namespace)


@contextmanager
def namespaces() -> Iterator[list[Host]]:
    """Two hosts with a cable between them; skips the test where this process may not make any."""
    with ExitStack() as stack:
        hosts = []
        try:
            for address, end in (("10.99.0.1", "cable0"), ("10.99.0.2", "cable1")):
                process = subprocess.Popen(
                    _NEW_NAMESPACE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                stack.enter_context(process)  # the end of its input ends it
                assert process.stdout is not None
                if process.stdout.readline() != b"up\n":
                    pytest.skip("network namespaces cannot be made here: unshare --net is refused")
                hosts.append(Host(address, process.pid, end))
            first, second = hosts
            first.run(
                "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", str(second.process)
            )
            for number, host in enumerate(hosts):
                host.run("ip", "address", "add", f"{host.address}/24", "dev", f"cable{number}")
                host.run("ip", "link", "set", f"cable{number}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield hosts


@contextmanager
def loopback() -> Iterator[list[Host]]:
    """Two addresses of this machine."""
    yield [Host("127.0.0.2"), Host("127.0.0.3")]

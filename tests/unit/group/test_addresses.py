"""What a user states of where ranks of several hosts meet: refused by one sentence where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.doors import SECRET

from vmm_dwdp import ConfigError, DriverError, DWDPConfig, DWDPRuntime, TCPRendezvous
from vmm_dwdp.allocator.driver import HandleType
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group.addresses import address_of, meet, read_secret

TWO = ["127.0.0.1:29600", "[::1]:29600"]
pytestmark = pytest.mark.usefixtures("open_descriptors")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_bytes(SECRET + b"\n")
    return path


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (["node-1:29600"], "'node-1:29600' is not a numeric address and a port, such as"),
        (["127.0.0.1"], "not a numeric address and a port"),
        (["127.0.0.1:"], "not a numeric address and a port"),
        (["127.0.0.1:65536"], "not a numeric address and a port"),
        (["127.0.0.1:-1"], "not a numeric address and a port"),
        (["127.0.0.1:²"], "not a numeric address and a port"),
        (["127.1:29600"], "not a numeric address and a port"),
        (["127.0.0.1:0"], "not a numeric address and a port"),
        ([""], "not a numeric address and a port"),
        (["0.0.0.0:29600"], "'0.0.0.0:29600' is no address of one interface"),
        (["[::]:29600"], "is no address of one interface"),
        (["224.0.0.1:29600"], "is no address of one interface"),
        (["127.0.0.1:29600", "127.0.0.1:29600"], "names one address twice"),
        ("127.0.0.1:29600", "takes a list with the address of every rank"),
        ([29600], "takes a list with the address of every rank"),
    ],
)
def test_what_is_no_address(where: Any, sentence: str, secret: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TCPRendezvous(where, secret_file=secret)


def test_what_does_not_go_together(secret: Path) -> None:
    with pytest.raises(ConfigError, match="needs a secret_file that all ranks have"):
        TCPRendezvous(TWO)
    with pytest.raises(ConfigError, match="takes an interface with a process group only"):
        TCPRendezvous(TWO, secret_file=secret, interface="lo")
    with pytest.raises(ConfigError, match="names 2 addresses, but the group has 3 ranks"):
        meet(TCPRendezvous(TWO, secret_file=secret), 0, 3)


def test_a_secret_is_read_without_the_line_s_end_and_not_shown(secret: Path) -> None:
    stated = TCPRendezvous(TWO, secret_file=secret)
    assert meet(stated, 0, 2).secret == SECRET
    assert SECRET.decode() not in repr(stated)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o644])
def test_a_secret_that_others_can_read(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=r"the secret .* is open to other users .*: chmod 600"):
        read_secret(secret)


@pytest.mark.parametrize("content", [b"", b"x" * 15, b"x" * 15 + b" " * 40, b"x" * 4097])
def test_a_secret_of_another_size(secret: Path, content: bytes) -> None:
    secret.write_bytes(content)
    with pytest.raises(ConfigError, match="must have 16 to 4096 bytes"):
        read_secret(secret)


def test_a_secret_of_somebody_else(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(secret, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to user"):
        read_secret(secret)


def test_no_secret_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is not a file"):
        read_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a file"):
        read_secret(tmp_path / "pipe")


def test_the_address_of_an_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    assert address_of("10.1.2.3") == "10.1.2.3"
    assert address_of("fd00::1") == "fd00::1"
    for interface in "eth77", "lo" + 20 * "o", "":
        with pytest.raises(ConfigError, match=f"there is no IPv4 address of an interface '{interface}'"):
            address_of(interface)


def test_where_memory_cannot_be_handed_over_by_fabric_handles(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a fabric, whose descriptors do not help."""

    def create(self: HostDriver, nbytes: int, location: Any, handle_type: Any = None) -> Any:
        if handle_type is HandleType.FABRIC:
            raise DriverError("cuMemCreate", "CUDA_ERROR_NOT_PERMITTED", "create memory")
        return made(self, nbytes, location, handle_type)

    made = HostDriver.create
    monkeypatch.setattr(HostDriver, "create", create)
    with pytest.raises(ConfigError, match=r"by fabric handles, which cannot be had here \(cuMemCreate failed"):
        DWDPRuntime(DWDPConfig(group_size=2), 0, "cpu", TCPRendezvous(TWO, secret_file=secret))


def test_lists_of_tensors_stay_on_one_machine(secret: Path) -> None:
    config = DWDPConfig(group_size=2, assembly="tensor_list")
    with pytest.raises(ConfigError, match="tensor_list shares memory within one machine"):
        DWDPRuntime(config, 0, "cpu", TCPRendezvous(TWO, secret_file=secret))

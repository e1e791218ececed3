"""Where ranks of several hosts listen, and the secret that they share: as it was stated, or told by a process group."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import secrets
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch.distributed as dist

from vmm_dwdp.errors import ConfigError, DWDPError

_SECRET_NBYTES: Final = 32  # of one that is drawn
_LEAST_NBYTES, _MOST_NBYTES = 16, 4096  # of one in a file
_SUCH_AS: Final = "10.0.0.1:29600 or [fd00::1]:29600"
_SIOCGIFADDR: Final = 0x8915  # of <linux/sockios.h>: the IPv4 address of an interface
_LONGEST_NAME: Final = 15  # bytes, and a zero after them
_INTERFACE: Final = struct.Struct("16s2xH4s16x")  # struct ifreq with a struct sockaddr_in


@dataclass(frozen=True)
class TCPRendezvous:
    """Where ranks meet that are on several hosts: ``rendezvous`` of `DWDPRuntime`.

    Every rank listens at one address of its own, and is let in by proving that it knows the secret. Memory is handed
    over as fabric handles, for which the GPUs are in one NVLink domain. Either all is stated, equal on all ranks::

        TCPRendezvous(["10.0.0.1:29600", "10.0.0.2:29600"], secret_file="dwdp.secret")

    or a process group tells the ranks each other's addresses and a secret, and a rank states where it listens itself::

        TCPRendezvous(dist.group.WORLD, interface="eth0")

    A rank that is to `rejoin` needs the first: the process group of the dead one is gone.

    Attributes:
        where: by rank, a numeric address and a port, with an IPv6 address in brackets. Or a process group of the ranks:
            then `DWDPRuntime` is a collective call, and ports are those that are free.
        secret_file: a file of 16 to 4096 bytes, white space around them not counted, that only this user can read;
            left out with a process group, the group's first rank draws a secret, which torch.distributed tells the
            others.
        interface: with a process group: the network interface of this host to listen at, as the name of one with an
            IPv4 address, or as one of this host's addresses.

    Raises:
        ConfigError: what is stated is no address, or does not go together.
    """

    where: Sequence[str] | dist.ProcessGroup
    secret_file: str | os.PathLike[str] | None = None
    interface: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.where, dist.ProcessGroup):
            if self.interface is None:
                raise ConfigError("TCPRendezvous of a process group needs the interface to listen at")
            return
        if self.interface is not None:
            raise ConfigError("TCPRendezvous takes an interface with a process group only: an address names its own")
        if self.secret_file is None:
            raise ConfigError("TCPRendezvous of addresses needs a secret_file that all ranks have")
        if isinstance(self.where, str) or not all(isinstance(address, str) for address in self.where):
            raise ConfigError("TCPRendezvous takes a list with the address of every rank, or a process group")
        object.__setattr__(self, "where", tuple(self.where))
        for address in self.where:
            if socket_address(address).address[1] == 0:
                raise ConfigError(f"{address!r} is not a numeric address and a port, such as {_SUCH_AS}")
        if len(set(self.where)) < len(self.where):
            raise ConfigError("TCPRendezvous names one address twice: every rank listens at its own")


class SocketAddress(NamedTuple):
    """As sockets take it."""

    family: socket.AddressFamily
    address: Any


class Meeting(NamedTuple):
    """What all ranks know, and what this one has got so far.

    Attributes:
        addresses: by rank.
        secret: equal on all ranks.
        bound: a socket at this rank's address that does not listen yet, and is the caller's; ``None``: not made yet.
    """

    addresses: tuple[str, ...]
    secret: bytes
    bound: socket.socket | None


def meet(stated: TCPRendezvous, rank: int, group_size: int) -> Meeting:
    """What ``stated`` comes to for rank ``rank`` of so many; with a process group a collective call.

    Raises:
        ConfigError: it is not of that many ranks, or has no such interface or secret; with a process group on all
            ranks, if it is so on any.
    """
    if isinstance(stated.where, dist.ProcessGroup):
        return _meet_by_group(stated, stated.where, rank, group_size)
    if len(stated.where) != group_size:
        raise ConfigError(f"TCPRendezvous names {len(stated.where)} addresses, but the group has {group_size} ranks")
    assert stated.secret_file is not None
    return Meeting(tuple(stated.where), read_secret(stated.secret_file), None)


class _Told(NamedTuple):
    """What one rank tells the others by the process group."""

    rank: int
    address: str
    secret: bytes | None  # what the first rank draws; `None`: it is in a file
    error: str | None  # in the place of the two


def _meet_by_group(stated: TCPRendezvous, group: dist.ProcessGroup, rank: int, group_size: int) -> Meeting:
    bound, secret = None, b""
    try:
        try:
            assert stated.interface is not None
            bound = bind(f"{_in_brackets(address_of(stated.interface))}:0")
            host, port, *_ = bound.getsockname()
            if stated.secret_file is not None:
                secret = read_secret(stated.secret_file)
            elif group.rank() == 0:
                secret = secrets.token_bytes(_SECRET_NBYTES)
            drawn = secret if stated.secret_file is None else None
            told = _Told(rank, f"{_in_brackets(host)}:{port}", drawn, None)
        except (DWDPError, OSError) as error:  # which the others are to hear, who wait for this rank
            told = _Told(rank, "", None, str(error))
        answers: list[Any] = [None] * group.size()
        dist.all_gather_object(answers, tuple(told), group=group)
        everybody = [_Told(*answer) for answer in answers]
        for each in everybody:
            if each.error is not None:
                raise ConfigError(f"rank {each.rank}: {each.error}")
        if sorted(each.rank for each in everybody) != list(range(group_size)):
            there = ", ".join(str(each.rank) for each in everybody)
            raise ConfigError(f"the process group has the ranks {there}, but the group {group_size} ranks")
        if len({each.secret is None for each in everybody}) > 1:
            raise ConfigError("TCPRendezvous has a secret_file on some ranks, and on others none")
    except BaseException:
        if bound is not None:
            bound.close()
        raise
    return Meeting(tuple(each.address for each in sorted(everybody)), everybody[0].secret or secret, bound)


def socket_address(text: str) -> SocketAddress:
    """Of a numeric address and a port. Raises `ConfigError` if it is anything else."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdecimal() else -1
    except ValueError:
        address, number = None, -1
    if address is None or not 0 <= number < 1 << 16:
        raise ConfigError(f"{text!r} is not a numeric address and a port, such as {_SUCH_AS}")
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(f"{text!r} is no address of one interface")
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, *_, found = socket.getaddrinfo(str(address), number, type=socket.SOCK_STREAM, flags=flags)[0]
    return SocketAddress(family, found)


def bind(text: str) -> socket.socket:
    """A socket at an address of this host, at which nobody listens yet. Raises `OSError` if there can be none."""
    family, address = socket_address(text)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which connections inherit
        if address[1]:  # where the kernel is to find a free port, it is to be nobody else's
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at once after a process that has died here
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def address_of(interface: str) -> str:
    """The address that ``interface`` is or has. Raises `ConfigError` if there is none."""
    try:
        return str(ipaddress.ip_address(interface))
    except ValueError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            name = os.fsencode(interface)
            if len(name) > _LONGEST_NAME:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            asked = _INTERFACE.pack(name, 0, b"")
            *_, found = _INTERFACE.unpack(fcntl.ioctl(sock, _SIOCGIFADDR, asked))
        except OSError as error:
            raise ConfigError(
                f"there is no IPv4 address of an interface {interface!r} ({error.strerror}): "
                "name another, or an address of this host"
            ) from error
    return socket.inet_ntoa(found)


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """What a file has that only this user can read, without white space around it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            content = os.read(descriptor, _MOST_NBYTES + 1) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"the secret {os.fspath(path)} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"the secret {os.fspath(path)} is not a file")
    if found.st_uid != os.getuid():
        raise ConfigError(f"the secret {os.fspath(path)} belongs to user {found.st_uid}, not to this one")
    if found.st_mode & 0o077:
        mode = stat.filemode(found.st_mode)
        raise ConfigError(f"the secret {os.fspath(path)} is open to other users ({mode}): chmod 600")
    secret = content.strip()
    if len(secret) < _LEAST_NBYTES or len(content) > _MOST_NBYTES:
        raise ConfigError(f"the secret {os.fspath(path)} must have {_LEAST_NBYTES} to {_MOST_NBYTES} bytes")
    return secret


def _in_brackets(host: str) -> str:
    return f"[{host}]" if ":" in host else host

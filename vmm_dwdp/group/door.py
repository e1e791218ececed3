"""What the ways for ranks to reach each other have in common: sockets of one kind, and the proof of membership.

`Transport` knows of requests and answers, threads and deadlines; a `Door` of addresses and secrets. Over each
connection goes one request, and one answer.
"""

from __future__ import annotations

import abc
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.errors import ExchangeError

MAX_REQUEST_NBYTES: Final = 4096
MAX_CLIENTS: Final = 64  # at one time; more wait in the kernel's queue

Message = dict[str, Any]


class Absent(ExchangeError):
    """Nobody listens there: the kernel says so."""


class Silent(ExchangeError):
    """Nobody takes a connection, or refuses it: a process that is too busy, or a host that is gone."""


class Limits(NamedTuple):
    """What an answer may have at most."""

    nbytes: int
    descriptors: int


class Heard(NamedTuple):
    """What a member of the group asks.

    Attributes:
        request: its own words.
        reply: sends it an answer, with descriptors that stay the caller's, until a deadline.
    """

    request: Message
    reply: Callable[[bytes, Sequence[int], float], None]


class Door(abc.ABC):
    """One rank's own door, and its way to those of the others.

    Attributes:
        place: where the group meets, in words.
        takes_descriptors: whether descriptors can go through it.
        look_seconds: how long to wait for a connection, to see whether somebody listens.
        stranger_seconds: how long somebody may take who has not proved yet to be a member.
    """

    place: str
    takes_descriptors: bool
    look_seconds: float
    stranger_seconds: float

    @abc.abstractmethod
    def address(self, rank: int) -> str:
        """Where ``rank`` listens, in words."""

    @abc.abstractmethod
    def connect(self, rank: int, deadline: float) -> socket.socket:
        """A connection to ``rank``, by one attempt that ends at the deadline; the caller closes it.

        Raises `Absent`, `Silent`, or another `ExchangeError` where no further attempt can help.
        """

    @abc.abstractmethod
    def ask(
        self, sock: socket.socket, rank: int, request: Message, limits: Limits, deadline: float, ledger: Ledger
    ) -> tuple[bytes, list[Descriptor]]:
        """The answer of ``rank`` at the other end of ``sock``, and no one else's; descriptors are the caller's.

        Raises `ExchangeError` if there is none by the deadline.
        """

    @abc.abstractmethod
    def hear(self, client: socket.socket, deadline: float, ledger: Ledger) -> Heard | None:
        """What ``client`` asks; ``None`` if it is no member, who is told nothing.

        Raises `ExchangeError` for what is no request, or not one in time.
        """

    @abc.abstractmethod
    def listen(self, rank: int, deadline: float, is_taken: Callable[[], bool]) -> socket.socket:
        """The socket at which this process listens as ``rank``; the caller closes it, and `leave` undoes the rest.

        Args:
            is_taken: whether another process listens there.

        Raises `ExchangeError` if it cannot, and has left nothing behind then.
        """

    @abc.abstractmethod
    def why_not(self, rank: int, error: ExchangeError) -> str:
        """In words, why ``rank``, which has taken a connection, did not answer."""

    @abc.abstractmethod
    def strangers(self) -> str:
        """The end of a sentence which says that somebody did not come: whether somebody else did."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Remove what this process has put where the group meets. A second call goes on where one failed."""

    @abc.abstractmethod
    def forget(self) -> None:
        """In a forked child: give up what it has of its parent's."""


def parse(payload: bytes) -> Message | None:
    """The JSON object in ``payload``, if it is one."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def reason(error: Exception) -> str:
    """What went wrong, in words; of an address that is too long for a socket, the kernel never hears."""
    return getattr(error, "strerror", None) or str(error)

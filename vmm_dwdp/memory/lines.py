"""The memory in which the ranks of one machine say from whom they pull; see [Note: Turns] in ``layout/turns.py``.

    a line   version   pulls   time of the latest look   under way, by owner      `LINE_NBYTES` and 4 for each rank,
             4 bytes   4       8                         4 each                   rounded up to a cache line

One rank makes it, and the others get it through the door, as a descriptor of memory that nobody can make smaller. Each
rank writes its own line alone, and begins by clearing it: so one that comes back does not go on with what a dead one
said. The time is that of a clock that the processes of a machine share: who pulls and has not looked for a while is
taken for dead.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Sequence
from typing import Final

from vmm_dwdp.allocator.driver import LinesAt
from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ExchangeError
from vmm_dwdp.layout.turns import Line

VERSION: Final = 1  # of a line; one that says another is not read
STALE_NS: Final = 20_000_000
_HEAD: Final = struct.Struct("=IIq")
_CACHE_LINE: Final = 64
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LABEL: Final = "who pulls from whom"


class SharedLines:
    """All lines, as one rank of the group sees them. Any thread may call `share`; one thread all else."""

    def __init__(self, descriptor: Descriptor, rank: int, group_size: int) -> None:
        """Takes over ``descriptor``. Raises `ExchangeError` if it is not of such memory."""
        self._descriptor = descriptor
        self._rank = rank
        self._num_ranks = group_size
        self._stride = _line_nbytes(group_size)
        fd, nbytes = descriptor.fd, self._stride * group_size
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not is_sealed or os.fstat(fd).st_size < nbytes:
                raise ExchangeError(f"what was sent as {_LABEL} is not memory of {nbytes} bytes that stays so long")
            self._memory = mmap.mmap(fd, nbytes)
        except OSError as error:
            descriptor.close()
            raise ExchangeError(f"what was sent as {_LABEL} cannot be mapped: {error.strerror}") from error
        except BaseException:
            descriptor.close()
            raise
        self.say(Line(0, [0] * group_size))

    @classmethod
    def make(cls, ledger: Ledger, rank: int, group_size: int) -> SharedLines:
        """For all ranks of the group."""
        with uninterrupted():
            descriptor = Descriptor(
                ledger, os.memfd_create("vmm-dwdp-lines", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), _LABEL
            )
            os.ftruncate(descriptor.fd, _line_nbytes(group_size) * group_size)
            fcntl.fcntl(descriptor.fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, rank, group_size)

    @property
    def at(self) -> LinesAt:
        """Where they are, for who needs no interpreter; valid until `close`."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return LinesAt(first, self._stride, self._num_ranks, self._rank)

    def share(self) -> Descriptor:
        """For another rank; the caller's."""
        return self._descriptor.duplicate()

    def say(self, line: Line) -> None:
        """Write this rank's own line."""
        start = self._rank * self._stride
        head = _HEAD.pack(VERSION, line.pulls, time.monotonic_ns())
        self._memory[start : start + _HEAD.size + 4 * self._num_ranks] = head + struct.pack(
            f"={self._num_ranks}I", *line.under_way
        )

    def read(self) -> tuple[list[Line], list[bool]]:
        """By rank, what it says, and whether that counts: not this rank's own."""
        lines, alive = [], []
        now = time.monotonic_ns()
        for rank in range(self._num_ranks):
            version, pulls, looked = _HEAD.unpack_from(self._memory, rank * self._stride)
            under_way: Sequence[int] = struct.unpack_from(
                f"={self._num_ranks}I", self._memory, rank * self._stride + _HEAD.size
            )
            lines.append(Line(pulls, under_way))
            alive.append(rank != self._rank and version == VERSION and abs(now - looked) < STALE_NS)
        return lines, alive

    def close(self) -> None:
        """Nobody here reads or writes them any more. A second call does nothing."""
        if not self._memory.closed:
            self.say(Line(0, [0] * self._num_ranks))
            with uninterrupted():
                self._memory.close()
        self._descriptor.close()


def _line_nbytes(group_size: int) -> int:
    return -(-(_HEAD.size + 4 * group_size) // _CACHE_LINE) * _CACHE_LINE

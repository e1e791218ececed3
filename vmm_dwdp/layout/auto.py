"""How many experts a rank holds where the config leaves it open: as many as fit. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.needs import Needed


def with_local_experts(config: DWDPConfig, number: int | None) -> DWDPConfig:
    """``config`` with a number instead of ``"auto"``; ``None`` is an equal share."""
    return replace(config, num_local_experts=number, memory_bytes=None)


@dataclass(frozen=True)
class Room:
    """Bytes of a device's memory.

    Attributes:
        wanted: for more experts than an equal share.
        limit: for an equal share, which a rank has to hold.
    """

    wanted: int
    limit: int


@dataclass(frozen=True)
class AutoExperts:
    """The numbers of experts that may stand for ``num_local_experts: "auto"``.

    Attributes:
        config: which states that.
        counts: experts of each layer.
        spills: whether experts that do not fit on ranks go to host memory; then a rank may hold none. Needs layers with
            equal counts.
    """

    config: DWDPConfig
    counts: tuple[int, ...]
    spills: bool = False

    @cached_property
    def numbers(self) -> range:
        """What every rank can hold of every layer. The first one stands for an equal share of each layer, which is less
        than that number where a layer is smaller than others."""
        if self.spills:
            return range(self.counts[0] + 1)
        on_ranks = [count - self.config.host_experts for count in self.counts]
        least = max(-(-count // self.config.group_size) for count in on_ranks)
        return range(least, max(least, min(on_ranks)) + 1)

    def settled(self, number: int) -> DWDPConfig:
        """The config of a group whose ranks hold ``number``."""
        if self.spills:
            return self._spilled(number)
        return with_local_experts(self.config, None if number == self.numbers[0] else number)

    def _spilled(self, number: int) -> DWDPConfig:
        host = max(0, self.counts[0] - number * self.config.group_size)
        is_share = number == -(-(self.counts[0] - host) // self.config.group_size)
        return with_local_experts(replace(self.config, host_experts=host), None if is_share else number)

    def most_that_fit(self, needed: Needed, room: Room) -> int | None:
        """The most that a rank has room for, and for each number below; ``None``: not even for an equal share.

        Whole pages may make one expert more take less, and no rank is to have too little room for what others settle
        on: so each number below has to fit, too.
        """
        fitting = None
        for number in self.numbers:
            takes = needed(self.settled(number)).on_device + self.config.kept_on_device
            if takes > (room.limit if fitting is None else room.wanted):
                break
            fitting = number
        return fitting

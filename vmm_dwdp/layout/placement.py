"""Which owner holds which experts, and from whom a rank reads those that it does not hold. Pure integers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError

Owner = int | Literal["host"]  # a rank, or the node's pool of host memory

HOST: Final[Literal["host"]] = "host"


class Source(NamedTuple):
    """A run of experts that a rank reads from one owner."""

    experts: range
    owner: Owner


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of one layer spread over the owners of a group.

    The last ``config.host_experts`` experts belong to `HOST`. The others, ``E_gpu`` of them, are spread over the ranks:
    rank ``r`` holds ``n`` experts from ``floor(r * (E_gpu - n) / max(1, G - 1))`` on, so that the ranks' starts are as
    even as whole numbers allow for any ``E_gpu``, ``n`` and ``G`` that cover.

        E_gpu = 10, G = 3, n = 4     rank 0   0 1 2 3
                                     rank 1         3 4 5 6
                                     rank 2               6 7 8 9

    Attributes:
        num_experts: of the layer, those of `HOST` included.
        config: of the group.

    Raises:
        ConfigError: the owners together would not hold every expert, or a rank would hold more than there are; or the
            number of local experts is not known yet.
    """

    num_experts: int
    config: DWDPConfig

    def __post_init__(self) -> None:
        host, per_rank, group_size = self.config.host_experts, self.config.num_local_experts, self.config.group_size
        if host > self.num_experts:
            raise ConfigError(f"host_experts is {host}, but a layer has only {self.num_experts} experts")
        if per_rank == "auto":
            raise ConfigError("num_local_experts: auto is a number once the ranks of a runtime have agreed: settle()")
        if per_rank is None:
            return
        if per_rank > self._on_ranks:
            raise ConfigError(f"num_local_experts is {per_rank}, but only {self._on_ranks} experts are on ranks")
        if per_rank * group_size < self._on_ranks:
            least = -(-self._on_ranks // group_size)
            raise ConfigError(
                f"{group_size} ranks with {per_rank} experts each cannot hold {self._on_ranks} experts; "
                f"num_local_experts must be at least {least}"
            )

    @property
    def _on_ranks(self) -> int:
        return self.num_experts - self.config.host_experts

    @cached_property
    def owners(self) -> tuple[Owner, ...]:
        """Who holds at least one expert: ranks in order, then `HOST`."""
        everyone: list[Owner] = [*range(self.config.group_size), HOST]
        return tuple(owner for owner in everyone if self.experts(owner))

    def experts(self, owner: Owner) -> range:
        """The run of experts that ``owner`` holds; it may be empty."""
        if owner == HOST:
            return range(self._on_ranks, self.num_experts)
        group_size = self.config.group_size
        if not 0 <= owner < group_size:
            raise ConfigError(f"there is no rank {owner} in a group of {group_size}")
        stated = self.config.num_local_experts
        per_rank = stated if isinstance(stated, int) else -(-self._on_ranks // group_size)
        start = owner * (self._on_ranks - per_rank) // max(1, group_size - 1)
        return range(start, start + per_rank)

    def locate(self, expert: int) -> list[tuple[Owner, int]]:
        """Every owner of ``expert`` and the expert's place among that owner's: ``[(owner, offset), ...]``."""
        if not 0 <= expert < self.num_experts:
            raise ConfigError(f"there is no expert {expert} in a layer of {self.num_experts}")
        return [(owner, expert - self.experts(owner).start) for owner in self.owners if expert in self.experts(owner)]

    def sources(self, reader: int) -> tuple[Source, ...]:
        """From whom rank ``reader`` reads the experts that it does not hold: runs in expert order, each from one owner.

        Where a run has several owners it is divided among them so that the reader takes as evenly from every owner as
        whole experts allow; which owner gets the odd expert rotates with the reader, so that readers differ.
        """
        remote = [run for run in self._runs if reader not in run[1]]
        shares = [dict.fromkeys(nearest_first(owners, reader, self.config.group_size), 0) for _, owners in remote]
        load: dict[Owner, int] = dict.fromkeys(self.owners, 0)
        for (experts, _), share in zip(remote, shares, strict=True):
            nearest = next(iter(share))
            share[nearest] = len(experts)
            load[nearest] += len(experts)
        while any(_level(share, load) for share in shares):
            pass  # every move brings two loads closer together, so there is a last one
        sources: list[Source] = []
        for (experts, _), share in zip(remote, shares, strict=True):
            start = experts.start
            for owner, count in share.items():
                if count:
                    sources.append(Source(range(start, start + count), owner))
                    start += count
        return tuple(_merged(sources))

    def in_turn(self, reader: int) -> tuple[int, ...]:
        """All experts in an order in which those from whom ``reader`` reads them take turns, itself included, each as
        often as it is read from; ranks in step begin with different ones."""
        runs: dict[Owner, list[int]] = {reader: list(self.experts(reader))}
        for experts, owner in self.sources(reader):
            runs.setdefault(owner, []).extend(experts)
        owners = nearest_first(runs, reader, self.config.group_size)
        turns = [
            ((2 * place + 1) / len(runs[owner]), turn, expert)
            for turn, owner in enumerate(owners)
            for place, expert in enumerate(runs[owner])
        ]
        return tuple(expert for _, _, expert in sorted(turns))

    @cached_property
    def _runs(self) -> tuple[tuple[range, tuple[Owner, ...]], ...]:
        """The experts cut wherever an owner's run begins or ends: (experts, their owners)."""
        held = {owner: self.experts(owner) for owner in self.owners}
        cuts = sorted({0, self.num_experts}.union(*((run.start, run.stop) for run in held.values())))
        return tuple(
            (range(start, stop), tuple(owner for owner, run in held.items() if start in run))
            for start, stop in itertools.pairwise(cuts)
        )


def in_words(owner: Owner) -> str:
    """``owner`` as messages and labels name it."""
    return "host memory" if owner == HOST else f"rank {owner}"


def nearest_first(owners: Iterable[Owner], rank: int, group_size: int) -> list[Owner]:
    """``owners`` in the order in which ``rank`` turns to them: itself, the ranks after it in cyclic order, then `HOST`.

    No two ranks have the same order, so that ranks in step turn to different owners.
    """
    return sorted(owners, key=lambda owner: group_size if owner == HOST else (owner - rank) % group_size)


def _level(share: dict[Owner, int], load: dict[Owner, int]) -> bool:
    """Move experts of one run from its most loaded owner to its least loaded one, if that makes the two more even."""
    most = max((owner for owner, count in share.items() if count), key=lambda owner: load[owner])
    least = min(share, key=lambda owner: load[owner])
    moved = min(share[most], (load[most] - load[least]) // 2)
    for owner, change in ((most, -moved), (least, moved)):
        share[owner] += change
        load[owner] += change
    return moved > 0


def _merged(sources: list[Source]) -> list[Source]:
    """Neighbouring runs of the same owner as one."""
    merged: list[Source] = []
    for source in sources:
        if merged and merged[-1].owner == source.owner and merged[-1].experts.stop == source.experts.start:
            merged[-1] = Source(range(merged[-1].experts.start, source.experts.stop), source.owner)
        else:
            merged.append(source)
    return merged

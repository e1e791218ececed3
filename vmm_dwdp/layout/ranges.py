"""The bytes and pages of one assembled range. Pure integers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from vmm_dwdp.layout.placement import ExpertPlacement, Owner


@dataclass(frozen=True)
class Tile:
    """A run of pages that is one physical handle on every owner that backs it.

    Attributes:
        pages: the pages, counted from the start of the range.
        owners: who has a handle with these pages' bytes; at least one.
    """

    pages: range
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class RangeLayout:
    """One (layer, weight) as every rank addresses it: expert ``e`` at byte ``e * expert_nbytes`` of the range.

    [Note: Tiles]
    An owner backs its experts' bytes rounded outward to whole pages, its resident span. A handle maps only whole, so
    the range is cut into tiles at every owner's borders, rounded down and rounded up; between two cuts the set of
    owners is the same for every page, and a tile is one handle on each of them. A page in which two shards meet is a
    tile of its own, backed by both. Any mixture of owners can therefore be mapped side by side. Where there is a
    resident cache the range is cut at the borders of all experts, so that a tile of few experts can be replaced.

        experts        0     1     2  |  3     4     5
        bytes          |=====|=====|==+==|=====|=====|
        pages          |----|----|----|----|----|----|
        rank 0         |= tile 0 =====| 1  |
        rank 1                        | 1  |= tile 2 =|

    Attributes:
        placement: who holds which experts.
        expert_nbytes: bytes of one expert.
        granularity: bytes per page; 1 where memory is not mapped by pages (``assembly: tensor_list``).
    """

    placement: ExpertPlacement
    expert_nbytes: int
    granularity: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor ``[E, ...]``; the last page may have more."""
        return self.placement.num_experts * self.expert_nbytes

    @property
    def num_pages(self) -> int:
        return -(-self.nbytes // self.granularity)

    def shard_bytes(self, owner: Owner) -> range:
        """The bytes of the experts that ``owner`` holds."""
        return self.bytes_of(self.placement.experts(owner))

    def bytes_of(self, experts: range) -> range:
        """The bytes of a run of experts."""
        return range(experts.start * self.expert_nbytes, experts.stop * self.expert_nbytes)

    def resident_pages(self, owner: Owner) -> range:
        """The resident span: the shard's bytes rounded outward to pages; empty if ``owner`` holds nothing."""
        shard = self.shard_bytes(owner)
        first = shard.start // self.granularity
        return range(first, -(-shard.stop // self.granularity) if shard else first)

    def resident_bytes(self, owner: Owner) -> range:
        """`resident_pages` in bytes from the start of the range."""
        pages = self.resident_pages(owner)
        return range(pages.start * self.granularity, pages.stop * self.granularity)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The whole range in order; see [Note: Tiles]."""
        spans = {owner: self.resident_pages(owner) for owner in self.placement.owners}
        if self.placement.config.resident_cache:
            borders = {*range(0, self.nbytes + 1, self.expert_nbytes)}
        else:
            shards = [self.shard_bytes(owner) for owner in spans]
            borders = {0, self.nbytes}.union(*((shard.start, shard.stop) for shard in shards))
        cuts = {page for border in borders for page in (border // self.granularity, -(-border // self.granularity))}
        ordered = sorted(cuts)
        return tuple(
            Tile(range(first, stop), tuple(owner for owner, span in spans.items() if first in span))
            for first, stop in itertools.pairwise(ordered)
        )

    def experts_in(self, tile: Tile) -> tuple[tuple[int, int], ...]:
        """The experts with bytes in ``tile``, each with how many."""
        first, stop = tile.pages.start * self.granularity, min(tile.pages.stop * self.granularity, self.nbytes)
        experts = range(first // self.expert_nbytes, -(-stop // self.expert_nbytes))
        runs = ((expert, self.bytes_of(range(expert, expert + 1))) for expert in experts)
        return tuple((expert, min(run.stop, stop) - max(run.start, first)) for expert, run in runs)

    def tiles_of(self, owner: Owner) -> tuple[Tile, ...]:
        """The tiles that ``owner`` backs, in order: together its resident span."""
        return tuple(tile for tile in self.tiles if owner in tile.owners)

    def staged_bytes(self, owner: Owner) -> tuple[range, range]:
        """The whole pages before and after the resident span of ``owner``, which slots back; either may be empty."""
        resident = self.resident_bytes(owner)
        return range(resident.start), range(resident.stop, self.num_pages * self.granularity)

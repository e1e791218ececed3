"""The resident cache: pages of this GPU that stand in for the hottest remote tiles of the in-place ranges.

in-place range                 |==== rank 0 ====|== own pages ==|= 2 =| cache |= 2 =|
what the kernel sees           |  expert 0  |  expert 1  |  expert 2  |  expert 3  |

[Note: Refreshing the cache]
Where a tile is read is changed only between passes, while no kernel runs. Tiles that leave the cache are given their
owner's handle back; free pages are filled by copies, and only then mapped in the place of the tiles that come.
Addresses stay. A tile whose mappings a failing driver call has left incomplete, or whose pages it has left with old
bytes after an update, is torn: it is given its owner's handle back at once, or if that fails too, by the next refresh,
and no layer is read in place until then.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from vmm_dwdp.allocator import handles
from vmm_dwdp.allocator.driver import Access, Address, Copy, Driver
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ConfigError, DriverError, StateError
from vmm_dwdp.observe.stats import CacheStats


@dataclass(eq=False)
class RemoteTile:
    """A tile of an in-place range that another owner backs, and where it is read now.

    Attributes:
        label: of the range.
        layer: its number.
        experts: those that have bytes in the tile, each with how many.
        memory: the range, in which the tile begins at ``offset``.
        handle: the owner's.
        source: address of the same bytes in this rank's view of the owner's memory.
        mappings: what is mapped in the tile's place.
        pages: of the cache, if it is read there.
        heat: tokens times the bytes that they read; what was counted before the last refresh counts half, and so on.
    """

    label: str
    layer: int
    experts: tuple[tuple[int, int], ...]
    memory: Reservation
    offset: int
    handle: Allocation
    source: Address
    mappings: list[handles.Mapping]
    pages: tuple[int, ...] = ()
    heat: int = 0


class ResidentCache:
    """See [Note: Refreshing the cache]. Calls come from one thread, between passes. The constructor takes nothing.

    Args:
        nbytes: of the cache, whole pages.
        page_nbytes: of one page.
        resources: what it takes is pushed there.
    """

    def __init__(self, driver: Driver, ledger: Ledger, nbytes: int, page_nbytes: int, resources: ResourceStack) -> None:
        self._driver = driver
        self._ledger = ledger
        self._nbytes = nbytes
        self._page_nbytes = page_nbytes
        self._resources = resources
        self._tiles: Sequence[RemoteTile] = ()
        self._memory: Reservation | None = None
        self._taken = False
        self._torn: list[RemoteTile] = []  # whose mappings are incomplete
        self._old = False  # whether pages may have what their owners have changed since
        self._refreshes = 0
        self._served: float | None = None
        self._pages: list[Allocation] = []

    def take(self) -> None:
        """Take its pages, unless they are there. Raises `ConfigError` if there is not so much memory."""
        if self._taken:
            return
        while len(self._pages) * self._page_nbytes < self._nbytes:
            try:
                page = Allocation.create(self._driver, self._ledger, self._page_nbytes, label="resident cache")
            except DriverError as error:
                taken = len(self._pages) * self._page_nbytes
                raise ConfigError(
                    f"a resident_cache of {self._nbytes} bytes does not fit beside what is in memory already: after "
                    f"{taken} of them, {error}"
                ) from error
            self._pages.append(self._resources.push(page))
        if self._memory is None:
            self._memory = self._resources.push(Reservation(self._driver, self._ledger, self._nbytes, "resident cache"))
        for number, page in enumerate(self._pages):
            self._memory.map(number * self._page_nbytes, page)
        self._memory.set_access(0, self._nbytes, Access.READ_WRITE)
        self._taken = True

    def give_back(self) -> None:
        """Release its pages, of which no tile is mapped any more; which tiles they stood in for is remembered."""
        self._taken = False
        if self._memory is not None:
            self._memory.clear()
        while self._pages:
            self._resources.close_one(self._pages[-1])
            del self._pages[-1]

    def serve(self, tiles: Sequence[RemoteTile]) -> None:
        """Go by these, each of which is read at its owner, instead of those before: what was cached of the same place
        is read in the cache once more, and has to be filled anew (`refill`)."""
        before, self._tiles = self._tiles, tiles
        self._torn = []
        self._old = self._old or bool(before)
        for old, tile in zip(before, tiles, strict=False):
            tile.heat = old.heat
            if old.pages:
                self._map(tile, old.pages)

    @property
    def num_handles(self) -> int:
        return len(self._pages)

    @property
    def num_mappings(self) -> int:
        """How many more there are by the cache: its own, and those of a tile's pages instead of one of its owner's."""
        return len(self._pages) + sum(len(tile.pages) - 1 for tile in self._tiles if tile.pages)

    def stats(self) -> CacheStats:
        return CacheStats(
            nbytes=len(self._pages) * self._page_nbytes,
            used_bytes=sum(len(tile.pages) for tile in self._tiles) * self._page_nbytes,
            refreshes=self._refreshes,
            served=self._served,
        )

    def require_whole(self) -> None:
        """Raise `StateError` if tiles are torn."""
        if (self._torn or self._old) and (torn := self._all_torn()):
            raise StateError(
                f"pages of {torn[0].label} are missing or old, because a driver call failed: call refresh_cache"
            )

    def _all_torn(self) -> list[RemoteTile]:
        """Those whose mappings are incomplete, or whose pages have old bytes."""
        return [*self._torn, *(tile for tile in self._tiles if self._old and tile.pages and tile not in self._torn)]

    def refresh(self, counts: Mapping[int, Sequence[int]]) -> None:
        """Hold what is hottest after another ``counts`` tokens, by layer number and expert. The device is idle.

        Raises:
            DriverError: a call failed; what is cached is less than it could be, and every byte is as it was.
        """
        self._mend()
        self._count(counts)
        candidates = [Candidate(tile.heat, self._pages_of(tile), bool(tile.pages)) for tile in self._tiles]
        chosen = hottest(candidates, len(self._pages))
        try:
            for place, tile in enumerate(self._tiles):
                if tile.pages and place not in chosen:
                    self._map(tile, ())
            used = {page for tile in self._tiles for page in tile.pages}
            free = iter([page for page in range(len(self._pages)) if page not in used])
            coming = [self._tiles[place] for place in sorted(chosen) if not self._tiles[place].pages]
            moves = [(tile, tuple(itertools.islice(free, self._pages_of(tile)))) for tile in coming]
            self._fill(moves)
            for tile, pages in moves:
                self._map(tile, pages)
        except BaseException as failure:
            try:
                self._mend()
            except DriverError as error:
                failure.add_note(f"and then: {error}")
            raise
        self._refreshes += 1

    def forget(self) -> None:
        """The owners are about to change what is cached: nothing of it is read until `refill`, or `refresh`."""
        self._old = True

    def refill(self) -> None:
        """After `forget`: copy what is cached once more. Raises `DriverError` if that fails."""
        self._fill([(tile, tile.pages) for tile in self._tiles if tile.pages])
        self._old = False

    def verify(self) -> None:
        """Raise `StateError` unless every page in the cache has its owner's bytes."""
        for tile in self._tiles:
            for source, page in zip(self._sources(tile), tile.pages, strict=False):
                held, owned = (
                    tensor_at(address, (self._page_nbytes,), torch.uint8, self._driver.device)
                    for address in (self._address(page), source)
                )
                if not torch.equal(held, owned):
                    raise StateError(f"the resident cache has other bytes of {tile.label} than their owner")

    def _pages_of(self, tile: RemoteTile) -> int:
        return tile.handle.nbytes // self._page_nbytes

    def _sources(self, tile: RemoteTile) -> list[Address]:
        """Addresses of the owner's pages."""
        return [Address(tile.source + offset) for offset in range(0, tile.handle.nbytes, self._page_nbytes)]

    def _address(self, page: int) -> Address:
        assert self._memory is not None, "pages are used when they were taken"
        return self._memory.at(page * self._page_nbytes)

    def _count(self, counts: Mapping[int, Sequence[int]]) -> None:
        read = cached = 0
        for tile in self._tiles:
            of_layer = counts[tile.layer]
            heat = sum(of_layer[expert] * nbytes for expert, nbytes in tile.experts)
            tile.heat = tile.heat // 2 + heat
            read += heat
            cached += heat if tile.pages else 0
        self._served = cached / read if read else None

    def _fill(self, moves: Sequence[tuple[RemoteTile, tuple[int, ...]]]) -> None:
        """Copy tiles into pages of the cache, and wait for it."""
        copies = [
            Copy(self._address(page), source, self._page_nbytes)
            for tile, pages in moves
            for source, page in zip(self._sources(tile), pages, strict=True)
        ]
        if copies:
            stream = self._driver.current_stream()
            self._driver.copy(self._driver.prepare(copies), stream)
            self._driver.synchronize(stream)

    def _map(self, tile: RemoteTile, pages: tuple[int, ...]) -> None:
        """Read ``tile`` in ``pages`` of the cache, or at its owner if there are none. Nothing reads it meanwhile."""
        if tile not in self._torn:
            self._torn.append(tile)
        with uninterrupted():
            while tile.mappings:
                tile.memory.unmap(tile.mappings[-1])
                del tile.mappings[-1]
            offset = tile.offset
            for handle in [self._pages[page] for page in pages] or [tile.handle]:
                tile.mappings.append(tile.memory.map(offset, handle))
                offset += handle.nbytes
            tile.memory.set_access(tile.offset, tile.handle.nbytes, Access.READ)
            tile.pages = pages
        self._torn.remove(tile)

    def _mend(self) -> None:
        """Give torn tiles back to their owners."""
        for tile in self._all_torn():
            self._map(tile, ())
        self._old = False


# Which tiles of the in-place ranges a resident cache holds. Pure integers.
KEEP: Final = 1.25  # how much hotter a tile must be to take another's place, which costs a copy and driver calls


class Candidate(NamedTuple):
    """A tile that another owner backs.

    Attributes:
        heat: tokens times the bytes of the tile that each of them reads.
        num_pages: what it would take of the cache.
        cached: whether it is there now.
    """

    heat: int
    num_pages: int
    cached: bool


def hottest(candidates: Sequence[Candidate], num_pages: int) -> set[int]:
    """The places of those that a cache of ``num_pages`` holds best: the hottest by page first, as long as they fit.

    What nobody read does not come, and leaves only for something else.
    """

    def by_page(place: int) -> float:
        heat, pages, cached = candidates[place]
        return heat / pages * (KEEP if cached else 1)

    chosen = set()
    for place in sorted(range(len(candidates)), key=by_page, reverse=True):
        heat, pages, cached = candidates[place]
        if (heat or cached) and pages <= num_pages:
            chosen.add(place)
            num_pages -= pages
    return chosen

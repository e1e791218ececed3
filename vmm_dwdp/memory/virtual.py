"""Own pages and slot pages mapped side by side: one tensor per weight, as if all experts were here.

assembled range of rank 1      |----- slot -----|== own pages ==|------ slot ------|
what the kernel sees           |  expert 0  |  expert 1  |  expert 2  |  expert 3  |
view of rank 0's pages         |================|                       read only, where copies come from
in-place range                 |==== rank 0 ====|== own pages ==|==== rank 2 =====|         read only, no copies
                               with a bank before it: see [Note: The bank] in `bank.py`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from vmm_dwdp.allocator.driver import DEVICE, Access, Address, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import Mode
from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import HOST, Owner, in_words
from vmm_dwdp.layout.slots import SlotBlocks, divide
from vmm_dwdp.memory.assembly import Assembly, Place, Share, Weights, close_shares
from vmm_dwdp.memory.bank import Bank
from vmm_dwdp.memory.cache import RemoteTile, ResidentCache
from vmm_dwdp.memory.tensor_memory import TensorMemory, allow, map_tiles

LARGE_BLOCK: Final = 16 << 20  # bytes of a slot's large blocks where layers differ: few mappings, little memory unused

_Key = tuple[int, str]  # layer number, weight


class VirtualAssembly(Assembly):
    """Assembled ranges by virtual memory management.

    Args:
        handle_type: how this rank's memory travels to the others; ``None`` if there are none.
        host_location: where the memory of `HOST` is.
        in_place: whether to map in-place ranges too.
        cache_nbytes: how much memory to take at most for remote tiles of theirs.
        bank_nbytes: how much memory to take at most for banks before them.
    """

    def __init__(
        self,
        driver: Driver,
        ledger: Ledger,
        rank: int,
        layers: Sequence[Layer],
        prefetch_depth: int,
        handle_type: HandleType | None,
        host_location: Location,
        in_place: bool,
        cache_nbytes: int = 0,
        bank_nbytes: int = 0,
    ) -> None:
        super().__init__(driver, ledger, rank, layers, prefetch_depth)
        self._handle_type = handle_type
        self._host_location = host_location
        self._cache_nbytes = cache_nbytes
        self._bank_nbytes = bank_nbytes
        self._remote_tiles: list[RemoteTile] = []  # of the in-place ranges, if there is to be a cache
        self._own: dict[_Key, TensorMemory[Reservation]] = {}
        self._views: dict[tuple[int, str, Owner], TensorMemory[Reservation]] = {}
        self._tiles: dict[tuple[int, str, Owner], list[Allocation]] = {}
        self._in_place_ranges: dict[_Key, TensorMemory[Reservation]] = {}
        self._slot_blocks: list[Allocation] = []
        self._has_slots = self._has_tensors = False
        self._weights: dict[int, dict[str, torch.Tensor]] = {}
        self._in_place: dict[int, dict[str, torch.Tensor]] | None = {} if in_place else None

    @property
    def granularity(self) -> int:
        return max(self._driver.granularity(DEVICE), self._driver.granularity(self._host_location))

    def num_mappings(self) -> int:
        banks = sum(1 for _ in self._weights_of_layers()) if self._bank_nbytes else 0
        return self._num_own_mappings() + 2 * self._num_cache_pages() + banks

    def _num_own_mappings(self) -> int:
        """How many there are while nothing is cached, without the cache's own."""
        own_and_views = sum(
            len(layer.layouts[weight].tiles_of(owner))
            for layer, weight in self._weights_of_layers()
            for owner in layer.placement.owners
        )
        slots = [self._blocks(layers) for layers in self._layers_of_slot()]
        staged = sum(len(used) for blocks in slots for regions in blocks.regions for used in regions)
        in_place = sum(len(layer.layouts[weight].tiles) for layer, weight in self._weights_of_layers())
        return own_and_views + staged + (0 if self._in_place is None else in_place)

    def _num_cache_pages(self) -> int:
        """As many as were asked for, but no more than there are remote ones."""
        if not self._cache_nbytes:
            return 0
        return min(self._cache_nbytes // self.granularity, sum(layer.num_remote_pages for layer in self._layers))

    def shard(self, layer: Layer, weight: str, owner: Owner) -> torch.Tensor:
        if (layer.number, weight, owner) not in self._tiles:
            self._take(layer, weight, owner)
        spec, layout = layer.weights[weight], layer.layouts[weight]
        shape = spec.of(len(layer.placement.experts(owner)))
        first = layout.shard_bytes(owner).start
        if owner == self.rank:
            return self._own[layer.number, weight].tensor(first, shape, spec.dtype)
        offset = first - layout.resident_bytes(owner).start
        return self._views[layer.number, weight, owner].tensor(offset, shape, spec.dtype)

    def _take(self, layer: Layer, weight: str, owner: Owner) -> None:
        """Physical memory for one shard, mapped where this rank addresses it."""
        layout = layer.layouts[weight]
        location = self._host_location if owner == HOST else DEVICE
        tiles = self._tiles[layer.number, weight, owner] = []
        for tile in layout.tiles_of(owner):
            nbytes = len(tile.pages) * layout.granularity
            label = _label(layer, weight, owner)
            allocation = Allocation.create(self._driver, self._ledger, nbytes, location, self._handle_type, label)
            tiles.append(self._resources.push(allocation))
        self._hold(layer, weight, owner, tiles)

    def _hold(self, layer: Layer, weight: str, owner: Owner, tiles: list[Allocation]) -> None:
        """Map a shard that this rank holds where it addresses it, to be written."""
        layout = layer.layouts[weight]
        nbytes = sum(tile.nbytes for tile in tiles)
        self.resident_nbytes += nbytes
        if owner == self.rank:
            memory = self._own.get((layer.number, weight))
            if memory is None:
                memory = self._reserve(layout.num_pages * layout.granularity, f"layer {layer.number}, {weight}")
                self._own[layer.number, weight] = memory
            map_tiles(memory, layout.resident_bytes(owner), tiles, Access.READ_WRITE)
        else:
            self.pool_nbytes += nbytes
            if tiles:
                view = self._view(layer, weight, owner, tiles, Access.READ_WRITE, torch.device("cpu"))
                self._driver.allow_cpu(view.memory.address, view.memory.nbytes, self._host_location)

    def _reserve(self, nbytes: int, label: str, device: torch.device | None = None) -> TensorMemory[Reservation]:
        """Addresses; the tensors over them are on ``device`` (default: the driver's)."""
        memory = TensorMemory(Reservation(self._driver, self._ledger, nbytes, label), device or self._driver.device)
        self._ranges.append(memory)
        return memory

    def _view(
        self,
        layer: Layer,
        weight: str,
        owner: Owner,
        tiles: Sequence[Allocation],
        access: Access,
        device: torch.device | None = None,
    ) -> TensorMemory[Reservation]:
        """Where this rank addresses another owner's pages."""
        span = range(len(layer.layouts[weight].resident_bytes(owner)))
        memory = self._views.get((layer.number, weight, owner))
        if memory is None:
            memory = self._reserve(len(span), _label(layer, weight, owner), device)
            self._views[layer.number, weight, owner] = memory
        map_tiles(memory, span, tiles, access)
        return memory

    def _export(self, owner: Owner, place: Place) -> list[Share]:
        assert self._handle_type is not None, "a group of one has nobody to share with"
        shares: list[Share] = []
        try:
            for allocation in self._handles(owner, place):
                shares.append(allocation.export(self._handle_type))  # noqa: PERF401
        except BaseException:
            close_shares(shares)
            raise
        return shares

    def _handles(self, owner: Owner, place: Place) -> Iterator[Allocation]:
        """What others import to have ``owner``'s memory."""
        for layer, weight in self._weights_of_layers():
            yield from self._tiles[layer.number, weight, owner]

    def num_shares(self, owner: Owner, place: Place = "device") -> int:
        return sum(len(layer.layouts[weight].tiles_of(owner)) for layer, weight in self._weights_of_layers())

    def _attach(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        for layer, weight, tiles in self._imported(owner, shares):
            if tiles:
                self._view(layer, weight, owner, tiles, Access.READ)

    def _adopt(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        for layer, weight, tiles in self._imported(owner, shares):
            self._hold(layer, weight, owner, tiles)

    def _imported(self, owner: Owner, shares: Sequence[Share]) -> Iterator[tuple[Layer, str, list[Allocation]]]:
        """What shares of another process become here: the tiles of every weight."""
        remaining = iter(shares)
        for layer, weight in self._weights_of_layers():
            tiles = self._tiles[layer.number, weight, owner] = []
            for tile in layer.layouts[weight].tiles_of(owner):
                nbytes = len(tile.pages) * self.granularity
                tiles.append(self._import(next(remaining), nbytes, _label(layer, weight, owner)))
            yield layer, weight, tiles

    def _import(self, share: Share, nbytes: int, label: str) -> Allocation:
        assert self._handle_type is not None, "a group of one has nobody to import from"
        with uninterrupted():
            imported = Allocation.import_(self._driver, self._ledger, share, self._handle_type, nbytes, label)
            return self._resources.push(imported)

    @contextmanager
    def writing(self, layer: Layer, weight: str, owner: Owner) -> Iterator[torch.Tensor]:
        if owner == self.rank:
            yield self.shard(layer, weight, owner)
            return
        view = self._views[layer.number, weight, owner]
        span = range(view.memory.nbytes)
        allow(view, span, Access.READ_WRITE)
        self._driver.allow_cpu(view.memory.address, view.memory.nbytes, self._host_location)
        try:
            yield self.shard(layer, weight, owner)
        finally:
            allow(view, span, Access.READ)

    def check_integrity(self) -> None:
        slots = [self._blocks(layers) for layers in self._layers_of_slot()]
        in_place = 0 if self._in_place is None else len(list(self._weights_of_layers()))
        expected = {
            "mappings": self._num_own_mappings(),
            "handles": self._num_own_handles() + sum(len(blocks.sizes) for blocks in slots),
            "reservations": len(self._own) + len(self._views) + in_place,
        }
        if self.cache is not None:
            self.cache.require_whole()
            expected["mappings"] += self.cache.num_mappings
            expected["handles"] += self.cache.num_handles
            expected["reservations"] += 1
        if self.bank is not None:
            expected["mappings"] += self.bank.num_handles
            expected["handles"] += self.bank.num_handles
        counts = self._ledger.counts()
        for kind, number in expected.items():
            if counts[kind] != number:
                raise StateError(f"the ledger counts {counts[kind]} {kind}, but the layouts have {number}")
        staged = sum(sum(blocks.sizes) for blocks in slots) * self.granularity
        if staged != self.staged_nbytes:
            raise StateError(f"the slots have {self.staged_nbytes} bytes, but the layouts need {staged}")
        for (number, weight, owner), held in self._tiles.items():
            layout = next(layer.layouts[weight] for layer in self._layers if layer.number == number)
            if sum(tile.nbytes for tile in held) != len(layout.resident_bytes(owner)):
                raise StateError(f"layer {number}, {weight}: the handles of {in_words(owner)} do not make up its span")

    def _num_own_handles(self) -> int:
        """How many there are, besides those of slots and of the cache."""
        return sum(map(len, self._tiles.values()))

    def build(self) -> None:
        for layer, weight in self._weights_of_layers():
            if self._tiles.get((layer.number, weight, HOST)):  # until here this rank may have filled it
                resident = layer.layouts[weight].resident_bytes(HOST)
                allow(self._views[layer.number, weight, HOST], range(len(resident)), Access.READ)
        self._take_slots_and_cache()
        self._remote_tiles = []
        for layer, weight in self._weights_of_layers():
            if self._in_place is not None:
                self._map_in_place(layer, weight)
        for layer, weight in self._weights_of_layers() if not self._has_tensors else ():
            self._make_tensors(layer, weight)
        self._has_tensors = True
        if self.cache is not None:
            self.cache.serve(self._remote_tiles)

    def _take_slots_and_cache(self) -> None:
        """Unless they are there."""
        if not self._has_slots:
            for slot, layers in enumerate(self._layers_of_slot()):
                self._build_slot(slot, layers)
            self._has_slots = True
        if self.cache is None and (pages := self._num_cache_pages()):
            nbytes = pages * self.granularity
            self.cache = ResidentCache(self._driver, self._ledger, nbytes, self.granularity, self._resources)
        if self.cache is not None:
            self.cache.take()
        if self.bank is None and self._bank_nbytes and any(layer.num_remote for layer in self._layers):
            self.bank = Bank(self._driver, self._ledger, self._layers, self._bank_nbytes, self._resources)
        if self.bank is not None:
            self.bank.take()

    def _make_tensors(self, layer: Layer, weight: str) -> None:
        """What `weights` returns. Apart from `build`, whose frame, if it fails, would keep the last tensor's range."""
        spec = layer.weights[weight]
        if self._depth:
            tensor = self._own[layer.number, weight].tensor(0, spec.shape, spec.dtype)
            self._weights.setdefault(layer.number, {})[weight] = tensor
        if self._in_place is not None:
            memory = self._in_place_ranges[layer.number, weight]
            tensor = memory.tensor(self._bank_before(layer, weight), spec.shape, spec.dtype)
            self._in_place.setdefault(layer.number, {})[weight] = tensor
            if self.bank is not None:
                self.bank.show(layer.number, weight, memory)

    def _bank_before(self, layer: Layer, weight: str) -> int:
        """Where in its range the first expert in place is."""
        return 0 if self.bank is None else self.bank.nbytes_before(layer.number, weight)

    def _map_in_place(self, layer: Layer, weight: str) -> None:
        """Every owner's own pages side by side; those that several owners back, of this rank or the nearest of them."""
        layout = layer.layouts[weight]
        handles = {
            owner: dict(zip(layout.tiles_of(owner), self._tiles[layer.number, weight, owner], strict=True))
            for owner in layer.placement.owners
        }
        owners = [layer.nearest(tile) for tile in layout.tiles]
        tiles = [handles[owner][tile] for owner, tile in zip(owners, layout.tiles, strict=True)]
        first = self._bank_before(layer, weight)
        span = range(first, first + layout.num_pages * layout.granularity)
        memory = self._in_place_ranges.get((layer.number, weight))
        if memory is None:
            memory = self._reserve(span.stop, f"layer {layer.number}, {weight}, in place")
            self._in_place_ranges[layer.number, weight] = memory
        if self.bank is not None:
            self.bank.map(layer.number, weight, memory.memory)
        mappings = map_tiles(memory, span, tiles, Access.READ)
        if self._cache_nbytes:
            self._remote_tiles += [
                RemoteTile(
                    label=memory.memory.label,
                    layer=layer.number,
                    experts=layout.experts_in(tile),
                    memory=memory.memory,
                    offset=(offset := tile.pages.start * layout.granularity),
                    handle=handle,
                    source=self._source(layer, weight, owner, offset),
                    mappings=[mapping],
                )
                for owner, tile, handle, mapping in zip(owners, layout.tiles, tiles, mappings, strict=True)
                if owner != self.rank
            ]

    def _build_slot(self, slot: int, layers: Sequence[Layer]) -> None:
        """Take one slot's blocks and map them around the resident spans of the layers that use it."""
        blocks = self._blocks(layers)
        first = len(self._slot_blocks)
        for pages in blocks.sizes:
            nbytes = pages * self.granularity
            allocation = Allocation.create(self._driver, self._ledger, nbytes, label=f"slot {slot}")
            self._slot_blocks.append(self._resources.push(allocation))
            self.staged_nbytes += nbytes
        allocations = self._slot_blocks[first:]
        for layer, regions in zip(layers, blocks.regions, strict=True):
            for (weight, region), used in zip(self._staged(layer), regions, strict=True):
                memory = self._own[layer.number, weight]
                offset = region.start
                for block in used:
                    memory.memory.map(offset, allocations[block])
                    offset += allocations[block].nbytes
                allow(memory, region, Access.READ_WRITE)

    def _blocks(self, layers: Sequence[Layer]) -> SlotBlocks:
        pages = [[len(region) // self.granularity for _, region in self._staged(layer)] for layer in layers]
        return divide(pages, large=max(1, LARGE_BLOCK // self.granularity))

    def _staged(self, layer: Layer) -> Iterator[tuple[str, range]]:
        """The regions of a layer that slots back: (weight, bytes of its range)."""
        for weight, layout in layer.layouts.items():
            for region in layout.staged_bytes(self.rank):
                yield weight, region

    def weights(self, layer: Layer, mode: Mode) -> Weights:
        return self._weights_in(mode)[layer.number]

    def _weights_in(self, mode: Mode) -> dict[int, dict[str, torch.Tensor]]:
        if mode == "staged":
            return self._weights
        assert self._in_place is not None, "the runtime asks only for what the config states"
        return self._in_place

    def tensor_list(self, layer: Layer, weight: str, mode: Mode) -> list[torch.Tensor]:
        tensor = self._weights_in(mode)[layer.number][weight]
        return [tensor[run.start : run.stop] for run in self._parts(layer, weight)]

    def _destination(self, layer: Layer, weight: str, byte: int) -> Address:
        return self._own[layer.number, weight].memory.at(byte)

    def _source(self, layer: Layer, weight: str, owner: Owner, byte: int) -> Address:
        offset = byte - layer.layouts[weight].resident_bytes(owner).start
        return self._views[layer.number, weight, owner].memory.at(offset)

    def close(self) -> None:
        self._weights.clear()
        self._in_place = None
        if self.bank is not None:
            self.bank.close()
        super().close()


def _label(layer: Layer, weight: str, owner: Owner) -> str:
    return f"layer {layer.number}, {weight}, of {in_words(owner)}"

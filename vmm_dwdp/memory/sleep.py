"""Pages given back to the device and taken again at the same addresses; meanwhile the bytes are in host memory.

[Note: Asleep]
Addresses, tensors and whatever was captured with them stay; what is behind them goes. A rank's shards are copied to
handles in host memory, one for each shard, before the others are asked to sleep, so that there is nothing to undo if
there is no room; and from there to new pages, before they are asked to wake. In between nothing is mapped.

                       own shards           slots, cache    pages of others         handed over to who comes back
    awake              device               taken           imported, mapped        device
    save               device and host
    asleep, kept       host                 given back      imported from host      host
    take again         host and device      taken
    asleep, given up   nowhere              given back      nowhere                 nothing

What a rank has imported keeps its owner's memory. So all let go of it together, but of another's pages on the device
only once they hold what it has saved: at any moment every living rank has the bytes of every other, wherever one dies.

The pool of host memory stays where it is, mapped and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vmm_dwdp.allocator.driver import Access, Copy, Location
from vmm_dwdp.allocator.handles import Allocation, Reservation, ResourceStack, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import DriverError, StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.needs import in_gb
from vmm_dwdp.layout.placement import HOST, Owner, in_words
from vmm_dwdp.memory.assembly import Place, Share
from vmm_dwdp.memory.room import free_bytes
from vmm_dwdp.memory.virtual import VirtualAssembly


class SleepingAssembly(VirtualAssembly):
    """An assembly by virtual memory management that can sleep; see [Note: Asleep].

    Args:
        saved_location: where in host memory shards are saved.
    """

    def __init__(self, *args: Any, saved_location: Location) -> None:
        super().__init__(*args)
        self._saved_location = saved_location
        self._saved: dict[tuple[int, str, Owner], Allocation] = {}  # this rank's own also while it is awake: see `save`
        self._windows = self._resources.push(ResourceStack())  # through which saved shards are copied

    def require_can_sleep(self) -> None:
        pass

    # -- to host memory ----------------------------------------------------------------------------------------------
    def save(self) -> None:
        """See `Assembly.save`. Host memory of the time before is used again: to take it is most of the time."""
        self._windows.close()
        if not self.is_there(self.rank, "device"):
            if not self.is_there(self.rank, "host"):
                raise StateError("sleep(keep=False) gave the weights up: there is nothing to keep before an update")
            return
        self.forget_saved()
        try:
            for layer, weight, nbytes in self._shards_of(self.rank):
                with self.touching():
                    if (layer.number, weight, self.rank) not in self._saved:
                        self._saved[layer.number, weight, self.rank] = self._create_saved(layer, weight, nbytes)
                    self._copy_saved(layer, weight, to_device=False)
        except BaseException as error:
            undo_after(error, self._windows.close)
            undo_after(error, lambda: self._release(self.rank, "host"))
            raise
        with uninterrupted(), self._handing_over:
            self._there.add((self.rank, "host"))

    def forget_saved(self) -> None:
        with uninterrupted(), self._handing_over:
            self._there = {each for each in self._there if each != (self.rank, "host") and each[1] != "nowhere"}
        if (self.rank, "host") in self._received:  # imported memory cannot be handed on once more
            self.drop(self.rank, "host")

    def give_up(self) -> None:
        for owner in range(self._layers[0].placement.config.group_size):
            with uninterrupted(), self._handing_over:
                self._there.add((owner, "nowhere"))
            self.drop(owner, "host")

    def _create_saved(self, layer: Layer, weight: str, nbytes: int) -> Allocation:
        label = _label(layer, weight, self.rank)
        stated = (nbytes, self._saved_location, self._handle_type, label)
        try:
            return self._resources.push(Allocation.create(self._driver, self._ledger, *stated))
        except DriverError as error:
            if not error.is_for_want_of_memory:
                raise
            wanted = sum(each for _, _, each in self._shards_of(self.rank))
            taken, free = sum(each.nbytes for each in self._saved.values()), free_bytes(torch.device("cpu"))
            told = (
                f"{error.attempt}: to keep this rank's shards takes {in_gb(wanted)} of host memory: after "
                f"{in_gb(taken)} of them {in_gb(free)} are free, and sleep(keep=False) takes none"
            )
            raise DriverError(error.call, error.code, told) from error

    def _copy_saved(self, layer: Layer, weight: str, *, to_device: bool) -> None:
        """Between a saved shard and this rank's own pages, through addresses of a moment."""
        saved, span = self._saved[layer.number, weight, self.rank], layer.layouts[weight].resident_bytes(self.rank)
        window = self._windows.push(Reservation(self._driver, self._ledger, saved.nbytes, saved.label))
        window.map(0, saved)
        window.set_access(0, saved.nbytes, Access.READ_WRITE)
        here, there = self._own[layer.number, weight].memory.at(span.start), window.at(0)
        copy = Copy(here, there, len(span)) if to_device else Copy(there, here, len(span))
        stream = self._driver.current_stream()
        self._driver.copy(self._driver.prepare([copy]), stream)
        self._driver.synchronize(stream)
        self._windows.close()

    def _shards_of(self, owner: Owner) -> Iterator[tuple[Layer, str, int]]:
        """The shards of an owner that have pages, and how many bytes each takes when it is saved."""
        page = self._driver.granularity(self._saved_location)
        for layer, weight in self._weights_of_layers():
            if span := layer.layouts[weight].resident_bytes(owner):
                yield layer, weight, -(-len(span) // page) * page

    # -- off the device, and back --------------------------------------------------------------------------------------
    def let_go(self) -> None:
        for (_, _, owner), view in self._views.items():
            if owner != HOST:
                view.memory.clear()
        for memory in self._in_place_ranges.values():
            memory.memory.clear()

    def give_back(self) -> None:
        with uninterrupted(), self._handing_over:
            self._there.discard((self.rank, "device"))
        self.let_go()
        for memory in self._own.values():
            memory.memory.clear()
        self._has_slots = False
        while self._slot_blocks:
            self._resources.close_one(self._slot_blocks[-1])
            del self._slot_blocks[-1]
        self.staged_nbytes = 0
        if self.cache is not None:
            self.cache.give_back()
        if self.bank is not None:
            self.bank.give_back()
        self.drop(self.rank, "device")
        self.resident_nbytes = self.pool_nbytes

    def take_again(self) -> None:
        self._windows.close()
        if self.is_there(self.rank, "device"):
            return
        self.give_back()  # what a call that failed has left
        for layer, weight in self._weights_of_layers():
            with self.touching():
                self._take(layer, weight, self.rank)
                if (layer.number, weight, self.rank) in self._saved:
                    self._copy_saved(layer, weight, to_device=True)
        with self.touching():
            self._take_slots_and_cache()
            self.offer(self.rank)

    # -- what is handed over -------------------------------------------------------------------------------------------
    def num_shares(self, owner: Owner, place: Place = "device") -> int:
        if place == "device":
            return super().num_shares(owner)
        return 0 if place == "nowhere" else sum(1 for _ in self._shards_of(owner))

    def _handles(self, owner: Owner, place: Place) -> Iterator[Allocation]:
        if place == "device":
            yield from super()._handles(owner, place)
        else:
            yield from (self._saved[layer.number, weight, owner] for layer, weight, _ in self._shards_of(owner))

    def _attach(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        if place == "device":
            super()._attach(owner, place, shares)
        elif place == "host":
            self._import_saved(owner, shares)

    def _adopt(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        if place == "device":
            super()._adopt(owner, place, shares)
        elif place == "host":
            self._import_saved(owner, shares)

    def _import_saved(self, owner: Owner, shares: Sequence[Share]) -> None:
        for share, (layer, weight, nbytes) in zip(shares, self._shards_of(owner), strict=False):
            with uninterrupted():
                imported = self._import(share, nbytes, _label(layer, weight, owner))
                self._saved[layer.number, weight, owner] = imported

    def drop(self, owner: Owner, place: Place) -> None:
        super().drop(owner, place)
        self._release(owner, place)

    def _release(self, owner: Owner, place: Place) -> None:
        """The handles of an owner's memory. Another call goes on where one failed."""
        for layer, weight in self._weights_of_layers():
            key = layer.number, weight, owner
            if place == "device":
                for tile in self._tiles.get(key, []):
                    self._resources.close_one(tile)
                self._tiles.pop(key, None)
            elif key in self._saved:
                self._resources.close_one(self._saved[key])
                del self._saved[key]

    def _num_own_handles(self) -> int:
        return super()._num_own_handles() + len(self._saved)


def _label(layer: Layer, weight: str, owner: Owner) -> str:
    return f"layer {layer.number}, {weight}, of {in_words(owner)}, saved"

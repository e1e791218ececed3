"""In pages, places and the cache."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_PLANS = ("tests/property/test_placement_and_layout.py",)
_BYTES = ("tests/property/test_assembled_bytes.py",)
_DOOR = ("tests/unit/group/test_door.py",)
_CACHE = ("tests/property/test_resident_cache.py",)
_FAILURES = ("tests/unit/test_failures.py",)
_CLOSING = ("tests/unit/test_closing.py",)

BUGS: Final = (
    Bug(
        "a copy is one page short",
        "vmm_dwdp/memory/assembly.py",
        "                len(run),\n",
        "                max(1, len(run) - 4096),\n",
        _BYTES,
    ),
    Bug(
        "a copy begins at the reader's place among the owner's pages",
        "vmm_dwdp/memory/virtual.py",
        "        offset = byte - layer.layouts[weight].resident_bytes(owner).start\n        return self._views",
        "        offset = byte - layer.layouts[weight].resident_bytes(self.rank).start\n        return self._views",
        _BYTES,
    ),
    Bug(
        "two owners are swapped",
        "vmm_dwdp/layout/placement.py",
        "                    sources.append(Source(range(start, start + count), owner))\n",
        "                    sources.append(Source(range(start, start + count), max(share, key=str)))\n",
        _PLANS,
    ),
    Bug(
        "a resident span is rounded inward",
        "vmm_dwdp/layout/ranges.py",
        "return range(first, -(-shard.stop // self.granularity) if shard else first)",
        "return range(first, max(first, shard.stop // self.granularity))",
        _PLANS,
    ),
    Bug(
        "the last slice of a segment is forgotten",
        "vmm_dwdp/layout/copies.py",
        "        for start in range(run.start, run.stop, slice_bytes):\n",
        "        for start in range(run.start, max(run.start + 1, run.stop - slice_bytes), slice_bytes):\n",
        _PLANS,
    ),
    Bug(
        "the shards of a dead rank are handed over in another order",
        "vmm_dwdp/memory/assembly.py",
        "        self._received[owner, place] = list(shares)\n",
        "        self._received[owner, place] = list(reversed(shares))\n",
        ("tests/multiprocess/test_death_and_return.py",),
    ),
    Bug(
        "peers may write",
        "vmm_dwdp/memory/virtual.py",
        "self._view(layer, weight, owner, tiles, Access.READ)",
        "self._view(layer, weight, owner, tiles, Access.READ_WRITE)",
        _DOOR,
    ),
    Bug(
        "a page of the cache that is in use counts as free",
        "vmm_dwdp/memory/cache.py",
        "if page not in used]",
        "]",
        _CACHE,
    ),
    Bug(
        "pages of the cache are mapped before they are filled",
        "vmm_dwdp/memory/cache.py",
        "            self._fill(moves)\n",
        "",
        _CACHE,
    ),
    Bug(
        "the cache cuts a shared page at the next expert",
        "vmm_dwdp/layout/ranges.py",
        "        return tuple((expert, min(run.stop, stop) - max(run.start, first)) for expert, run in runs)",
        "        return tuple((expert, min(run.stop, stop) - run.start) for expert, run in runs)",
        _CACHE,
    ),
    Bug(
        "a tile stays unmapped after a refresh that failed",
        "vmm_dwdp/memory/cache.py",
        "            try:\n                self._mend()\n",
        "            try:\n                self._torn.clear()\n",
        _FAILURES,
    ),
    Bug(
        "a torn tile is read",
        "vmm_dwdp/memory/cache.py",
        "        if (self._torn or self._old) and (torn",
        "        if not self and (torn",
        ("tests/unit/test_failures.py::test_a_refresh_that_cannot_be_undone_bars_passes_in_place_until_the_next",),
    ),
    Bug(
        "the tensors of a layer that is read in place are those of its slot",
        "vmm_dwdp/memory/virtual.py",
        "tensor = self._weights_in(mode)[layer.number][weight]",
        'tensor = self._weights_in("staged")[layer.number][weight]',
        ("tests/unit/test_runtime_states.py::test_the_tensors_of_a_layer_are_those_of_its_mode",),
    ),
    Bug(
        "integrity compares a slot with nothing",
        "vmm_dwdp/memory/assembly.py",
        "same = torch.equal(held, owned)",
        "same = held.shape == owned.shape",
        _CLOSING,
    ),
)

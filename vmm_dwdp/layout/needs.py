"""How much memory one rank takes for experts, before any is taken, and what would take less. Pure integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import HOST

_GB: Final = 1e9


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes of physical memory that a rank takes for experts, in whole pages; a resident cache comes on top.

    Attributes:
        resident: its own shards.
        staged: the slots.
        host: the pool of host memory, of which one rank of the group takes all.
    """

    resident: int
    staged: int
    host: int

    @property
    def on_device(self) -> int:
        """What the rank takes where its weights are."""
        return self.resident + self.staged


def memory_needed(layers: Sequence[Layer], config: DWDPConfig, rank: int) -> MemoryNeeded:
    """The memory of ``rank`` for ``layers``, which are in the order of a pass and were described for ``config``."""
    layouts = [layout for layer in layers for layout in layer.layouts.values()]
    slots = [layers[slot :: config.prefetch_depth] for slot in range(min(config.prefetch_depth, len(layers)))]
    return MemoryNeeded(
        resident=sum(len(layout.resident_bytes(rank)) for layout in layouts),
        staged=sum(_slot(sharing, config, rank) for sharing in slots),
        host=sum(len(layout.resident_bytes(HOST)) for layout in layouts) if config.host_experts else 0,
    )


def _slot(layers: Sequence[Layer], config: DWDPConfig, rank: int) -> int:
    """Bytes of a slot that these layers use in turn: pages fit any region, memory without pages only its own."""
    regions = [[*_regions(layer, rank)] for layer in layers]
    if config.assembly == "vmm":
        return max(map(sum, regions))
    return sum(max(nbytes[index : index + 1] for nbytes in regions)[0] for index in range(max(map(len, regions))))


def _regions(layer: Layer, rank: int) -> Iterator[int]:
    for layout in layer.layouts.values():
        yield from map(len, layout.staged_bytes(rank))


Needed = Callable[[DWDPConfig], MemoryNeeded]  # by a rank, if its group had this config


def in_gb(nbytes: int) -> str:
    return f"{nbytes / _GB:.2f} GB"


def what_fits(config: DWDPConfig, needed: Needed, free: int, num_experts: int) -> str:
    """Which change of ``config`` would make a rank's experts fit into ``free`` bytes of its device, in words.

    ``num_experts``: of the layer that has fewest.
    """
    fitting = [
        f"{words} (needs {in_gb(other.on_device)})"
        for words, other in _alternatives(config, needed, free, num_experts)
        if other.on_device <= free
    ]
    return " or ".join(fitting) + " would fit" if fitting else "no config of a group of this size fits"


def _alternatives(
    config: DWDPConfig, needed: Needed, free: int, num_experts: int
) -> Iterator[tuple[str, MemoryNeeded]]:
    """Configs that may need less, from those that cost least speed on, in words, and what they need."""
    fewer_slots = replace(config, prefetch_depth=min(config.prefetch_depth, 1))
    least = replace(config, num_local_experts=None)
    if fewer_slots != config:
        yield "prefetch_depth: 1", needed(fewer_slots)
    if least != config:
        yield "no num_local_experts", needed(least)
    if config.assembly == "vmm":  # which can have host memory
        yield _with_host_memory(least, needed, free, num_experts)
        if fewer_slots != config:
            words, both = _with_host_memory(replace(fewer_slots, num_local_experts=None), needed, free, num_experts)
            yield f"{words} with prefetch_depth: 1", both


def _with_host_memory(config: DWDPConfig, needed: Needed, free: int, num_experts: int) -> tuple[str, MemoryNeeded]:
    """As few experts in host memory as are enough, found by halving; all of them where they are not."""
    few, many = config.host_experts, num_experts
    while many - few > 1:
        middle = (few + many) // 2
        fits = needed(replace(config, host_experts=middle)).on_device <= free
        few, many = (few, middle) if fits else (middle, many)
    return f"host_experts: {many}", needed(replace(config, host_experts=many))

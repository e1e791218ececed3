"""How much memory one rank takes for experts, before any is taken. Pure integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import HOST


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

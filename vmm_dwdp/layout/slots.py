"""The physical blocks of one slot, and which of them each layer maps where. Pure integers.

A slot serves many layers in turn, and its blocks are mapped into the ranges of all of them. A block maps only whole, so
the blocks must fit every layer's staged regions exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Region = int  # pages of one staged region: one side of one weight's resident span


@dataclass(frozen=True)
class SlotBlocks:
    """Blocks of one slot.

    Attributes:
        sizes: pages of each block.
        regions: for each layer that uses the slot, for each of its regions, the blocks that back it, in order.
    """

    sizes: tuple[int, ...]
    regions: tuple[tuple[tuple[int, ...], ...], ...]


def divide(layers: Sequence[Sequence[Region]], large: int) -> SlotBlocks:
    """Blocks for layers whose staged regions have the given sizes in pages.

    Where all layers agree, a block per region. Otherwise as many blocks of ``large`` pages as every layer can use, and
    single pages for the rest: the sum of all sizes is never more than the pages of the layer that has most.
    """
    if all(list(regions) == list(layers[0]) for regions in layers):
        sizes = tuple(pages for pages in layers[0] if pages)
        blocks = iter(range(len(sizes)))
        regions = tuple((next(blocks),) if pages else () for pages in layers[0])
        return SlotBlocks(sizes, (regions,) * len(layers))
    num_large = min(sum(pages // large for pages in regions) for regions in layers)
    num_single = max(sum(regions) for regions in layers) - num_large * large
    return SlotBlocks(
        (large,) * num_large + (1,) * num_single,
        tuple(_assign(regions, large, num_large) for regions in layers),
    )


def _assign(regions: Sequence[Region], large: int, num_large: int) -> tuple[tuple[int, ...], ...]:
    next_large, next_single = 0, num_large
    assigned: list[tuple[int, ...]] = []
    for pages in regions:
        blocks: list[int] = []
        while pages:
            if pages >= large and next_large < num_large:
                blocks.append(next_large)
                next_large += 1
                pages -= large
            else:
                blocks.append(next_single)
                next_single += 1
                pages -= 1
        assigned.append(tuple(blocks))
    return tuple(assigned)

"""What one rank copies for one layer, and in which order. Pure integers.

    sources of a weight      |== owner 0 ==|   own   |== owner 2 ==|== owner 3 ==|
    resident span                        |edge| own |edge|
    segments                 |-- owner 0 --|             |- owner 2 -|-- owner 3 --|

The bytes inside the resident span that belong to others, the edges, are copied once, at publish. The rest, the source
segments, are copied for every pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vmm_dwdp.layout import RangeLayout
from vmm_dwdp.placement import HOST, Owner


class Segment(NamedTuple):
    """A run of bytes of one weight with one owner; also a slice of such a run.

    ``bytes`` counts from the start of the weight's assembled range.
    """

    weight: str
    owner: Owner
    bytes: range


@dataclass(frozen=True)
class LayerPlan:
    """The copies of one rank for one layer.

    Attributes:
        edges: copied once, at publish, into the resident span.
        slices: copied whenever the layer is fetched, in the order of issue.
    """

    edges: tuple[Segment, ...]
    slices: tuple[Segment, ...]

    @property
    def fetched_bytes(self) -> int:
        """Bytes that one fetch of the layer moves."""
        return sum(len(piece.bytes) for piece in self.slices)


def plan_layer(layouts: Mapping[str, RangeLayout], rank: int, slice_bytes: int | None) -> LayerPlan:
    """The copies of ``rank`` for a layer of the given weights.

    Weights are copied in the order of ``layouts``, so state first what the forward pass reads first. Within a weight
    the owners take turns, ``slice_bytes`` at a time (``None``: a whole segment at a time), and every rank starts with
    the next higher rank, so that ranks which run in step pull from different owners.
    """
    edges: list[Segment] = []
    slices: list[Segment] = []
    for weight, layout in layouts.items():
        resident = layout.resident_bytes(rank)
        segments: list[Segment] = []
        for source in layout.placement.sources(rank):
            remote = layout.bytes_of(source.experts)
            outside = (_before(remote, resident), _after(remote, resident))
            segments += [Segment(weight, source.owner, piece) for piece in outside if piece]
            if edge := _within(remote, resident):
                edges.append(Segment(weight, source.owner, edge))
        slices += _interleave(segments, rank, layout.placement.config.group_size, slice_bytes)
    return LayerPlan(tuple(edges), tuple(slices))


def _before(run: range, span: range) -> range:
    return range(run.start, min(run.stop, span.start)) if span else run


def _after(run: range, span: range) -> range:
    return range(max(run.start, span.stop), run.stop) if span else range(0)


def _within(run: range, span: range) -> range:
    return range(max(run.start, span.start), min(run.stop, span.stop))


def _interleave(segments: list[Segment], rank: int, group_size: int, slice_bytes: int | None) -> list[Segment]:
    """One slice of each owner in turn, beginning with the rank after ``rank``."""

    def turn(owner: Owner) -> int:
        return group_size if owner == HOST else (owner - rank - 1) % group_size

    queues: dict[Owner, list[Segment]] = {owner: [] for owner in sorted({s.owner for s in segments}, key=turn)}
    for weight, owner, run in segments:
        step = slice_bytes or len(run)
        for start in range(run.start, run.stop, step):
            queues[owner].append(Segment(weight, owner, range(start, min(start + step, run.stop))))
    rounds = max(map(len, queues.values()), default=0)
    return [queue[index] for index in range(rounds) for queue in queues.values() if index < len(queue)]

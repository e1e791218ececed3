"""What one rank copies for one layer, and in which order. Pure integers.

    sources of a weight      |== owner 0 ==|   own   |== owner 2 ==|== owner 3 ==|
    resident span                        |edge| own |edge|
    segments                 |-- owner 0 --|             |- owner 2 -|-- owner 3 --|

The bytes inside the resident span that belong to others, the edges, are copied once, at publish. The rest, the source
segments, are copied for every pass.

[Note: Copy plans]
A rank that copied from one owner after another would use one link at a time, and ranks in step would meet at one owner.
There are two ways to plan ahead how to pull from all owners at once (for what is not planned ahead see
``layout/turns.py``):

    slices     one stream: 0a 2a 3a 0b 2b 3b ...    pieces of the segments, the owners taking turns
    streams    owner 0:    0 ==============         whole segments, a stream for each owner; the copy engines take turns
               owner 2:    2 ==============
               owner 3:    3 ==============

Slices are as many as bytes are, and giving thousands of them to the driver takes milliseconds, in which it delays every
kernel launch. Streams take a handful of copies. Either way a rank begins with the next higher rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from vmm_dwdp.layout.placement import Owner, nearest_first
from vmm_dwdp.layout.ranges import RangeLayout

MAX_STREAMS: Final = 8  # a GPU has few copy engines, and every stream costs the launching thread an event


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
        streams: copied whenever the layer is fetched: for each copy stream, its copies in the order of issue; at least
            one.
    """

    edges: tuple[Segment, ...]
    streams: tuple[tuple[Segment, ...], ...]

    @property
    def fetched_bytes(self) -> int:
        """Bytes that one fetch of the layer moves."""
        return sum(len(piece.bytes) for stream in self.streams for piece in stream)

    @property
    def num_copies(self) -> int:
        """Copies that one fetch of the layer gives to the driver."""
        return sum(map(len, self.streams))


def plan_layer(layouts: Mapping[str, RangeLayout], rank: int, slice_bytes: int | None) -> LayerPlan:
    """The copies of ``rank`` for a layer of the given weights; see [Note: Copy plans].

    Args:
        layouts: weights are copied in this order, so state first what the forward pass reads first.
        slice_bytes: how long a run of one owner's bytes may be before the copies turn to the next owner, in one stream;
            ``None``: a stream for each owner.
    """
    edges: list[Segment] = []
    remote: dict[str, list[Segment]] = {}
    for weight, layout in layouts.items():
        resident = layout.resident_bytes(rank)
        remote[weight] = []
        for source in layout.placement.sources(rank):
            run = layout.bytes_of(source.experts)
            outside = (_before(run, resident), _after(run, resident))
            remote[weight] += [Segment(weight, source.owner, piece) for piece in outside if piece]
            if edge := _within(run, resident):
                edges.append(Segment(weight, source.owner, edge))
    segments = [segment for run in remote.values() for segment in run]
    if not segments:
        return LayerPlan(tuple(edges), ())
    group_size = next(iter(layouts.values())).placement.config.group_size
    turns = nearest_first({segment.owner for segment in segments}, rank, group_size)
    if slice_bytes is None:
        return LayerPlan(tuple(edges), _by_owner(segments, turns))
    interleaved = [piece for run in remote.values() for piece in _interleave(run, turns, slice_bytes)]
    return LayerPlan(tuple(edges), (tuple(_merged(interleaved)),))


def _before(run: range, span: range) -> range:
    return range(run.start, min(run.stop, span.start)) if span else run


def _after(run: range, span: range) -> range:
    return range(max(run.start, span.stop), run.stop) if span else range(0)


def _within(run: range, span: range) -> range:
    return range(max(run.start, span.start), min(run.stop, span.stop))


def _by_owner(segments: list[Segment], turns: list[Owner]) -> tuple[tuple[Segment, ...], ...]:
    """The segments of each owner; owners beyond `MAX_STREAMS` share streams with the others."""
    streams: list[list[Segment]] = [[] for _ in turns[:MAX_STREAMS]]
    for segment in segments:
        streams[turns.index(segment.owner) % MAX_STREAMS].append(segment)
    return tuple(map(tuple, streams))


def _interleave(segments: list[Segment], turns: list[Owner], slice_bytes: int) -> list[Segment]:
    """One slice of each owner in turn."""
    queues: dict[Owner, list[Segment]] = {owner: [] for owner in turns}
    for weight, owner, run in segments:
        for start in range(run.start, run.stop, slice_bytes):
            queues[owner].append(Segment(weight, owner, range(start, min(start + slice_bytes, run.stop))))
    rounds = max(map(len, queues.values()))
    return [queue[index] for index in range(rounds) for queue in queues.values() if index < len(queue)]


def _merged(slices: list[Segment]) -> list[Segment]:
    """Slices that continue the one before them as one copy: with the other owners done, there is no turn to take."""
    merged: list[Segment] = []
    for piece in slices:
        if merged and merged[-1][:2] == piece[:2] and merged[-1].bytes.stop == piece.bytes.start:
            merged[-1] = piece._replace(bytes=range(merged[-1].bytes.start, piece.bytes.stop))
        else:
            merged.append(piece)
    return merged

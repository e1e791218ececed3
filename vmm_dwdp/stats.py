"""What a runtime tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """One layer, since publish.

    Attributes:
        hits: how often the layer was in its slot, or on its way there, when it was acquired.
        misses: how often it was not, and had to be fetched then.
        fetched_bytes: bytes that all its fetches moved.
        exposed_wait_s: seconds for which the compute stream stood still because the layer was not there yet. The device
            measures it; a wait counts once the layer is acquired again, or once `DWDPRuntime.stats` sees it over.
    """

    hits: int
    misses: int
    fetched_bytes: int
    exposed_wait_s: float


@dataclass(frozen=True)
class Stats:
    """One rank, since publish.

    Attributes:
        resident_bytes: physical memory of the shards that this rank holds, whole pages; the host pool's on the rank
            that created it.
        staged_bytes: physical memory of the slots.
        layers: by layer number, in the order of a pass.
    """

    resident_bytes: int
    staged_bytes: int
    layers: Mapping[int, LayerStats]

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers.values())

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers.values())

    @property
    def fetched_bytes(self) -> int:
        return sum(layer.fetched_bytes for layer in self.layers.values())

    @property
    def exposed_wait_s(self) -> float:
        return sum(layer.exposed_wait_s for layer in self.layers.values())

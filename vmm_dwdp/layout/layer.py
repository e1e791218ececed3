"""One MoE layer as a rank sees it: its weights, their layouts, and what is copied for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan, plan_layer
from vmm_dwdp.layout.placement import ExpertPlacement, Owner, nearest_first
from vmm_dwdp.layout.ranges import RangeLayout, Tile
from vmm_dwdp.layout.weight_spec import WeightSpec


@dataclass(frozen=True)
class Layer:
    """What is known of a layer before any memory is taken.

    Attributes:
        number: the model's own number of the layer.
        placement: the same for all of the layer's weights.
        layouts: by the name of the weight, in the order in which they are copied.
        rank: that sees it so.
        slice_bytes: as `plan_layer` takes it.
    """

    number: int
    weights: Mapping[str, WeightSpec]
    placement: ExpertPlacement
    layouts: Mapping[str, RangeLayout]
    rank: int
    slice_bytes: int | None

    @cached_property
    def plan(self) -> LayerPlan:
        """What the rank copies; worked out when it is asked for, as most configs are only asked what they take."""
        return plan_layer(self.layouts, self.rank, self.slice_bytes)

    @property
    def num_remote(self) -> int:
        """Experts that the rank does not hold."""
        return self.placement.num_experts - len(self.placement.experts(self.rank))

    @property
    def num_remote_pages(self) -> int:
        """Pages that it reads of others, in place."""
        tiles = (tile for layout in self.layouts.values() for tile in layout.tiles)
        return sum(len(tile.pages) for tile in tiles if self.nearest(tile) != self.rank)

    def nearest(self, tile: Tile) -> Owner:
        """Whose pages of a tile the rank reads in place."""
        return nearest_first(tile.owners, self.rank, self.placement.config.group_size)[0]


def describe_layer(
    number: int, weights: Mapping[str, WeightSpec], config: DWDPConfig, rank: int, granularity: int
) -> Layer:
    """Work out placement and layouts for rank ``rank``; raises `ConfigError` if the weights do not agree."""
    counts = {name: spec.num_experts for name, spec in weights.items()}
    if not counts:
        raise ConfigError(f"layer {number} has no weights")
    if len(set(counts.values())) > 1:
        stated = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(f"the weights of layer {number} disagree on the number of experts: {stated}")
    placement = ExpertPlacement(next(iter(counts.values())), config)
    layouts = {name: RangeLayout(placement, spec.expert_nbytes, granularity) for name, spec in weights.items()}
    slice_bytes = config.slice_bytes if isinstance(config.slice_bytes, int) else None
    return Layer(number, dict(weights), placement, layouts, rank, slice_bytes)


T = TypeVar("T")


class ByNumber(dict[int, T]):
    """What belongs to each layer, by the model's own numbers. Raises `ConfigError` for a number that no layer has."""

    def __missing__(self, number: int) -> T:
        raise ConfigError(f"there is no layer {number}; the layers are {', '.join(map(str, self))}")


class Layers:
    """The layers that were added so far.

    Attributes:
        in_order: in the order in which a pass reads them; whoever keeps the list sees what is added later.
        numbered: the same by their numbers.
    """

    def __init__(self) -> None:
        self.in_order: list[Layer] = []
        self.numbered: ByNumber[Layer] = ByNumber()

    def add(self, layer: Layer) -> None:
        """The next layer of a pass. Raises `ConfigError` if there is one of that number."""
        if layer.number in self.numbered:
            raise ConfigError(f"layer {layer.number} was added already")
        self.numbered[layer.number] = layer
        self.in_order.append(layer)

    def spread(self, config: DWDPConfig, rank: int, granularity: int) -> None:
        """Describe all of them anew, for another config."""
        self.in_order[:] = [
            describe_layer(layer.number, layer.weights, config, rank, granularity) for layer in self.in_order
        ]
        self.numbered.update((layer.number, layer) for layer in self.in_order)

    def with_weight(self, number: int, weight: str) -> Layer:
        """The layer of this number. Raises `ConfigError` if there is none, or it has no such weight."""
        layer = self.numbered[number]
        if weight not in layer.weights:
            raise ConfigError(f"layer {number} has no weight {weight!r}; it has {', '.join(layer.weights)}")
        return layer

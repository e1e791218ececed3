"""All MoE layers of a model, in the order of a pass and by the model's own numbers."""

from __future__ import annotations

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layer import Layer


class _Places(dict[int, int]):
    """Raises `ConfigError` for a number that no layer has."""

    def __missing__(self, number: int) -> int:
        raise ConfigError(f"there is no layer {number}; the layers are {', '.join(map(str, self))}")


class Layers:
    """What was added so far.

    Attributes:
        in_order: in the order in which a pass reads them; whoever keeps the list sees what is added later.
        places: by a layer's number, where in `in_order` it is. Raises `ConfigError` for one that is not there.
    """

    def __init__(self) -> None:
        self.in_order: list[Layer] = []
        self.places = _Places()

    def add(self, layer: Layer) -> None:
        """The next layer of a pass."""
        self.places[layer.number] = len(self.in_order)
        self.in_order.append(layer)

    def __contains__(self, number: int) -> bool:
        return number in self.places

    def numbered(self, number: int) -> Layer:
        """The layer of this number. Raises `ConfigError` if there is none."""
        return self.in_order[self.places[number]]

    def with_weight(self, number: int, weight: str) -> Layer:
        """The layer of this number. Raises `ConfigError` if there is none, or it has no such weight."""
        layer = self.numbered(number)
        if weight not in layer.weights:
            raise ConfigError(f"layer {number} has no weight {weight!r}; it has {', '.join(layer.weights)}")
        return layer

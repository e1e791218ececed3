"""In which row of its layer's tensors each expert is: as the model numbers them, until some change places.

[Note: Rows and experts]
An owner's memory is a run of rows, which never changes: `ExpertPlacement` counts rows. Which expert is in a row does.
Before anything moves, expert ``e`` is in row ``e``, and nobody has to tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import Owner


@dataclass(frozen=True)
class ExpertOrder:
    """Where all experts are. Equal on all ranks of a group whose weights are whole.

    Attributes:
        version: rises with each change.
        rows: by the number of a layer, the row of each expert; a layer that it lacks is in the model's order.
    """

    version: int = 0
    rows: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def is_moved(self, layer: Layer) -> bool:
        """Whether any expert of ``layer`` is in another row than that of its number."""
        return layer.number in self.rows

    def rows_of(self, layer: Layer) -> Sequence[int]:
        """By expert, its row."""
        return self.rows.get(layer.number, range(layer.placement.num_experts))

    def experts_of(self, layer: Layer) -> Sequence[int]:
        """By row, the expert that is in it."""
        rows = self.rows_of(layer)
        return rows if isinstance(rows, range) else sorted(range(len(rows)), key=rows.__getitem__)

    def held(self, layer: Layer, owner: Owner) -> Sequence[int]:
        """The experts in the memory of ``owner``, by row: a range, if the layer is in the model's order."""
        run = layer.placement.experts(owner)
        return self.experts_of(layer)[run.start : run.stop]

    def by_row(self, layer: Layer, counts: Sequence[int]) -> list[int]:
        """``counts``, of each expert, in the order of rows."""
        return [counts[expert] for expert in self.experts_of(layer)]

    def changed(self, experts: Mapping[int, Sequence[int]]) -> ExpertOrder:
        """The next version, in which some layers have other ``experts`` by row."""
        rows = dict(self.rows)
        for number, by_row in experts.items():
            inverse = sorted(range(len(by_row)), key=by_row.__getitem__)
            rows.pop(number, None)
            if inverse != list(range(len(by_row))):
                rows[number] = inverse
        return ExpertOrder(self.version + 1, rows)

    def numbers(self, layers: Sequence[Layer]) -> list[int]:
        """All of it, as ranks tell it to each other: the version, and by layer the row of each expert."""
        return [self.version, *(row for layer in layers for row in self.rows_of(layer))]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int], layers: Sequence[Layer]) -> ExpertOrder:
        """What `numbers` gave for the same layers. Raises `ValueError` if it is no such."""
        version, *remaining = numbers
        found = {}
        for layer in layers:
            count = layer.placement.num_experts
            rows, remaining = remaining[:count], remaining[count:]
            if sorted(rows) != list(range(count)):
                raise ValueError(f"the rows of layer {layer.number} are not those of {count} experts")
            if rows != sorted(rows):
                found[layer.number] = rows
        if remaining or version < 0:
            raise ValueError("an order of experts has a version and as many rows as there are experts")
        return cls(version, found)

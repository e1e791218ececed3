"""How many experts a bank has room for, and where its rows lie. Pure integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.ranges import RangeLayout


@dataclass(frozen=True)
class BankLayout:
    """The rows of a bank before one (layer, weight) in place: one contiguous tensor ``[S + E, ...]``.

    0       first                                  nbytes
    |-------|== row 0 ==|  ...  |== row S - 1 ==|==| expert 0 | expert 1 | ...
    |------------- pages of the bank ------------- | pages of the owners, in place

    Attributes:
        num_rows: ``S``.
        in_place: what follows the bank.
    """

    num_rows: int
    in_place: RangeLayout

    @property
    def nbytes(self) -> int:
        """Of the bank's pages, behind which the first expert in place is."""
        granularity = self.in_place.granularity
        return -(-self.num_rows * self.in_place.expert_nbytes // granularity) * granularity

    @property
    def first(self) -> int:
        """Byte at which row 0 begins."""
        return self.nbytes - self.num_rows * self.in_place.expert_nbytes


def bank_nbytes(layers: Sequence[Layer], num_rows: int) -> int:
    """Bytes of pages that banks of ``num_rows`` rows take, or of as many as a layer has remote experts."""
    return sum(
        BankLayout(min(num_rows, layer.num_remote), layout).nbytes
        for layer in layers
        for layout in layer.layouts.values()
    )


def bank_rows(layers: Sequence[Layer], nbytes: int) -> Mapping[int, int]:
    """By layer number how many rows its bank has, if all of them take at most ``nbytes``: as many in each, but no more
    than the layer has remote experts."""
    fits, too_many = 0, 1 + max(layer.num_remote for layer in layers)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if bank_nbytes(layers, middle) <= nbytes else (fits, middle)
    return {layer.number: min(fits, layer.num_remote) for layer in layers}

"""Where each expert is, as kernels ask for it: a table on the device for each layer, changed between passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.layer import Layer


class ExpertTables:
    """The order of experts, and the tables that were asked for. They are torch's memory, of 8 bytes an expert.

    Attributes:
        order: of now.
    """

    def __init__(self, driver: Driver, layers: Sequence[Layer]) -> None:
        """``layers`` may become more."""
        self.order = ExpertOrder()
        self._driver = driver
        self._layers = layers
        self._tables: dict[int, torch.Tensor] = {}

    def table(self, layer: Layer) -> torch.Tensor:
        """int64 ``[E]``: the row of each expert; the same tensor at every call."""
        found = self._tables.get(layer.number)
        if found is None:
            if self._driver.capturing():
                raise StateError(
                    f"layer {layer.number}: a table of its experts is first asked for outside of a capture"
                )
            with torch.inference_mode(False):
                found = torch.tensor(self.order.rows_of(layer), dtype=torch.int64, device=self._driver.device)
            self._tables[layer.number] = found
        return found

    def rows(self, layer: Layer, chosen: torch.Tensor) -> torch.Tensor:
        """Of the shape and dtype of ``chosen``: the row of each expert, -1 where it names none."""
        table = self.table(layer)
        valid = (chosen >= 0) & (chosen < len(table))
        return table[chosen.where(valid, 0).long()].to(chosen.dtype).where(valid, -1)

    def change(self, order: ExpertOrder) -> None:
        """From now on experts are there. The device is idle, and has it when this returns."""
        self.order = order
        with self._driver.current():
            for layer in self._layers:
                if layer.number in self._tables:
                    self._tables[layer.number].copy_(torch.tensor(order.rows_of(layer)))
            self._driver.synchronize()

    def require_told(self) -> None:
        """Raise `StateError` if experts may have moved, and there is a layer whose table nobody has."""
        if self.order.version:
            self.require_asked()

    def require_asked(self) -> None:
        """Raise `StateError` if there is a layer whose table nobody has: whoever computes takes rows for experts."""
        for layer in self._layers:
            if layer.number not in self._tables:
                raise StateError(
                    f"nobody has asked for logical_to_physical({layer.number}): who does not map a router's choice "
                    "by it would use the wrong experts once some have moved"
                )

"""What the driver is given for each layer's fetch, prepared once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.layout.copies import LayerPlan, Segment
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import nearest_first
from vmm_dwdp.layout.turns import cut_runs, run_bytes
from vmm_dwdp.memory.assembly import Assembly
from vmm_dwdp.schedule.layer import Fetch, OwnerCopies


class Fetches:
    """Of all layers, in the order of a pass."""

    def __init__(self, driver: Driver, assembly: Assembly, layers: Sequence[Layer]) -> None:
        self._driver = driver
        self._assembly = assembly
        self._layers = layers

    def planned(self, plans: Sequence[LayerPlan]) -> list[Fetch]:
        """As ``plans``, one for each layer, say."""
        return [
            Fetch(layer.number, tuple(self._prepared(layer, run) for run in plan.streams), plan.fetched_bytes)
            for layer, plan in zip(self._layers, plans, strict=True)
        ]

    def chosen(self, group_size: int) -> list[Fetch]:
        """In runs, but for what is in host memory, which is no rank's link."""
        return [self._in_runs(layer, group_size) for layer in self._layers]

    def _in_runs(self, layer: Layer, group_size: int) -> Fetch:
        cut = cut_runs(layer.plan, group_size, run_bytes(layer.plan))
        chosen = []
        owners = {owner for owner, runs in enumerate(cut.by_owner) if runs}
        for owner in nearest_first(owners, self._assembly.rank, group_size):
            runs = [run.pieces for run in cut.by_owner[owner]]  # type: ignore[index]  # a rank, since it has runs
            whole = self._prepared(layer, [piece for pieces in runs for piece in pieces])
            chosen.append(OwnerCopies(owner, whole, tuple(self._prepared(layer, pieces) for pieces in runs)))  # type: ignore[arg-type]
        host = (self._prepared(layer, cut.host),) if cut.host else ()
        return Fetch(layer.number, host, layer.plan.fetched_bytes, tuple(chosen))

    def _prepared(self, layer: Layer, pieces: Sequence[Segment]) -> Any:
        return self._driver.prepare(self._assembly.copies(layer, pieces))

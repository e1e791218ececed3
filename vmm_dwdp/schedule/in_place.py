"""Reading experts where they are: there is nothing to wait for, nor to fetch. What is counted, and who goes by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import StateError
from vmm_dwdp.memory.assembly import Assembly
from vmm_dwdp.schedule.layer import ScheduledLayer
from vmm_dwdp.schedule.routing_counts import RoutingCounts


class InPlace:
    """What `acquire` and `release` of a layer that is read in place do. Calls come from one thread at a time.

    Args:
        assembly: which is built.
        config: says who goes by what is counted: the resident cache, or whoever moves experts.
    """

    def __init__(
        self, driver: Driver, assembly: Assembly, layers: Sequence[ScheduledLayer], config: DWDPConfig
    ) -> None:
        self._driver = driver
        self._layers = layers
        self._cache = assembly.cache
        self._tables = assembly.tables
        self._routing: RoutingCounts | None = None
        if self._cache is not None or config.movable_experts:
            num_experts = {each.layer.number: each.layer.placement.num_experts for each in layers}
            self._routing = RoutingCounts(num_experts, driver.device)

    def acquire(self, layer: ScheduledLayer, chosen: torch.Tensor | None, stream: StreamId) -> None:
        """The layer is read from now on; ``stream`` counts the ``chosen`` experts, which the current stream made."""
        if self._cache is not None:
            self._cache.require_whole()
        if self._routing is not None and chosen is not None:
            with self._after_current(stream, chosen):
                self._routing.add(layer.layer.number, chosen)
        layer.read_in_place = True
        layer.in_place += 1

    @contextmanager
    def _after_current(self, stream: StreamId, read: torch.Tensor) -> Iterator[None]:
        """``stream`` is the current one, after all that the one before was given. It reads ``read``."""
        if stream == self._driver.current_stream():
            yield
            return
        reader: torch.cuda.Stream = torch.cuda.ExternalStream(stream, self._driver.device)  # type: ignore[no-untyped-call]
        reader.wait_stream(torch.cuda.current_stream(self._driver.device))
        read.record_stream(reader)  # or its memory might be given to others too soon
        with torch.cuda.stream(reader):
            yield

    def reset(self) -> None:
        """Give up layers that are acquired."""
        for layer in self._layers:
            layer.read_in_place = False

    def require_idle(self) -> None:
        """Raise `StateError` if a layer is acquired."""
        for layer in self._layers:
            if layer.read_in_place:
                raise StateError(f"layer {layer.layer.number} was acquired, and was not released")

    def refresh_cache(self) -> None:
        """See `DWDPRuntime.refresh_cache`."""
        self.require_idle()
        self._require_no_capture("the cache is refreshed")
        if self._cache is not None and self._routing is not None:
            self._driver.synchronize()
            counts = self._routing.look("cache")
            self._routing.take("cache")
            by_row = self._tables.order.by_row
            layers = [each.layer for each in self._layers]
            self._cache.refresh({layer.number: by_row(layer, counts[layer.number]) for layer in layers})

    def routed(self) -> dict[int, list[int]]:
        """By layer, how many tokens were routed to each expert since `rebalanced`. Waits for the device."""
        assert self._routing is not None, "asked where experts can be moved"
        self._require_no_capture("experts are moved")
        self._driver.synchronize()
        return self._routing.look("rebalance")

    def _require_no_capture(self, what: str) -> None:
        if self._driver.capture(self._driver.current_stream()):
            raise StateError(f"{what} between replays of a graph, not in a capture")

    def rebalanced(self) -> None:
        """Experts are where they should be by all that was counted."""
        assert self._routing is not None, "asked where experts can be moved"
        self._routing.take("rebalance")

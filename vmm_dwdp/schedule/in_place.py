"""Reading experts where they are: there is nothing to wait for, nor to fetch; and the resident cache between passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.errors import StateError
from vmm_dwdp.memory.cache import ResidentCache
from vmm_dwdp.schedule.layer import ScheduledLayer
from vmm_dwdp.schedule.routing_counts import RoutingCounts


class InPlace:
    """What `acquire` and `release` of a layer that is read in place do. Calls come from one thread at a time."""

    def __init__(self, driver: Driver, cache: ResidentCache | None, layers: Sequence[ScheduledLayer]) -> None:
        self._driver = driver
        self._layers = layers
        self._cache = cache
        self._routing: RoutingCounts | None = None  # by which the cache goes
        if cache is not None:
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
        if self._driver.capture(self._driver.current_stream()):
            raise StateError("the cache is refreshed between replays of a graph, not in a capture")
        if self._cache is not None and self._routing is not None:
            self._driver.synchronize()
            self._cache.refresh(self._routing.take())

"""Passes that read experts where they are: which layers are being read, and the resident cache between passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Assembly
from vmm_dwdp.schedule.routing_counts import RoutingCounts


class InPlace:
    """What `acquire` and `release` of a layer that is read in place do. There is nothing to wait for, nor to fetch.

    Layers are numbered by their place in a pass. Calls come from one thread at a time.

    Attributes:
        counts: by layer, how often it was acquired.
    """

    def __init__(self, driver: Driver, assembly: Assembly, layers: Sequence[Layer]) -> None:
        self.counts = [0] * len(layers)
        self._driver = driver
        self._layers = layers
        self._cache = assembly.cache
        self._acquired: set[int] = set()
        self._routing: RoutingCounts | None = None  # by which the cache goes
        if self._cache is not None:
            num_experts = {layer.number: layer.placement.num_experts for layer in layers}
            self._routing = RoutingCounts(num_experts, driver.device)

    def acquire(self, index: int, chosen: torch.Tensor | None, stream: torch.cuda.Stream | None) -> None:
        """Layer ``index`` is read from now on; ``stream`` counts the ``chosen`` experts."""
        if self._cache is not None:
            self._cache.require_whole()
        if self._routing is not None and chosen is not None:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                self._routing.add(self._layers[index].number, chosen)
        self._acquired.add(index)
        self.counts[index] += 1

    def is_acquired(self, index: int) -> bool:
        """Whether layer ``index`` is being read."""
        return index in self._acquired

    def release(self, index: int) -> None:
        """Layer ``index``, which is acquired, is not read any more."""
        self._acquired.remove(index)

    def reset(self) -> None:
        """Give up layers that are acquired."""
        self._acquired.clear()

    def require_idle(self) -> None:
        """Raise `StateError` if a layer is acquired."""
        if self._acquired:
            held = self._layers[min(self._acquired)].number
            raise StateError(f"layer {held} was acquired, and was not released")

    def refresh_cache(self) -> None:
        """See `DWDPRuntime.refresh_cache`."""
        self.require_idle()
        if self._driver.capture(self._driver.current_stream()):
            raise StateError("the cache is refreshed between replays of a graph, not in a capture")
        if self._cache is not None and self._routing is not None:
            self._driver.synchronize()
            self._cache.refresh(self._routing.take())

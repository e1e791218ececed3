"""Reading experts where they are: there is nothing to wait for, nor to fetch. What is counted, and who goes by it; and
the bank within passes.

[Note: The order of passes over a bank]
What a pass has looked up it reads until `release`; the next pass may put other experts into the same rows. On one
stream they follow each other. A pass on another stream waits for the event that the pass before has recorded at its
releases. What a graph replays is seen by nobody: it is launched on the stream of the passes before, or one that waits
for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Event, Ledger, ResourceStack
from vmm_dwdp.config import DWDPConfig, Mode
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.memory.assembly import Assembly, Weights
from vmm_dwdp.schedule.layer import ScheduledLayer
from vmm_dwdp.schedule.routing_counts import RoutingCounts


class LookedUp(NamedTuple):
    """Where the experts that tokens chose are to be read, until the layer is released.

    Attributes:
        weights: by weight a tensor ``[R, ...]`` of so many rows: as `DWDPRuntime.acquire` gave it, or with a bank's
            rows before those.
        rows: of the shape and dtype of ``chosen``: the row of each expert, -1 where ``chosen`` names none.
    """

    weights: Weights
    rows: torch.Tensor


def require_choice(chosen: torch.Tensor, device: torch.device) -> None:
    """Raise `ConfigError` unless ``chosen`` can be looked up on ``device``."""
    if (
        chosen.dim() != 2
        or chosen.dtype not in (torch.int32, torch.int64)
        or chosen.device != device
        or not chosen.is_contiguous()
    ):
        raise ConfigError(
            f"chosen must be a contiguous int32 or int64 tensor [tokens, top_k] on {device}, not {chosen.dtype} "
            f"{list(chosen.shape)} with strides {chosen.stride()} on {chosen.device}"
        )


class InPlace:
    """What `acquire` and `release` of a layer that is read in place do. Calls come from one thread at a time.

    Args:
        assembly: which is built.
        config: says who goes by what is counted: the resident cache, or whoever moves experts.
    """

    def __init__(
        self,
        driver: Driver,
        ledger: Ledger,
        assembly: Assembly,
        layers: Sequence[ScheduledLayer],
        config: DWDPConfig,
    ) -> None:
        self._driver = driver
        self._layers = layers
        self._touching = assembly.touching
        self._cache = assembly.cache
        self._tables = assembly.tables
        self._movable = config.movable_experts
        self._bank = assembly.bank
        self._resources = ResourceStack()
        self._reader: StreamId | None = None  # on which the bank was read last, but for graphs
        self._read: Event | None = None  # recorded there; see [Note: The order of passes over a bank]
        if self._bank is not None:
            self._read = self._resources.push(Event(driver, ledger, "the bank was read"))
            self._bank.warm_up()
        self._routing: RoutingCounts | None = None
        if self._cache is not None or self._movable:
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
        layer.looked_up = False
        layer.in_place += 1

    def look_up(self, layer: ScheduledLayer, mode: Mode, chosen: torch.Tensor, stream: StreamId) -> LookedUp:
        """Where ``stream`` is to read the ``chosen`` experts of a layer that is acquired in ``mode``."""
        number = layer.layer.number
        if self._movable:
            with self._after_current(stream, chosen):
                return LookedUp(layer.weights[mode], self._tables.rows(layer.layer, chosen))
        if self._bank is None or mode == "staged":
            return LookedUp(layer.weights[mode], chosen)
        if layer.looked_up:
            raise StateError(
                f"layer {number} was looked up since it was acquired: the rows that were told then could be others' now"
            )
        eager = not self._driver.capturing()
        if eager and self._reader not in (None, stream):
            assert self._read is not None
            self._driver.wait(stream, self._read.event)
        layer.looked_up = True
        if eager:
            self._reader = stream
        with self._after_current(stream, chosen):
            found = self._bank.look_up(number, chosen)
        return LookedUp(layer.weights["in_place"], chosen) if found is None else LookedUp(*found)

    def release(self, layer: ScheduledLayer, stream: StreamId) -> None:
        """``stream`` has been given all that reads the layer."""
        layer.read_in_place = False
        if layer.looked_up:
            layer.looked_up = False
            self._end_reading(stream)

    def _end_reading(self, stream: StreamId) -> None:
        if not self._driver.capturing():
            assert self._read is not None
            self._driver.record(self._read.event, stream)
            self._reader = stream

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
        if self._reader is not None and any(layer.looked_up for layer in self._layers):
            self._end_reading(self._reader)
        for layer in self._layers:
            layer.read_in_place = layer.looked_up = False

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
            with self._touching():
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

    def close(self) -> None:
        """Free the event. The device is idle."""
        self._resources.close()

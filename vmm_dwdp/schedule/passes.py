"""Passes through the layers, in each mode that the config provides for: what `publish` and `rejoin` start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Failures, Ledger, undo_after
from vmm_dwdp.config import DWDPConfig, Mode, ModeSetting
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Assembly, Weights
from vmm_dwdp.observe.stats import LayerStats, Stats
from vmm_dwdp.observe.trace import Span
from vmm_dwdp.observe.tracer import Tracer
from vmm_dwdp.schedule.in_place import InPlace
from vmm_dwdp.schedule.mode_choice import ModeChooser
from vmm_dwdp.schedule.staging import Staging


class Passes:
    """The weights of every layer, from its `acquire` to its `release`.

    Layers are numbered by their place in a pass. Calls come from one thread at a time. ``stream=None`` is the current
    one.
    """

    def __init__(
        self, driver: Driver, ledger: Ledger, assembly: Assembly, layers: Sequence[Layer], config: DWDPConfig
    ) -> None:
        """Takes nothing. ``assembly`` stays the caller's; ``layers`` may become more until `start`."""
        self._driver = driver
        self._ledger = ledger
        self._assembly = assembly
        self._layers = layers
        self._config = config
        self._weights: dict[Mode, list[Weights]] = {}  # of all layers, in the modes that the config provides for
        self._staging: Staging | None = None
        self._only_staged: Staging | None = None  # where no other mode can be had
        self._in_place: InPlace | None = None
        self._chooser: ModeChooser | None = None  # where either mode can be had

    def start(self) -> None:
        """Make the weights of the built assembly, and fetch the first layers. If it raises, `close` undoes that."""
        if self._config.prefetch_depth:
            self._weights["staged"] = [self._assembly.weights(layer, "staged") for layer in self._layers]
            self._staging = Staging(self._driver, self._ledger, self._assembly, self._layers, self._config)
        if self._config.reads_in_place:
            self._weights["in_place"] = [self._assembly.weights(layer, "in_place") for layer in self._layers]
            self._in_place = InPlace(self._driver, self._assembly, self._layers)
        if len(self._weights) > 1:
            most = max(layer.placement.num_experts for layer in self._layers)
            remote = sum(layer.plan.fetched_bytes for layer in self._layers)
            cached = min(1.0, self._config.resident_cache / max(remote, 1))
            self._chooser = ModeChooser(self._driver, self._ledger, most, len(self._layers), cached)
        elif self._staging is not None:
            self._only_staged = self._staging

    def acquire(
        self,
        index: int,
        mode: ModeSetting | None,
        tokens: int | None,
        top_k: int | None,
        chosen: torch.Tensor | None,
        stream: torch.cuda.Stream | None,
    ) -> Weights:
        """See `DWDPRuntime.acquire`."""
        if mode is None and self._only_staged is not None:  # see [Note: The path of the launching thread]
            at = self._driver.current_stream() if stream is None else self._stream(stream)
            self._only_staged.acquire(index, at, tokens)
            return self._weights["staged"][index]
        at = self._stream(stream)
        mode = mode or self._config.mode
        if self._chooser is None if mode == "auto" else mode not in self._weights:
            raise ConfigError(f"the config does not provide for mode {mode}, only for {', '.join(self._weights)}")
        if self._mode_of(index) is not None:
            raise StateError(f"layer {self._layers[index].number} is acquired already, and was not released")
        if self._chooser is not None:
            mode = self._chooser.choose(index, mode, tokens, top_k, at)
        assert mode != "auto"
        if mode == "in_place":
            assert self._in_place is not None
            self._in_place.acquire(index, chosen, stream)
        elif self._staging is not None:
            self._staging.acquire(index, at, tokens)
        if self._chooser is not None:
            self._chooser.acquired(index, mode)
        return self._weights[mode][index]

    def release(self, index: int, stream: torch.cuda.Stream | None) -> None:
        """See `DWDPRuntime.release`."""
        at = self._driver.current_stream() if stream is None else self._stream(stream)
        if self._only_staged is not None:
            self._only_staged.release(index, at)
            return
        if self._in_place is not None and self._in_place.is_acquired(index):
            self._in_place.release(index)
        elif self._staging is not None:
            self._staging.release(index, at)
        else:
            raise StateError(f"layer {self._layers[index].number} is released, but was not acquired")
        if self._chooser is not None:
            self._chooser.release(index, at)

    def tensor_list(self, index: int, weight: str) -> list[torch.Tensor]:
        """See `DWDPRuntime.tensor_list`."""
        mode = self._mode_of(index)
        if mode is None:
            raise StateError(f"layer {self._layers[index].number} is not acquired: its tensors may be another layer's")
        return self._assembly.tensor_list(self._layers[index], weight, mode)

    def _mode_of(self, index: int) -> Mode | None:
        """How layer ``index`` is acquired; ``None`` if it is not."""
        if self._in_place is not None and self._in_place.is_acquired(index):
            return "in_place"
        return "staged" if self._staging is not None and self._staging.is_acquired(index) else None

    def reset(self, stream: torch.cuda.Stream | None) -> None:
        """Give up a pass that ended early."""
        at = self._stream(stream)
        if self._in_place is not None:
            self._in_place.reset()
        if self._staging is not None:
            self._staging.reset(at)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Nothing is read or copied while the body runs, and slots and cache hold nothing; afterwards they are filled
        anew, whether it succeeds or not.

        Raises `StateError` if a layer is acquired.
        """
        if self._in_place is not None:
            self._in_place.require_idle()
        if self._staging is not None:
            self._staging.drain()
        self._driver.synchronize()
        if self._staging is not None:
            self._staging.forget()
        if self._assembly.cache is not None:
            self._assembly.cache.forget()
        try:
            yield
        except BaseException as error:
            undo_after(error, self._refill)
            raise
        self._refill()

    def _refill(self) -> None:
        if self._staging is not None:
            self._staging.reset(self._driver.current_stream())
        if self._assembly.cache is not None:
            self._assembly.cache.refill()

    def refresh_cache(self) -> None:
        """See `DWDPRuntime.refresh_cache`."""
        if not self._config.resident_cache:
            raise ConfigError("there is no cache to refresh: the config has no resident_cache")
        assert self._in_place is not None, "a resident cache needs a mode that reads in place"
        self._in_place.refresh_cache()

    def check_integrity(self, *, verify: bool) -> None:
        """Raise `StateError` unless slots, layers and readers agree; with ``verify``, unless edges, slots and cache
        have their owners' bytes, too."""
        if self._staging is not None:
            self._staging.check_integrity()
        if verify:
            for layer in self._layers:
                self._assembly.require_copied(layer, layer.plan.edges)
            for index in [] if self._staging is None else self._staging.held():
                for segments in self._layers[index].plan.streams:
                    self._assembly.require_copied(self._layers[index], segments)
            if self._assembly.cache is not None:
                self._assembly.cache.verify()

    def stats(self, *, read: bool) -> Stats:
        """See `DWDPRuntime.stats`. ``read``: what the device has timed since, as the thread that runs passes may."""
        staging = self._staging
        staged = [LayerStats() for _ in self._layers] if staging is None else staging.layer_stats(read=read)
        in_place = [0] * len(self._layers) if self._in_place is None else self._in_place.counts
        return Stats(
            resident_bytes=self._assembly.resident_nbytes,
            staged_bytes=self._assembly.staged_nbytes,
            layers={
                described.number: replace(layer, in_place=count)
                for described, layer, count in zip(self._layers, staged, in_place, strict=True)
            },
            copy_path=None if staging is None else staging.copy_path,
            advice=None if staging is None else staging.guard.advice,
            mode_choice=None if self._chooser is None else self._chooser.choice(),
            cache=None if self._assembly.cache is None else self._assembly.cache.stats(),
        )

    def start_trace(self) -> Tracer:
        """Mark what happens from now on. Raises `StateError` if nothing is staged, or that is done already."""
        if self._staging is None:
            raise StateError("there is nothing to trace: with prefetch_depth 0 nothing is copied")
        return self._staging.start_trace(self._driver.current_stream())

    def finish_trace(self) -> list[Span]:
        """What happened since `start_trace`; waits for the device."""
        assert self._staging is not None, "only what is staged is traced"
        return self._staging.finish_trace()

    def stop(self) -> None:
        """Copy nothing more; what was issued may still run. Needs no device."""
        self._weights = {}
        if self._staging is not None:
            self._staging.stop()

    def close(self) -> None:
        """Free streams and events, after `stop`; the device is idle. Another call tries again."""
        failures = Failures()
        for part in self._staging, self._chooser:
            if part is not None:
                with failures.noted():
                    part.close()
        failures.raise_first()

    def _stream(self, stream: torch.cuda.Stream | None) -> int:
        """Raises `StateError` if ``stream`` is another device's, or captured and the current one, by which captures are
        told, is not."""
        if stream is None:
            return self._driver.current_stream()
        if stream.device != self._driver.device:
            raise StateError(f"the stream is of {stream.device}, but the weights are on {self._driver.device}")
        if self._driver.capture(stream.cuda_stream) and not self._driver.capturing():
            raise StateError(f"stream {stream.cuda_stream:#x} is captured into a graph: make it the current stream")
        return stream.cuda_stream

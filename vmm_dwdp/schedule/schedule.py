"""Passes through the layers, in each mode that the config provides for: what `publish` and `rejoin` start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.allocator.handles import Failures, Ledger, ResourceStack, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import DWDPConfig, Mode, ModeSetting
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.layout.copies import plan_layer
from vmm_dwdp.layout.layer import ByNumber, Layer
from vmm_dwdp.memory.assembly import Assembly, Weights
from vmm_dwdp.memory.lines import SharedLines
from vmm_dwdp.observe.guard import Guard
from vmm_dwdp.observe.spans import Spans
from vmm_dwdp.observe.stats import CopyPath, LayerStats, Stats
from vmm_dwdp.observe.trace import Span, spans_of
from vmm_dwdp.observe.tracer import Tracer
from vmm_dwdp.schedule.capture import CapturedPasses
from vmm_dwdp.schedule.fetches import Fetches
from vmm_dwdp.schedule.given_stream import StreamLike, given_stream
from vmm_dwdp.schedule.in_place import InPlace, LookedUp, require_choice
from vmm_dwdp.schedule.issue import copy_path, open_issuer
from vmm_dwdp.schedule.layer import NoWeights, ScheduledLayer, StagedLayer
from vmm_dwdp.schedule.mode_choice import ModeChooser
from vmm_dwdp.schedule.staging import Staging
from vmm_dwdp.schedule.stated import Stated


class Schedule:
    """The weights of every layer, from its `acquire` to its `release`.

    Layers are named by the model's own numbers. Calls come from one thread at a time. No stream: the current one.

    Attributes:
        stated: what is stated of the pass that runs.
        in_place: what reads layers where they are, and counts routing, once that is started and the config wants it.
    """

    stated: Stated | None = None
    in_place: InPlace | None = None

    def __init__(
        self, driver: Driver, ledger: Ledger, assembly: Assembly, layers: Sequence[Layer], config: DWDPConfig
    ) -> None:
        """Takes nothing. ``assembly`` stays the caller's; ``layers`` may become more until `start`."""
        self._driver = driver
        self._ledger = ledger
        self._assembly = assembly
        self._stated = layers
        self._config = config
        self._guard = Guard()
        self._advises = config.mode != "auto"  # which tries staged passes even where they do not pay
        self._layers: ByNumber[ScheduledLayer] = ByNumber()  # in the order of a pass
        self._staging: Staging | None = None
        self._captured: CapturedPasses | None = None
        self._copy_path: CopyPath | None = None
        self._traces = ResourceStack()  # the one that is being recorded, or one whose end was interrupted
        self._modes: list[Mode] = []  # that can be had
        self._only_staged = False
        self._stopped = False
        self._spans: Spans | None = None  # of the pass that runs, if a profiler does
        self._chooser: ModeChooser | None = None  # where either mode can be had

    @property
    def is_started(self) -> bool:
        return bool(self._layers)

    def start(self, lines: SharedLines | None) -> None:
        """Make the weights of the built assembly, and fetch the first layers. If it raises, `close` undoes that.

        ``lines``: what the ranks of this machine say of whom they pull from, if they do; they stay the caller's.
        """
        self._layers.update({layer.number: ScheduledLayer(layer, place) for place, layer in enumerate(self._stated)})
        modes = self._modes = []
        if self._config.prefetch_depth:
            modes.append("staged")
            self._stage(lines)
        if self._config.reads_in_place:
            modes.append("in_place")
            layers = list(self._layers.values())
            self.in_place = InPlace(self._driver, self._ledger, self._assembly, layers, self._config)
        self._only_staged = modes == ["staged"]
        for each in self._layers.values():
            each.weights = {mode: self._assembly.weights(each.layer, mode) for mode in modes}
            if each.staged is not None:
                each.staged.weights = each.weights["staged"]
        if len(modes) > 1:
            most = max(layer.placement.num_experts for layer in self._stated)
            remote = sum(layer.plan.fetched_bytes for layer in self._stated)
            cached = min(1.0, self._config.kept_on_device / max(remote, 1))
            self._chooser = ModeChooser(self._driver, self._ledger, most, len(self._layers), cached)

    @property
    def hittable(self) -> dict[int, StagedLayer]:
        """By number, the layers of which `acquire` needs to know nothing more: all, where none is read in place."""
        if not self._only_staged:
            return {}
        return {number: layer.staged for number, layer in self._layers.items() if layer.staged is not None}

    def _stage(self, lines: SharedLines | None) -> None:
        plans = [layer.plan for layer in self._stated]
        given = Fetches(self._driver, self._assembly, self._stated)
        # A graph launches each copy as a node, which takes longer than a batch: so it has no slices.
        captured = given.planned([plan_layer(layer.layouts, self._assembly.rank, None) for layer in self._stated])
        eager = [] if lines is None else given.chosen(self._config.group_size)
        if all(len(fetch.chosen) < 2 for fetch in eager):  # nothing to choose
            lines, eager = None, given.planned(plans)
        most = max(plans, key=lambda plan: plan.num_copies)
        issuer = open_issuer(self._driver, self._ledger, most.num_copies, lines)
        self._copy_path = copy_path(most, self._config.slice_bytes, issuer, chooses=lines is not None)
        self._staging = Staging(self._driver, self._ledger, issuer, eager, self._config.prefetch_depth)
        for each, staged in zip(self._layers.values(), self._staging.layers, strict=True):
            each.staged = staged
        self._captured = CapturedPasses(self._driver, self._ledger, self._staging, captured)

    # -- a pass ------------------------------------------------------------------------------------------------------
    def acquire(
        self,
        number: int,
        mode: ModeSetting | None,
        tokens: int | None,
        top_k: int | None,
        chosen: torch.Tensor | None,
        stream: StreamLike | None,
    ) -> Weights:
        """See `DWDPRuntime.acquire`."""
        layer = self._layers[number]
        at = self._driver.current_stream() if stream is None else given_stream(stream, self._driver)
        if self.stated is not None:
            mode, tokens, top_k = self.stated.unless(mode, tokens, top_k)
        if layer.place == 0:
            self._look_for_a_profiler()
        if self._spans is not None:
            self._spans.begin(number)
        if mode is None and self._only_staged and not self._driver.capturing():
            layer.staged.acquire(at)  # type: ignore[union-attr]  # see [Note: The hit path]
            if layer.place == 0:
                self._observe(tokens)
            return layer.weights["staged"]
        mode = mode or self._config.mode
        self.require_mode(mode)
        if self._mode_of(layer) is not None:
            raise StateError(f"layer {number} is acquired already, and was not released")
        if self._chooser is not None:
            mode = self._chooser.choose(layer.place, mode, tokens, top_k, at)
        assert mode != "auto"
        if mode == "in_place":
            assert self.in_place is not None
            self.in_place.acquire(layer, chosen, at)
        else:
            self._acquire_staged(layer, at, tokens)
        if self._chooser is not None:
            self._chooser.acquired(layer.place, mode)
        return layer.weights[mode]

    def look_up(self, number: int, chosen: torch.Tensor, stream: StreamLike | None) -> LookedUp:
        """See `DWDPRuntime.look_up`."""
        layer = self._layers[number]
        if (mode := self._mode_of(layer)) is None:
            raise StateError(f"layer {number} is not acquired: there is nothing to look up")
        require_choice(chosen, self._driver.device)
        if self.in_place is None:
            return LookedUp(layer.weights[mode], chosen)
        return self.in_place.look_up(layer, mode, chosen, given_stream(stream, self._driver))

    def require_mode(self, mode: ModeSetting) -> None:
        """Raise `ConfigError` unless the config provides for it."""
        if self._chooser is None if mode == "auto" else mode not in self._modes:
            raise ConfigError(f"the config does not provide for mode {mode}, only for {', '.join(self._modes)}")

    def release(self, number: int, stream: StreamLike | None) -> None:
        """See `DWDPRuntime.release`."""
        layer = self._layers[number]
        at = self._driver.current_stream() if stream is None else given_stream(stream, self._driver)
        staged = layer.staged
        if layer.read_in_place:
            assert self.in_place is not None
            self.in_place.release(layer, at)
        elif staged is None:
            raise StateError(f"layer {number} is released, but was not acquired")
        elif not self._driver.capturing():
            staged.release(at)
        else:
            assert self._captured is not None
            self._captured.release(self._capture(at), staged, at)
        if self._chooser is not None:
            self._chooser.release(layer.place, at)
        if self._spans is not None:
            self._spans.end(number)

    def _acquire_staged(self, layer: ScheduledLayer, stream: StreamId, tokens: int | None) -> None:
        staged = layer.staged
        assert staged is not None, "the mode is one that the config provides for"
        if not self._driver.capturing():
            staged.acquire(stream)
            if staged.place == 0:
                self._observe(tokens)
        else:
            assert self._captured is not None
            self._captured.acquire(self._capture(stream), staged, stream)

    def _observe(self, tokens: int | None) -> None:
        """A staged pass of ``tokens`` begins."""
        latest = self._staging.begins(tokens)  # type: ignore[union-attr]
        if self._advises:
            self._guard.observe(latest, tokens)

    def _look_for_a_profiler(self) -> None:
        """A pass begins: see [Note: Spans]."""
        if (wanted := Spans.are_wanted()) != (self._spans is not None):
            self._spans = Spans() if wanted else None
            if self._staging is not None:
                self._staging.pipeline.watched = wanted

    def _capture(self, stream: StreamId) -> int:
        """The capture of the current stream. Raises `StateError` unless ``stream`` takes part in it, or it would run
        now what belongs to a replay."""
        capture = self._driver.capture(stream)
        if not capture:
            raise StateError(f"stream {stream:#x} takes no part in the capture of the current stream into a graph")
        return capture

    def _mode_of(self, layer: ScheduledLayer) -> Mode | None:
        """How a layer is acquired, on a stream that runs or in the capture of the current one; ``None``: not at all."""
        if layer.read_in_place:
            return "in_place"
        return "staged" if layer.staged is not None and self._is_staged(layer, self._driver.capturing()) else None

    def _is_staged(self, layer: ScheduledLayer, capturing: bool) -> bool:
        """Whether a layer is acquired staged: in the capture of the current stream, or where there is none."""
        if (staged := layer.staged) is None:
            return False
        if capturing:
            assert self._captured is not None
            return self._captured.is_acquired(staged)
        return staged.slot.reader is staged

    @property
    def held(self) -> int | None:
        """The number of a layer that is acquired, on a stream that runs or in the capture of the current one."""
        capturing = self._driver.capturing()
        held = (each for each in self._layers.values() if each.read_in_place or self._is_staged(each, capturing))
        return next((each.layer.number for each in held), None)

    def tensor_list(self, number: int, weight: str) -> list[torch.Tensor]:
        """See `DWDPRuntime.tensor_list`."""
        layer = self._layers[number]
        if (mode := self._mode_of(layer)) is None:
            raise StateError(f"layer {number} is not acquired: its tensors may be another layer's")
        return self._assembly.tensor_list(layer.layer, weight, mode)

    def reset(self, stream: StreamLike | None) -> None:
        """Give up a pass that ended early."""
        if self._spans is not None:
            self._spans.end_all()
        if self.in_place is not None:
            self.in_place.reset()
        if self._staging is not None:
            at = given_stream(stream, self._driver)
            if self._driver.capturing():
                raise StateError(
                    "a capture into a graph leaves the slots as they are: end it, there is nothing to reset"
                )
            self._staging.reset(at)

    # -- between passes ----------------------------------------------------------------------------------------------
    @contextmanager
    def suspended(self, refills: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Nothing is read or copied while the body runs, and slots, cache and bank hold nothing; afterwards the first
        two are filled anew, whether it succeeds or not, if it ``refills``. In the body the caller's device is current.

        Raises `StateError` if a layer is acquired, or a stream is being captured.
        """
        with self._assembly.touching():
            self._forget()
        try:
            yield
        except BaseException as error:
            if refills():
                undo_after(error, self._refill)
            raise
        if refills():
            self._refill()

    def _forget(self) -> None:
        if self._driver.capture(self._driver.current_stream()):
            raise StateError("what is in memory is changed between replays of a graph, not in a capture")
        if self.in_place is not None:
            self.in_place.require_idle()
        if self._staging is not None:
            self._staging.drain()
        self._driver.synchronize()
        if self._staging is not None:
            self._staging.forget()
        self._assembly.forget_kept()

    def _refill(self) -> None:
        if self._stopped:
            return
        with self._assembly.touching():
            if self._staging is not None:
                self._staging.reset(self._driver.current_stream())
            self._assembly.refill_kept()

    def refresh_cache(self) -> None:
        """See `DWDPRuntime.refresh_cache`."""
        if not self._config.resident_cache or self.in_place is None:
            raise ConfigError("there is no cache to refresh: the config has no resident_cache")
        self.in_place.refresh_cache()

    def check_integrity(self, *, verify: bool) -> None:
        """Raise `StateError` unless slots, layers and readers agree; with ``verify``, unless edges, slots and cache
        have their owners' bytes, too."""
        if self._staging is not None:
            self._staging.check_integrity()
        if verify:
            for layer in self._stated:
                self._assembly.require_copied(layer, layer.plan.edges)
            for held in [] if self._staging is None else self._staging.held():
                layer = self._layers[held.number].layer
                for segments in layer.plan.streams:
                    self._assembly.require_copied(layer, segments)
            self._assembly.require_kept()

    # -- what it tells -----------------------------------------------------------------------------------------------
    def stats(self, *, read: bool) -> Stats:
        """See `DWDPRuntime.stats`. ``read``: what the device has timed since, as the thread that runs passes may."""
        if read and self._staging is not None and not self._driver.capturing():  # which a look at an event would break
            self._staging.pipeline.timer.read()
        return Stats(
            resident_bytes=self._assembly.resident_nbytes,
            staged_bytes=self._assembly.staged_nbytes,
            layers={number: self._layer_stats(layer) for number, layer in self._layers.items()},
            copy_path=self._copy_path,
            advice=self._guard.advice,
            mode_choice=None if self._chooser is None else self._chooser.choice(),
            cache=None if self._assembly.cache is None else self._assembly.cache.stats(),
            bank=None if self._assembly.bank is None else self._assembly.bank.stats(),
        )

    def _layer_stats(self, layer: ScheduledLayer) -> LayerStats:
        """What a replay of a graph does is not seen."""
        if layer.staged is None or self._staging is None:
            return LayerStats(in_place=layer.in_place)
        staged, timer = layer.staged, self._staging.pipeline.timer
        waited_s = timer.waited_s[layer.place]
        return LayerStats(staged.hits, staged.misses, staged.fetched_bytes, waited_s, layer.in_place)

    def start_trace(self) -> Tracer:
        """Mark what happens from now on. Raises `StateError` if nothing is staged, or that is done already."""
        if self._staging is None:
            raise StateError("there is nothing to trace: with prefetch_depth 0 nothing is copied")
        pipeline = self._staging.pipeline
        if pipeline.tracer is not None and pipeline.tracer.recording:
            raise StateError("a trace is being recorded already")
        pipeline.tracer = None
        self._traces.close()  # of one whose end was interrupted
        with uninterrupted():
            tracer = Tracer(self._driver, self._ledger, self._driver.current_stream())
            pipeline.tracer = self._traces.push(tracer)
        return tracer

    def finish_trace(self) -> list[Span]:
        """What happened since `start_trace`; waits for the device."""
        assert self._staging is not None, "only what is staged is traced"
        tracer = self._staging.pipeline.tracer
        assert tracer is not None, "a trace is finished once"
        self._staging.pipeline.tracer = None
        try:
            marks = tracer.finish()
        finally:
            self._traces.close()
        return spans_of(marks, self._stated, len(self._staging.slots))

    # -- the end -----------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Copy nothing more; what was issued may still run. Needs no device."""
        self._stopped = True
        for layer in self._layers.values():
            layer.weights = NoWeights()
            if layer.staged is not None:
                layer.staged.weights = None
        if self._staging is not None:
            self._staging.pipeline.latest = len(self._layers)  # nor is a layer hit by who waits for its copies now
            self._staging.stop()

    def close(self) -> None:
        """Free streams and events, after `stop`; the device is idle. Another call tries again."""
        failures = Failures()
        for part in self._staging, self._captured, self._traces, self._chooser, self.in_place:
            if part is not None:
                with failures.noted():
                    part.close()
        failures.raise_first()

"""Staged passes: every layer's copies, made ready once; who gives them to the driver; whether a graph takes them."""

from __future__ import annotations

from collections.abc import Sequence

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Failures, Ledger, ResourceStack, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import StateError
from vmm_dwdp.layout.copies import LayerPlan, plan_layer
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Assembly
from vmm_dwdp.observe.guard import Guard
from vmm_dwdp.observe.stats import CopyPath, LayerStats
from vmm_dwdp.observe.trace import Span, spans_of
from vmm_dwdp.observe.tracer import Tracer
from vmm_dwdp.schedule.capture import CapturedPasses
from vmm_dwdp.schedule.issue import Issuer, open_issuer
from vmm_dwdp.schedule.prefetch import Fetch, Prefetcher


class Staging:
    """What `acquire` and `release` of a staged layer do, on a stream that runs and on one that is being captured.

    Layers are numbered by their place in a pass. Calls come from one thread at a time.

    Attributes:
        copy_path: how copies get to the driver, and why so.
        guard: says if passes are held up by their copies.
    """

    def __init__(
        self, driver: Driver, ledger: Ledger, assembly: Assembly, layers: Sequence[Layer], config: DWDPConfig
    ) -> None:
        """Starts fetching the first ``prefetch_depth`` layers."""
        self.guard = Guard()
        self._advises = config.mode != "auto"  # which tries staged passes even where they do not pay
        self._driver = driver
        self._ledger = ledger
        self._layers = layers
        plans = [layer.plan for layer in layers]
        # A graph launches each copy as a node, which takes longer than a batch: so it has no slices.
        whole = [plan_layer(layer.layouts, assembly.rank, None) for layer in layers]

        def fetches(plans: Sequence[LayerPlan]) -> list[Fetch]:
            return [
                Fetch(
                    layer.number,
                    tuple(driver.prepare(assembly.copies(layer, run)) for run in plan.streams),
                    plan.fetched_bytes,
                )
                for layer, plan in zip(layers, plans, strict=True)
            ]

        eager, captured = fetches(plans), fetches(whole)
        most = max(plans, key=lambda plan: plan.num_copies)
        issuer = open_issuer(driver, ledger, most.num_copies)
        self.copy_path = _describe(most, config, issuer)
        self._prefetcher = Prefetcher(driver, ledger, issuer, eager, config.prefetch_depth)
        self._traces = ResourceStack()  # the one that is being recorded, or one whose end was interrupted
        try:
            self._captured = CapturedPasses(driver, ledger, self._prefetcher, captured)
        except BaseException as error:
            undo_after(error, self._prefetcher.abandon)
            raise

    def acquire(self, index: int, stream: int, tokens: int | None) -> None:
        """Make ``stream`` wait until layer ``index`` is in its slot; ``tokens``: of this pass, if they are known."""
        if self._driver.capturing():
            self._captured.acquire(self._capture(stream), index, stream)
        else:
            self._prefetcher.acquire(index, stream)
            if index == 0 and self._advises:
                self.guard.observe(self._prefetcher.timer.latest, tokens)

    def release(self, index: int, stream: int) -> None:
        """Layer ``index`` has been read by the work given to ``stream``."""
        if self._driver.capturing():
            self._captured.release(self._capture(stream), index, stream)
        else:
            self._prefetcher.release(index, stream)

    def _capture(self, stream: int) -> int:
        """The capture of the current stream. Raises `StateError` unless ``stream`` takes part in it, or it would run
        now what belongs to a replay."""
        capture = self._driver.capture(stream)
        if not capture:
            raise StateError(f"stream {stream:#x} takes no part in the capture of the current stream into a graph")
        return capture

    def reset(self, stream: int) -> None:
        """Give up layers that were acquired on ``stream``, and make the slots as they are between passes."""
        if self._driver.capturing():
            raise StateError("a capture into a graph leaves the slots as they are: end it, there is nothing to reset")
        self._prefetcher.reset(stream)

    def drain(self) -> None:
        """Wait until every copy that was asked for is done. Raises `StateError` if a layer is acquired."""
        self._prefetcher.drain()

    def forget(self) -> None:
        """After `drain`: what the slots hold will not be true any more; `reset` fetches it again."""
        self._prefetcher.forget()

    def is_acquired(self, index: int) -> bool:
        """Whether layer ``index`` is being read, on a stream that runs or in the capture of the current one."""
        part = self._captured if self._driver.capturing() else self._prefetcher
        return part.is_acquired(index)

    def held(self) -> list[int]:
        """The layers that slots hold; waits until every copy that was asked for is done."""
        return self._prefetcher.held()

    def check_integrity(self) -> None:
        """Raise `StateError` unless slots, layers and readers agree."""
        self._prefetcher.check_integrity()

    def layer_stats(self, *, read: bool) -> list[LayerStats]:
        """In the order of a pass. What a replay of a graph does is not seen. ``read``: see `Passes.stats`."""
        prefetcher = self._prefetcher
        if read and not self._driver.capturing():  # which a look at an event would break
            prefetcher.timer.read()
        return [
            LayerStats(counts.hits, counts.misses, counts.fetched_bytes, waited_s)
            for counts, waited_s in zip(prefetcher.counts, prefetcher.timer.waited_s, strict=True)
        ]

    def start_trace(self, stream: int) -> Tracer:
        """Mark what happens from now on; time begins when ``stream`` comes to this point.

        Raises `StateError` if that is done already.
        """
        before = self._prefetcher.tracer
        if before is not None and before.recording:
            raise StateError("a trace is being recorded already")
        self._prefetcher.tracer = None
        self._traces.close()  # of one whose end was interrupted
        with uninterrupted():
            tracer = self._prefetcher.tracer = self._traces.push(Tracer(self._driver, self._ledger, stream))
        return tracer

    def finish_trace(self) -> list[Span]:
        """What happened since `start_trace`; waits for the device."""
        tracer = self._prefetcher.tracer
        assert tracer is not None, "a trace is finished once"
        self._prefetcher.tracer = None
        try:
            marks = tracer.finish()
        finally:
            self._traces.close()
        return spans_of(marks, self._layers, len(self._prefetcher.slots))

    def stop(self) -> None:
        """Stop issuing; what was issued may still run."""
        self._prefetcher.stop()

    def close(self) -> None:
        """Free streams and events, after `stop`; the device is idle."""
        failures = Failures()
        for part in self._prefetcher, self._captured, self._traces:
            with failures.noted():
                part.close()
        failures.raise_first()


def _describe(plan: LayerPlan, config: DWDPConfig, issuer: Issuer) -> CopyPath:
    """How the copies of ``plan``, which has most, get to the driver."""
    if config.slice_bytes != "auto":
        why = f"slice_bytes is {config.slice_bytes}"
    elif len(plan.streams) > 1:
        why = "long copies on a stream for each owner are few, and few copies do not hold up kernel launches"
    else:
        why = "there is one owner to copy from" if plan.streams else "nothing is remote"
    return CopyPath(
        plan="streams" if config.slice_bytes == "auto" else "slices",
        why=why,
        num_streams=len(plan.streams),
        num_copies=plan.num_copies,
        issued_by=issuer.issued_by,
    )

"""A thread that gives copies to the driver without the interpreter: ``_issue.c``, which is compiled at installation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.cuda_batch import BatchCall, CopyBatch
from vmm_dwdp.allocator.cuda_events import EventCalls, address
from vmm_dwdp.allocator.driver import Choosing, Lane, LinesAt, StreamId
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.errors import DriverError

if HAS_NATIVE:
    from vmm_dwdp.allocator import _native


class CudaIssuingThread:
    """See `vmm_dwdp.allocator.driver.IssuingThread`."""

    def __init__(
        self,
        context: int,
        set_current: int,
        events: EventCalls,
        batch: BatchCall,
        choosing: tuple[LinesAt, int, int, int] | None = None,
    ) -> None:
        """Raises `DriverError` if the thread cannot use ``context``.

        Args:
            set_current: where cuCtxSetCurrent is.
            choosing: the lines by which runs are chosen, and where cuStreamWriteValue32, cuEventQuery and
                cuThreadExchangeStreamCaptureMode are.
        """
        self._batch_call = batch
        self._words: _Words | None = None
        pulls = None
        if choosing is not None:
            lines, *calls_of_choosing = choosing
            self._words = _Words()
            pulls = (*lines, *calls_of_choosing)
        calls = set_current, events.wait_at, batch.address, events.record_at
        self._thread = _native.Issuer(*calls, context, _failure, pulls)
        self.native_id = self._thread.native_id
        self.choosing: Choosing = self._thread
        self.submit = self._thread.submit
        self.flush = self._thread.flush
        self.close = self._thread.close

    @classmethod
    def start(cls, context: int, events: EventCalls, batch: BatchCall, lines: LinesAt | None) -> CudaIssuingThread:
        """With the driver that is loaded."""
        choosing = None
        if lines is not None:
            since = {"cuStreamWriteValue32": 11070, "cuEventQuery": 2000, "cuThreadExchangeStreamCaptureMode": 10010}
            write_value, query_event, exchange_mode = (address(call, version) for call, version in since.items())
            choosing = lines, write_value, query_event, exchange_mode
        return cls(context, address("cuCtxSetCurrent", 4000), events, batch, choosing)

    def job(self, lanes: Sequence[Lane]) -> _native.Job:
        kept: list[Any] = [*lanes]
        stated = [self._stated(lane, kept) for lane in sorted(lanes, key=lambda lane: lane.owner is not None)]
        return self._thread.job(tuple(stated), kept)

    def _stated(self, lane: Lane, kept: list[Any]) -> tuple[Any, ...]:
        if lane.owner is None or self._words is None:
            return lane.stream, lane.after, tuple(batch.arguments for batch in lane.copies.batches), lane.then
        runs = [CopyBatch(self._batch_call, run.copies) for run in lane.runs]
        kept += runs
        batches = tuple((*run.arguments, run.nbytes) for run in runs)
        return lane.stream, lane.after, batches, lane.then, lane.owner, self._words.of(lane.stream)


class _Words:
    """Host memory to which streams write how far they are: two words for each. The garbage collector frees it: streams
    may have to write still when the thread has ended."""

    def __init__(self) -> None:
        self._memory = torch.zeros(_WORDS, dtype=torch.int32, pin_memory=True)
        self._places: dict[StreamId, int] = {}

    def of(self, stream: StreamId) -> int:
        """Where they are; the device sees host memory that torch has pinned at the same address."""
        return self._memory[_STRIDE * self._places.setdefault(stream, len(self._places)) :].data_ptr()


_WORDS: Final = 1024
_STRIDE: Final = 16  # words: a cache line for each stream, of which there are few


def _failure(call: str, result: int) -> DriverError:
    return DriverError(call, cuda.CUresult(result).name, "give a layer's copies to the driver")

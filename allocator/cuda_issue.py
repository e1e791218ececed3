"""A thread that gives copies to the driver without the interpreter: ``_issue.c``, which is compiled at installation."""

from __future__ import annotations

from collections.abc import Sequence

from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.cuda_batch import BatchCall
from vmm_dwdp.allocator.cuda_events import EventCalls, address
from vmm_dwdp.allocator.driver import Lane
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.errors import DriverError

if HAS_NATIVE:
    from vmm_dwdp.allocator import _native


class CudaIssuingThread:
    """See `vmm_dwdp.allocator.driver.IssuingThread`."""

    def __init__(self, context: int, set_current: int, events: EventCalls, batch: BatchCall) -> None:
        """``set_current``: where cuCtxSetCurrent is. Raises `DriverError` if the thread cannot use ``context``."""
        self._thread = _native.Issuer(set_current, events.wait_at, batch.address, events.record_at, context, _failure)
        self.submit = self._thread.submit
        self.flush = self._thread.flush
        self.close = self._thread.close

    @classmethod
    def start(cls, context: int, events: EventCalls, batch: BatchCall) -> CudaIssuingThread:
        """With the driver that is loaded."""
        return cls(context, address("cuCtxSetCurrent", 4000), events, batch)

    def job(self, lanes: Sequence[Lane]) -> _native.Job:
        stated = tuple(
            (lane.stream, lane.after, tuple(batch.arguments for batch in lane.copies.batches), lane.then)
            for lane in lanes
        )
        return self._thread.job(stated, tuple(lanes))


def _failure(call: str, result: int) -> DriverError:
    return DriverError(call, cuda.CUresult(result).name, "give a layer's copies to the driver")

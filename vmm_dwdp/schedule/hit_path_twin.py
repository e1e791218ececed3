"""What ``_staged.c`` and ``_hit_path.c`` are where they were not compiled: the words that they keep, and no short way.

See [Note: The hit path].
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Final

from vmm_dwdp.allocator.driver import Driver, EventId, NativeCalls, StreamId
from vmm_dwdp.memory.assembly import Weights


class SlotState:
    """See `vmm_dwdp.schedule.layer.Slot`."""

    def __init__(self) -> None:
        self.holds: Any = None
        self.reader: Any = None
        self.ticket: Any = None
        self.read = True


class PipelineState:
    """See `vmm_dwdp.schedule.layer.Pipeline`."""

    def __init__(
        self, driver: Driver, issuer: Any, calls: NativeCalls | None, order: list[int], latest: int, /
    ) -> None:
        self.driver = driver
        self.issuer = issuer
        self.tracer: Any = None
        self.latest = latest
        self.prompt = False
        self.timed = False
        self.watched = False


class LayerState:
    """See `vmm_dwdp.schedule.layer.StagedLayer`."""

    def __init__(
        self,
        pipeline: Any,
        slot: Any,
        ready: tuple[EventId, ...],
        consumed: EventId,
        arrived: EventId,
        resumed: EventId,
        /,
    ) -> None:
        self.slot = slot
        self.following: Any = None
        self.weights: Any = None
        self.job: Any = None
        self.nbytes = self.hits = self.misses = self.fetched_bytes = 0
        self.place = 0
        self.is_first = self.is_last = False

    def enter(self, stream: StreamId, /) -> bool:
        """Acquire, if nothing is unusual: whether it was."""
        return False

    def leave(self, stream: StreamId, /) -> bool:
        """Release, if nothing is unusual: whether it was."""
        return False


class Turn:
    """See `vmm_dwdp.schedule.lifecycle.Lifecycle`."""

    def __init__(self) -> None:
        self.runner = 0
        self.in_pass = False


class HitPath:
    """Acquires and releases the layers of a runtime, which goes on by its class's functions where it does not."""

    def __init__(
        self,
        turn: Turn,
        driver: Driver,
        calls: NativeCalls | None,
        runtime: object,
        acquire: Callable[..., Weights],
        release: Callable[..., None],
        /,
    ) -> None: ...

    def open(self, layers: dict[int, Any], /) -> dict[str, Any]:
        """From now on these layers, by number, may be hit. Returns what is to stand in the place of the functions."""
        return {}

    def close(self) -> None:
        """No layer is, any more."""


class _Mine(threading.local):
    def __init__(self) -> None:
        self.number = next(_numbers)


_numbers: Final = itertools.count(1)
_mine: Final = _Mine()


def this_thread() -> int:
    """A number that no other thread of this process has or had."""
    return _mine.number

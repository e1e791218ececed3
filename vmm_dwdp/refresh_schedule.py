"""When a model's passes refresh the resident cache."""

from __future__ import annotations

from typing import Final

import torch

from vmm_dwdp.runtime import DWDPRuntime

FIRST: Final = 16  # passes before the first refresh: few, because until then nothing is cached
MOST: Final = 1024  # passes between two refreshes, once there is a cache that follows the routing


class RefreshSchedule:
    """Refreshes the cache of ``runtime``, if it has one, after 16 passes, 32 more, 64 more, and so on to 1,024.

    Replays of a graph do not come by here: whoever replays refreshes between them.
    """

    def __init__(self, runtime: DWDPRuntime) -> None:
        self._runtime = runtime
        self._interval = FIRST
        self._passes = 0

    def begin_pass(self) -> None:
        """A pass begins, in which no layer is acquired yet. Refreshes may wait for the device, but not in a capture."""
        if not self._runtime.config.resident_cache or self._captured():
            return
        if self._passes >= self._interval:
            self._runtime.refresh_cache()
            self._passes, self._interval = 0, min(2 * self._interval, MOST)
        self._passes += 1

    def _captured(self) -> bool:
        if self._runtime.device.type != "cuda":
            return False
        with torch.cuda.device(self._runtime.device):
            return torch.cuda.is_current_stream_capturing()

"""A driver by which layers have their experts in the same memory of the host, for models that are larger than it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vmm_dwdp.allocator.driver import DEVICE, Driver, HandleId, HandleType, Location


class RepeatedLayers:
    """Another driver, but for host memory: what is taken after the first ``period`` handles is these again, in turn.

    Layers are otherwise as they would be: each has addresses, and a bank, of its own. A GPU keeps nothing of host
    memory that would be read again so much later.
    """

    def __init__(self, driver: Driver, period: int) -> None:
        self._driver = driver
        self._period = period
        self._first: list[tuple[HandleId, int]] = []
        self._taken = 0
        self._holders: Counter[HandleId] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> HandleId:
        if location == DEVICE:
            return self._driver.create(nbytes, location, handle_type)
        if len(self._first) < self._period:
            self._first.append((self._driver.create(nbytes, location, handle_type), nbytes))
        handle, held = self._first[self._taken % self._period]
        assert held == nbytes, "layers must be alike, and their memory taken in one order"
        self._taken += 1
        self._holders[handle] += 1
        return handle

    def release(self, handle: HandleId) -> None:
        self._holders[handle] -= 1
        if self._holders[handle] <= 0:
            del self._holders[handle]
            self._driver.release(handle)

"""Drivers that fail where a test tells them to."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch

from support.groups import PAGE
from vmm_dwdp.allocator.cuda_driver import CudaDriver
from vmm_dwdp.allocator.driver import LinesAt
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import DriverError

UNDOING: Final = ("release", "free", "unmap", "deallocate", "close_allocation", "destroy_stream", "destroy_event")
DOING: Final = (
    "create",
    "export",
    "import_",
    "reserve",
    "map",
    "set_access",
    "allocate",
    "export_allocation",
    "open_allocation",
    "create_stream",
    "create_event",
    "record",
    "wait",
    "prepare",
    "copy",
    "issuing_thread",
    "synchronize",
)


class _Faulty:
    """Fails at the ``at``-th use of ``call``, before anything is done, once or some ``times``; counts every use.

    Attributes:
        uses: how often each call was made.
    """

    def __init__(self, call: str, at: int, *arguments: Any) -> None:
        self.uses: Counter[str] = Counter()
        self.fail(call, at)
        super().__init__(*arguments)

    def fail(self, call: str, at: int, times: int = 1) -> None:
        """Fail at the ``at``-th use from now on, and the next, ``times`` in all."""
        self._call = call
        self._at = range(self.uses[call] + at, self.uses[call] + at + times)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in DOING and name not in UNDOING:
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.uses[name] += 1
            if name == self._call and self.uses[name] in self._at:
                raise DriverError(name, "INJECTED", f"make its use number {self.uses[name]}")
            return found(*args, **kwargs)

        return counted


class FaultyDriver(_Faulty, HostDriver):
    def __init__(self, call: str = "", at: int = 0) -> None:
        super().__init__(call, at, PAGE)


class FaultyCudaDriver(_Faulty, CudaDriver):
    """Copies are given by a thread of Python's, and C makes its calls through Python: so all can be made to fail."""

    def __init__(self, call: str = "", at: int = 0) -> None:
        super().__init__(call, at, torch.device("cuda"))
        self.native_calls = None

    def issuing_thread(self, lines: LinesAt | None = None) -> None:
        return None

"""In what keeps `close` off memory that somebody touches."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_HANDLER = ("tests/property/test_close_in_a_handler.py",)
_WRITE = ("tests/unit/test_closing.py",)

BUGS: Final = (
    Bug(
        "a handler closes under the write that it has stopped",
        "vmm_dwdp/memory/assembly.py",
        "with uninterrupted(), self._touches, self._driver.current():",
        "with self._touches, self._driver.current():",
        _WRITE,
    ),
    Bug(
        "memory is touched after close",
        "vmm_dwdp/memory/assembly.py",
        "            if self._stopped:\n",
        "            if False:\n",
        _HANDLER,
    ),
    Bug(
        "close does not say that memory goes",
        "vmm_dwdp/rank.py",
        "self._membership.leave, self._schedule.stop, self._assembly.stop:",
        "self._membership.leave, self._schedule.stop:",
        _HANDLER,
    ),
    Bug(
        "a handler is told the frame that it was kept from",
        "allocator/uninterrupted.py",
        "    _arrived.append(number)\n",
        "    _arrived.append(number)\n    _kept.append(frame)\n\n\n_kept: list[FrameType | None] = []\n",
        ("tests/unit/allocator/test_uninterrupted.py",),
    ),
    Bug(
        "jobs are taken that nobody will run",
        "vmm_dwdp/schedule/issue.py",
        "        if self._token is None:  # closed, below a signal's handler perhaps: nobody will run it\n",
        "        if False:\n",
        ("tests/unit/test_closing.py",),
    ),
    Bug(
        "a runtime that was closed in publish runs",
        "vmm_dwdp/schedule/lifecycle.py",
        '        if self._state == "set-up":  # a signal\'s handler may have closed it\n',
        "        if True:\n",
        ("tests/unit/test_closing.py",),
    ),
    Bug(
        "a layer of a closed runtime has no weights and no sentence",
        "vmm_dwdp/schedule/schedule.py",
        "layer.weights = NoWeights()",
        "layer.weights = {}",
        _HANDLER,
    ),
    Bug(
        "a bank of a closed runtime has no weights and no sentence",
        "vmm_dwdp/memory/bank.py",
        "weights = self._weights.get(number)\n",
        "weights = self._weights[number]\n",
        _HANDLER,
    ),
    Bug(
        "a forked child waits for a call of its parent's thread",
        "vmm_dwdp/schedule/lifecycle.py",
        "        self.calls = threading.RLock()  # nobody here will let go of the parent's\n",
        "",
        ("tests/unit/test_threads_and_forks.py",),
    ),
)

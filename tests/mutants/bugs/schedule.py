"""In time: slots, events, passes, and what is told of them."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_EVENTS = ("tests/unit/schedule/test_event_protocol.py",)
_PYTHON = ("tests/unit/schedule/test_without_native.py",)
_UPDATE = ("tests/multiprocess/test_update.py",)
_STATES = ("tests/unit/test_runtime_states.py",)
_INTERRUPTS = ("tests/property/test_interrupts.py::test_acquire_and_release_by_signals",)
_TURN = ("tests/unit/test_threads_and_forks.py",)
_CURRENT = ("tests/unit/allocator/test_current_device.py",)

BUGS: Final = (
    Bug(
        "copies wait for the event of another slot",
        "vmm_dwdp/schedule/staging.py",
        "after, streams = slot.consumed.event, self.pipeline.streams",
        "after, streams = self.slots[0].consumed.event, self.pipeline.streams",
        _EVENTS,
    ),
    Bug(
        "ready is recorded before the copies",
        "vmm_dwdp/schedule/layer.py",
        """            self._driver.copy(lane.copies, lane.stream)
            self._driver.record(lane.then, lane.stream)
""",
        """            self._driver.record(lane.then, lane.stream)
            self._driver.copy(lane.copies, lane.stream)
""",
        _EVENTS,
    ),
    Bug(
        "copies are given by the native thread while a trace is recorded",
        "vmm_dwdp/schedule/layer.py",
        "        if pipeline.tracer is None:\n",
        "        if True:\n",
        ("tests/unit/schedule/test_copy_path.py",),
    ),
    Bug(
        "acquire does not wait for the thread that issues copies",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.ticket is not None and not slot.ticket.done:\n",
        "        if False:\n",
        _EVENTS,
    ),
    Bug(
        "release does not record that the slot was read",
        "vmm_dwdp/schedule/layer.py",
        """        self._driver.record(slot.consumed.event, stream)
        if pipeline.tracer""",
        "        if pipeline.tracer",
        _PYTHON,
    ),
    Bug(
        "the end of a pass fetches the first layer into every slot",
        "vmm_dwdp/schedule/staging.py",
        "if place + depth < len(fetches) else place % depth]",
        "if place + depth < len(fetches) else 0]",
        _EVENTS,
    ),
    Bug(
        "a slot that nobody read is overwritten at once",
        "vmm_dwdp/schedule/layer.py",
        "        elif not slot.read:\n",
        "        elif False:\n",
        _EVENTS,
    ),
    Bug(
        "an abandoned layer is still acquired after reset",
        "vmm_dwdp/schedule/in_place.py",
        "            layer.read_in_place = layer.looked_up = False\n",
        "            layer.looked_up = False\n",
        _STATES,
    ),
    Bug(
        "slots keep old bytes in an update",
        "vmm_dwdp/schedule/staging.py",
        "            slot.holds = None\n",
        "            pass\n",
        _UPDATE,
    ),
    Bug(
        "an update is made while a layer is read in place",
        "vmm_dwdp/schedule/schedule.py",
        "            self.in_place.require_idle()\n",
        "            pass\n",
        _UPDATE,
    ),
    Bug(
        "the cache keeps old bytes after an update",
        "vmm_dwdp/memory/assembly.py",
        "            self.cache.refill()\n",
        "            self.cache.stats()\n",
        _UPDATE,
    ),
    Bug(
        "a slot is named before its job is handed over",
        "vmm_dwdp/schedule/layer.py",
        "        slot.holds = None\n        if pipeline",
        "        slot.holds = self\n        if pipeline",
        ("tests/unit/schedule/test_copy_path.py",),
    ),
    Bug(
        "flush does not wait for the thread of Python's",
        "vmm_dwdp/schedule/issue.py",
        "        self._run_now(lambda: None)\n",
        "        pass\n",
        ("tests/unit/schedule/test_copy_path.py::test_flush_waits_for_all_that_was_submitted",),
    ),
    Bug(
        "a slot that holds nothing is refilled without waiting",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n",
        "        if slot.holds is None:\n            pass\n",
        ("tests/unit/schedule/test_event_protocol.py::test_a_fetch_that_was_interrupted_and_is_made_anew",),
    ),
    Bug(
        "who refills a slot that holds nothing says that it read it",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n"
        "            self._driver.record(slot.consumed.event, stream)\n",
        ("tests/unit/schedule/test_event_protocol.py::test_a_fetch_that_was_interrupted_and_is_made_anew",),
    ),
    Bug(
        "the cache is read after an update that could not fill it anew",
        "vmm_dwdp/memory/assembly.py",
        "            self.cache.forget()\n",
        "            pass\n",
        ("tests/multiprocess/test_update.py::test_a_cache_that_cannot_be_filled_anew_is_not_read",),
    ),
    Bug(
        "a second thread is let through in the middle of a pass",
        "vmm_dwdp/schedule/lifecycle.py",
        "        if self.in_pass and runner is not None",
        "        if self.runner < 0 and runner is not None",
        _TURN,
    ),
    Bug(
        "the pass of a thread that has ended bars all others",
        "vmm_dwdp/schedule/lifecycle.py",
        " and runner.is_alive():",
        ":",
        _TURN,
    ),
    Bug(
        "a stream of another device is taken",
        "vmm_dwdp/schedule/given_stream.py",
        "        if device != driver.device:\n",
        "        if device is None:\n",
        _CURRENT,
    ),
)

"""At the top: a rank's life, its passes, its checkpoint."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_CLOSING = ("tests/unit/test_closing.py",)
_TURN = ("tests/unit/test_threads_and_forks.py",)
_CURRENT = ("tests/unit/allocator/test_current_device.py",)
_STATED = ("tests/unit/test_forward_pass.py",)

BUGS: Final = (
    Bug(
        "the row after the one that was asked for is read",
        "vmm_dwdp/checkpoint.py",
        "whole[row : row + 1]",
        "whole[row + 1 : row + 2]",
        ("tests/unit/test_checkpoint.py",),
    ),
    Bug(
        "close does not look for what has no owner",
        "vmm_dwdp/rank.py",
        "                self.ledger.sweep()\n",
        "                pass\n",
        _CLOSING,
    ),
    Bug(
        "an update in the middle of a pass lets the pass go on unasked",
        "vmm_dwdp/together.py",
        "        self._lifecycle.ask_again()  # so that the next acquire asks whether weights",
        "        pass  # so that the next acquire asks whether weights",
        ("tests/multiprocess/test_update_again.py::test_an_update_that_fails_in_the_middle_of_a_pass_ends_the_pass",),
    ),
    Bug(
        "in the block of an update all calls are allowed",
        "vmm_dwdp/schedule/lifecycle.py",
        "        self._busy = what\n",
        "        pass\n",
        ("tests/multiprocess/test_updating.py",),
    ),
    Bug(
        "threads that state their passes do not wait for each other",
        "vmm_dwdp/schedule/lifecycle.py",
        "        with self._turns:\n            yield\n",
        "        yield\n",
        _STATED,
    ),
    Bug(
        "what was stated of a pass stays",
        "vmm_dwdp/runtime.py",
        "        finally:\n            self._schedule.stated = None\n",
        "        finally:\n            pass\n",
        _STATED,
    ),
    Bug(
        "a stated pass that ends early leaves the slots as they are",
        "vmm_dwdp/runtime.py",
        "            with self._driver.current():\n                self._schedule.reset(None)\n",
        "",
        _STATED,
    ),
    Bug(
        "a stated pass begins in the middle of another",
        "vmm_dwdp/runtime.py",
        "                if not begins:\n                    self._give_up()\n",
        "",
        _STATED,
    ),
    Bug(
        "streams of other devices are taken by their numbers",
        "vmm_dwdp/schedule/given_stream.py",
        "if not driver.owns(at):",
        "if driver.owns(at) is None:",
        ("tests/unit/schedule/test_given_stream.py",),
    ),
    Bug(
        "a layer that is profiled is hit in C",
        "vmm_dwdp/schedule/schedule.py",
        "                self._staging.pipeline.watched = wanted\n",
        "                pass\n",
        ("tests/unit/observe/test_spans.py",),
    ),
    Bug(
        "a pass does not end with its last layer",
        "vmm_dwdp/runtime.py",
        "            if layer == self._last_layer:\n                lifecycle.in_pass = False\n",
        "",
        _TURN,
    ),
    Bug(
        "an acquire that was refused begins a pass",
        "vmm_dwdp/runtime.py",
        "                if begins:\n                    lifecycle.end_pass()\n",
        "",
        _TURN,
    ),
    Bug(
        "statistics are read off the device by any thread",
        "vmm_dwdp/runtime.py",
        "own = self._lifecycle.latest_runner == this_thread() and self._lifecycle.is_running",
        "own = self._lifecycle.is_running",
        _TURN,
    ),
    Bug(
        "statistics are read off events that are closed",
        "vmm_dwdp/runtime.py",
        "own = self._lifecycle.latest_runner == this_thread() and self._lifecycle.is_running",
        "own = self._lifecycle.latest_runner == this_thread()",
        ("tests/unit/test_threads.py::test_stats_after_close_are_the_latest",),
    ),
    Bug(
        "a forked child keeps its parent's door open",
        "vmm_dwdp/rank.py",
        "        rank._membership.forget()\n",
        "",
        _TURN,
    ),
    Bug(
        "a pass goes on whatever device has become current",
        "vmm_dwdp/runtime.py",
        """        if lifecycle.runner == this and self._current_device() == self._index:""",
        """        if lifecycle.runner == this:""",
        _CURRENT,
    ),
    Bug(
        "a door that cannot be shut keeps close from the rest",
        "vmm_dwdp/rank.py",
        "            with failures.noted():\n                need_no_device()\n",
        "            need_no_device()\n",
        _CLOSING,
    ),
    Bug(
        "one part that cannot be freed keeps close from the others",
        "vmm_dwdp/rank.py",
        "                with failures.noted():\n                    free()\n",
        "                free()\n",
        _CLOSING,
    ),
    Bug(
        "memory is freed although the device may still read it",
        "vmm_dwdp/rank.py",
        "            self._driver.synchronize()\n            for free",
        "            with failures.noted():\n                self._driver.synchronize()\n            for free",
        _CLOSING,
    ),
    Bug(
        "a release that is refused takes the place of its block's exception",
        "vmm_dwdp/runtime.py",
        "            undo_after(error, lambda: self.release(layer, stream=stream))\n",
        "            self.release(layer, stream=stream)\n",
        _CLOSING,
    ),
    Bug(
        "a runtime that cannot be closed takes the place of its block's exception",
        "vmm_dwdp/rank.py",
        'a note on it."""\n        undo_after(error, self.close)\n',
        'a note on it."""\n        self.close()\n',
        _CLOSING,
    ),
)

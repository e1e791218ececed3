"""In the integrations."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_SPREAD = ("tests/unit/integrations/test_spread_tensor.py",)

BUGS: Final = (
    Bug(
        "a placeholder has an address",
        "vmm_dwdp/integrations/spread_tensor.py",
        '*("data_ptr", "untyped_storage"',
        '*("untyped_storage"',
        _SPREAD,
    ),
    Bug(
        "a placeholder takes other bytes",
        "vmm_dwdp/integrations/spread_tensor.py",
        "    def data(self, _: torch.Tensor) -> None:\n        self.refuse()\n",
        "    def data(self, _: torch.Tensor) -> None:\n        pass\n",
        _SPREAD,
    ),
    Bug(
        "passes of several threads overlap in one model",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            with self._lock:\n",
        "            with threading.RLock():\n",
        (
            "tests/unit/integrations/test_transformers_turns.py::test_no_pass_overlaps_another_whichever_model_of_it_is_called",
        ),
    ),
    Bug(
        "a pass that raised is not given up",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            self._runtime.reset()\n            self._broken, self.reached",
        "            self._broken, self.reached",
        ("tests/unit/integrations/test_transformers_turns.py::test_after_a_pass_that_raised_every_thread_begins_anew",),
    ),
)

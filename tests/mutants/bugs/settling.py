"""In how ranks settle on a number of experts."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_SETTLING = ("tests/multiprocess/test_settling.py",)
_FITTING = ("tests/property/test_auto_experts.py",)

BUGS: Final = (
    Bug(
        "one expert more than fits",
        "vmm_dwdp/layout/auto.py",
        "            fitting = number\n        return",
        "            fitting = number + 1\n        return",
        _FITTING,
    ),
    Bug(
        "the resident cache takes no room",
        "vmm_dwdp/layout/auto.py",
        ".on_device + self.config.kept_on_device",
        ".on_device",
        _FITTING,
    ),
    Bug(
        "more experts may take what is there for an equal share only",
        "vmm_dwdp/layout/auto.py",
        "(room.limit if fitting is None else room.wanted)",
        "room.limit",
        _FITTING,
    ),
    Bug(
        "each rank holds what fits on itself",
        "vmm_dwdp/group/settle.py",
        "return least_of([int(each) if each.isdecimal() else None for each in offers])",
        "return int(told)",
        _SETTLING,
    ),
    Bug(
        "who settles goes on before all know what all offer",
        "vmm_dwdp/group/settle.py",
        """            exchange.step(1, "settle: this rank knows what all can hold", deadline)
            exchange.step(LAST_STEP, "settle: all know it", deadline)
""",
        "",
        _SETTLING,
    ),
    Bug(
        "who comes back holds an equal share, whatever the others have settled on",
        "vmm_dwdp/group/membership.py",
        "self._settle_on(joined.settled, exchange)",
        "self._settle_on(AutoExperts(self._stated, (11,)).numbers[0], exchange)",
        _SETTLING,
    ),
    Bug(
        "who came back does not tell the next what all have settled on",
        "vmm_dwdp/group/membership.py",
        "        exchange.settled = number\n",
        "        exchange.settled = number if self._exchange is not None else None\n",
        _SETTLING,
    ),
    Bug(
        "a revision that is not stated yet is another one",
        "vmm_dwdp/group/exchange.py",
        'if UNSTATED not in (request.get("revision"), self._revision) and ',
        "if ",
        _SETTLING,
    ),
)

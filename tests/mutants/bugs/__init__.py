"""Bugs of the kinds that this project can have, by room, each with the narrowest tests that must find it."""

from __future__ import annotations

from typing import Final

from mutants.bugs import (
    allocator,
    bank,
    benchmarks,
    chosen,
    closing,
    demo,
    engines,
    group,
    integrations,
    memory,
    native,
    order,
    planning,
    pulls,
    rebalancing,
    runtime,
    schedule,
    servers,
    settling,
    sleep,
)

BUGS: Final = (
    *allocator.BUGS,
    *bank.BUGS,
    *benchmarks.BUGS,
    *chosen.BUGS,
    *closing.BUGS,
    *demo.BUGS,
    *engines.BUGS,
    *group.BUGS,
    *integrations.BUGS,
    *memory.BUGS,
    *native.BUGS,
    *order.BUGS,
    *planning.BUGS,
    *pulls.BUGS,
    *rebalancing.BUGS,
    *runtime.BUGS,
    *schedule.BUGS,
    *servers.BUGS,
    *settling.BUGS,
    *sleep.BUGS,
)

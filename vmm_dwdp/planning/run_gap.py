"""What runs that are chosen one by one cost on this machine, and how long they should be; see `layout/turns.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from vmm_dwdp.allocator.driver import Address, Copy, Driver, Lane, Location
from vmm_dwdp.allocator.handles import Event, Ledger, ResourceStack, Stream
from vmm_dwdp.layout.turns import Line
from vmm_dwdp.memory.lines import SharedLines
from vmm_dwdp.planning.calibrate import mapped
from vmm_dwdp.schedule.issue import Issuer, open_issuer
from vmm_dwdp.schedule.pulls import give_whole

LOST: Final = 0.02  # of the time of a run, that the gap after it may take
OF_OWNER: Final = 128 << 20  # bytes: over PCIe all is over before another rank's line is taken for that of a dead one
RUNS: Final = 8  # of an owner
REPEATS: Final = 9


def shortest_run(gap: float, rate: float) -> int:
    """Bytes of the shortest run after which a gap of so many seconds costs at most `LOST`; ``rate``: bytes a second."""
    return int(gap * rate / LOST)


def measure_gap(driver: Driver) -> float:
    """Seconds by which each run more makes the same copies longer, out of host memory: the median, at least 0.

    Given by the thread that the runtime would have, as a rank gives them beside others that pull. Takes 256 MiB of host
    memory and of the device's, and gives them back. The device's context is current.

    Raises:
        DriverError: memory could not be had, or a copy was refused.
    """
    ledger = Ledger()
    with ResourceStack() as stack:
        lines = SharedLines.make(ledger, 0, 3)
        with closing(lines), closing(SharedLines(lines.share(), 1, 3)) as other:
            places = (Location(), Location(driver.numa_node))
            target, source = (mapped(stack, driver, ledger, 2 * OF_OWNER, place) for place in places)
            streams = [stack.push(Stream(driver, ledger)).stream for _ in range(2)]
            after, *ends = (stack.push(Event(driver, ledger, timed=True)).event for _ in range(3))
            issuer = open_issuer(driver, ledger, 2 * RUNS, lines)
            try:
                found = {}
                for runs in (1, RUNS):
                    copies = [
                        tuple(
                            driver.prepare([Copy(Address(target + start), Address(source + start), OF_OWNER // runs)])
                            for start in range(owner * OF_OWNER, (owner + 1) * OF_OWNER, OF_OWNER // runs)
                        )
                        for owner in range(2)
                    ]
                    whole = driver.prepare([])  # nothing is given so
                    lanes = [
                        Lane(stream, after, whole, end, owner + 1, copies[owner])
                        for owner, (stream, end) in enumerate(zip(streams, ends, strict=True))
                    ]
                    found[runs] = _seconds(driver, issuer, other, lanes)
            finally:
                issuer.close()
                driver.synchronize()
                issuer.free()
    return max(0.0, (found[RUNS] - found[1]) / (2 * (RUNS - 1)))


def _seconds(driver: Driver, issuer: Issuer, other: SharedLines, lanes: Sequence[Lane]) -> float:
    """From the moment at which the copies may begin to their end, the median."""

    def give() -> None:
        for lane in lanes:
            give_whole(driver, lane)

    job = issuer.job(give, lanes)
    spans = []
    for _ in range(REPEATS):
        other.say(Line(1, (0, 0, 0)))  # it pulls, so that there is one run at a time
        driver.record(lanes[0].after, lanes[0].stream)
        issuer.submit(job).result()
        driver.synchronize()
        spans.append(max(driver.elapsed(lane.after, lane.then) for lane in lanes))
    return statistics.median(spans)

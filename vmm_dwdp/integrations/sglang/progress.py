"""What an engine's log says once a minute: how its passes read experts, and what they waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from vmm_dwdp.observe.stats import LayerStats, Stats

EVERY_S: Final = 60.0


class Progress:
    """Of one rank.

    Args:
        stats: of its runtime.
        clock: seconds.
    """

    def __init__(self, stats: Callable[[], Stats], clock: Callable[[], float] = time.monotonic) -> None:
        self._stats = stats
        self._clock = clock
        self._told_at = clock()
        self._told = dict(stats().layers)

    def line(self) -> str | None:
        """What was since the last line, if that is a minute ago and there were passes. Called between passes."""
        seconds = self._clock() - self._told_at
        if seconds < EVERY_S:
            return None
        found = self._stats()
        passes = {number: _since(self._told.get(number, LayerStats()), layer) for number, layer in found.layers.items()}
        self._told_at += seconds
        self._told = dict(found.layers)
        staged, in_place = (max(counts) for counts in zip(*((n, m) for n, m, _ in passes.values()), strict=True))
        if not staged + in_place:
            return None
        waited = sum(each for _, _, each in passes.values())
        said = f"{staged} passes with experts copied ahead, {in_place} read in place; "
        said += f"waited for copies {waited:.3g} of {seconds:.0f} s"
        if waited:
            most = max(passes, key=lambda number: passes[number][2])
            said += f", most for layer {most} ({passes[most][2]:.3g} s)"
        return said if found.advice is None else f"{said}. {found.advice}"


def _since(before: LayerStats, now: LayerStats) -> tuple[int, int, float]:
    """Passes in which a layer was staged and read in place, and the seconds waited for it."""
    staged = now.hits + now.misses - before.hits - before.misses
    return staged, now.in_place - before.in_place, now.exposed_wait_s - before.exposed_wait_s

"""Noticing that prefetching does not pay: a pass with few tokens computes less long than its copies take.

Of a pass that waits for copies it is the copies that set the pace. So its whole time is that of the copies, and what is
left of it without the waits is that of the compute, which grows with the number of tokens.
"""

from __future__ import annotations

import logging
from typing import Final

from vmm_dwdp.observe.timing import PassTimes

EXPOSED: Final = 0.05  # the part of a pass that may be waits before it counts as held up by its copies
PASSES: Final = 3  # in a row, after which it is said

_log = logging.getLogger("vmm_dwdp")


class Guard:
    """Says once, in the log, that passes are held up by their copies.

    Attributes:
        advice: what it said; ``None`` so far.
    """

    def __init__(self) -> None:
        self.advice: str | None = None
        self._seen: PassTimes | None = None
        self._in_a_row = 0

    def observe(self, latest: PassTimes | None, tokens: int | None) -> None:
        """The latest pass that was timed, and how many tokens a pass has now, where that is known."""
        if self.advice is not None or latest is None or latest is self._seen:
            return
        self._seen = latest
        held_up = latest.waited_s > EXPOSED * latest.total_s
        self._in_a_row = self._in_a_row + 1 if held_up else 0
        if self._in_a_row == PASSES:
            self.advice = _advice(latest, tokens)
            _log.warning(self.advice)


def _advice(times: PassTimes, tokens: int | None) -> str:
    compute_s = times.total_s - times.waited_s
    ratio = times.total_s / max(compute_s, 1e-9)
    if tokens is None:
        asked, enough = "this many tokens", f"{ratio:.1f} times as many"
    else:
        asked, enough = f"{tokens} tokens", f"about {tokens * ratio:.0f}"
    return (
        f"prefetching does not pay with {asked} a pass: compute takes {compute_s * 1e3:.3g} ms and copies take "
        f"{times.total_s * 1e3:.3g} ms, of which {times.waited_s / times.total_s:.0%} are waited for; with {enough} "
        "compute would hide them"
    )

"""Whether the owners of a pass's runs are worth choosing.

[Note: Hidden passes]
Choosing holds the launching thread back: a run is chosen when the one before it ends, so `acquire` returns when the
last run of its layer was given, and the thread is never further ahead of the device than the slots are. An engine that
launches the next pass before it takes the results of this one takes them later by that, up to a pass.

Where compute hides the copies, choosing gains nothing. So a pass that is expected to compute for longer than any pass
was held up by its copies is given whole: a stream for each owner, as with ``slice_bytes: streams``. Of a pass that
waits it is the copies that set the pace, so its time is theirs, in the way in which they were given; and what a pass
computes is its time without its waits, in proportion to its tokens where they are told. As long as nothing was
measured, runs are chosen; and where even copies at `WHOLE_RATE` of the link's rate would take longer than the compute,
since copies that are given whole reach that at best where there is something to choose.

                    time of a pass   waits   its compute   held up for at most   the next with as many tokens
    chosen, hidden            40 ms    0 ms         40 ms                  0 ms   whole
    whole, held up            52 ms   12 ms         40 ms                 52 ms   chosen
    chosen, hidden            40 ms    0 ms         40 ms               51.5 ms   chosen, until that is 40 ms
    twice the tokens                                80 ms                         whole
"""

from __future__ import annotations

from typing import Final

from vmm_dwdp.observe.timing import PassTimes

WHOLE_RATE: Final = 0.71  # docs/several-gpus.md
WAITS: Final = 0.01  # the part of a pass that may be waits before it counts as held up
FORGOTTEN: Final = 0.01  # of what held passes up, with each that was not: what the neighbours do changes


class HiddenPasses:
    """Tells of one pass after another whether compute is expected to hide its copies, however they are given."""

    def __init__(self) -> None:
        self._held_up_s = 0.0  # the longest pass that was, less what is forgotten
        self._seen: PassTimes | None = None  # the latest that was taken into account
        self._compute_s = 0.0  # of it
        self._tokens: int | None = None  # of it
        self._timed_tokens: int | None = None  # of the pass that was begun and timed last

    def hides(self, latest: PassTimes | None, tokens: int | None, copies_s: float, *, timed: bool) -> bool:
        """A pass begins: whether it is expected to hide its copies.

        Args:
            latest: the latest pass that was timed and read, which began before this one.
            tokens: of this pass, if the caller tells. ``timed``: whether it is.
            copies_s: what its copies take at the rate of the link, as far as a pass is timed; 0: not known.
        """
        if latest is not None and latest is not self._seen:
            self._learn(latest)
        if timed:
            self._timed_tokens = tokens
        expected = self._compute_s
        if tokens is not None and self._tokens:
            expected *= tokens / self._tokens
        return expected > max(self._held_up_s, copies_s / WHOLE_RATE)

    def _learn(self, latest: PassTimes) -> None:
        self._seen, self._tokens = latest, self._timed_tokens
        self._compute_s = latest.total_s - latest.waited_s
        if latest.waited_s > WAITS * latest.total_s:
            self._held_up_s = max(self._held_up_s, latest.total_s)
        else:
            self._held_up_s *= 1 - FORGOTTEN

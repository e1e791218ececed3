"""How often pulls meet at one owner when nothing keeps the ranks of a group in step, and what of the links is left.

What is left is for all ranks copying all the time: `contended_share` for copies whose order is fixed ahead,
`chosen_share` for owners chosen run by run; `reached_by_all` says which of them holds. `reached_share` is for ranks
that copy a part of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, comb, sqrt
from typing import Final

import numpy as np

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.copies import LayerPlan
from vmm_dwdp.layout.placement import HOST
from vmm_dwdp.layout.turns import chooses
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.pulling import Turns

# By ranks: the simulator with a stream for each owner and DeepSeek-R1's bytes, from random moments; see the test.
# Four H200 reached 0.61 in step and 0.64 at random moments, the means of four ranks.
_FIXED_ORDER: Final = {2: 1.0, 3: 0.72, 4: 0.64, 6: 0.57, 8: 0.545, 12: 0.53, 32: 0.51}
_LAST_RUNS: Final = 0.18  # fitted to the simulator, 3 to 8 ranks and 5 to 40 runs an owner
_LAST_RUNS_AHEAD: Final = 0.3  # the same, where one layer ahead is looked at


def meeting_shares(group_size: int) -> list[float]:
    """By k from 0, the share of pulls during which k other ranks pull from the same owner.

    Every rank always pulls, from one owner at a time, and spends as long at each of the ``G - 1`` others. A pull of
    rank ``r`` from owner ``s`` can be met by ``G - 2`` ranks: ``r`` itself cannot meet itself, and ``s`` does not pull
    from itself. Each of them is at ``s`` for a share ``1 / (G - 1)`` of the time, and ranks out of step are there
    independently, so k of them are there with probability

        C(G - 2, k) * p**k * (1 - p)**(G - 2 - k),    p = 1 / (G - 1).
    """
    others, p = group_size - 2, 1 / (group_size - 1)
    return [comb(others, k) * p**k * (1 - p) ** (others - k) for k in range(others + 1)]


def serial_efficiency(group_size: int) -> float:
    """The mean share of a link's rate that such a pull gets, when those who meet share it evenly: the mean of
    ``1 / (k + 1)`` over `meeting_shares`, which is ``1 - (1 - p)**(G - 1)``."""
    return 1 - (1 - 1 / (group_size - 1)) ** (group_size - 1)


def contended_share(group_size: int) -> float:
    """The mean share of the links that ranks reach if all copy all the time, in an order that was fixed ahead.

    Whether they take turns between segments, slices or streams makes little difference. From `serial_efficiency` it
    differs as meetings last: ranks that met go on together.
    """
    sizes = sorted(_FIXED_ORDER)
    return float(np.interp(np.log(max(1, group_size)), np.log(sizes), [_FIXED_ORDER[size] for size in sizes]))


def chosen_share(runs_of_owner: float, gap: float, run_seconds: float, *, ahead: bool) -> float:
    """The same with the owner of each run chosen when the one before ends; see [Note: Turns] in ``layout/turns.py``.

    The gaps are lost, and the last runs of a layer, which have no choice left: the fewer runs, the more.

    Args:
        runs_of_owner: of a layer, from each owner.
        gap: seconds between two runs. ``run_seconds``: of a run that meets nobody.
        ahead: whether the last runs have a choice left: those of the next layer.
    """
    runs = max(1.0, runs_of_owner)
    lost = _LAST_RUNS_AHEAD / runs if ahead else _LAST_RUNS / sqrt(runs)
    return (1 - lost) / (1 + gap / run_seconds)


def reached_by_all(plan: LayerPlan, config: DWDPConfig, turns: Turns, rates: Rates) -> float:
    """The mean share of the links if all ranks copy all the time: a layer's ``plan`` each, as ``config`` has it."""
    linked = sum(len(piece.bytes) for stream in plan.streams for piece in stream if piece.owner != HOST)
    if not rates.switched or not linked:
        return 1.0
    if not chooses(config):
        return contended_share(config.group_size)
    of_owner = linked / (config.group_size - 1)
    runs = ceil(of_owner / turns.longest(plan))
    return chosen_share(runs, turns.gap, of_owner / runs / rates.reader, ahead=turns.native)


def reached_share(alone: float, full: float, period: Callable[[float], float]) -> float:
    """The share of the links that a rank's copies reach while they run, if all ranks are alike.

    A rank that copies for a share u of the time is met so much less often: 1 - (1 - full) * u is what is reached. As
    copies that are slower take longer, u is where this agrees with itself.

    Args:
        alone: seconds of a layer's copies with nobody else on the links.
        full: what is reached if all copy all the time.
        period: seconds from one layer to the next if copies reach the given share.
    """
    low, high = full, 1.0
    while high - low > 1e-4:
        share = (low + high) / 2
        busy = min(1.0, alone / share / period(share))
        if share > 1 - (1 - full) * busy:
            high = share
        else:
            low = share
    return low

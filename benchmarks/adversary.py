"""Routing that is chosen against the bank's planner: as much is copied as its rule lets happen, and nothing hits.

An expert is used in `IN_A_ROW` passes and then not until all others were. Those that come to the end of this are more
than may be copied, and the planner takes whoever was used most lately: they. So what is copied is not used again until
the bank has lost it. That more is copied no routing brings about, as one copy in `USES_A_COPY` uses is the most, and
fewer hits there are not.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vmm_dwdp.kernels.bank_table import USES_A_COPY

IN_A_ROW: Final = 6  # fewer than USES_A_COPY, or so few come to their end that others are copied, too
ROUND: Final = 96  # passes in which it repeats, of 8 experts of 128 for each token; of several tokens, more often
BEFORE: Final = 2 * ROUND  # passes until what filled the empty bank has left it


def none_hits(experts: int, top_k: int, batch: int, ranks: int = 1, passes: int = ROUND) -> npt.NDArray[np.int64]:
    """``[passes, batch, top_k]``: what tokens choose, of all ranks' experts alike, at most a quarter of them in a pass.

    Nothing hits of 128 experts, 8 a token, in a bank of a quarter, where all are remote or half of them.
    """
    distinct = min(batch, experts // (4 * top_k))
    places = np.arange(distinct * top_k)
    remote = len(places) if ranks == 1 else len(places) * (ranks - 1) // ranks
    apart = max(1, USES_A_COPY // remote)  # passes from one copy to the next, and so from one last use to the next
    turns = (np.arange(passes)[:, None] + apart * (places // ranks)) // IN_A_ROW
    of_all_ranks = np.arange(experts).reshape(ranks, -1).T.ravel()
    chosen: npt.NDArray[np.int64] = of_all_ranks[(turns * len(places) + places) % experts]
    return chosen.reshape(passes, distinct, top_k)[:, np.arange(batch) % distinct]


def in_turn(experts: int, used: int, passes: int) -> npt.NDArray[np.int64]:
    """``[passes, used]``: all experts one after another."""
    return np.arange(passes * used).reshape(passes, used) % experts

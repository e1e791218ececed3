"""How often pulls meet at one owner when nothing keeps the ranks of a group in step."""

from __future__ import annotations

from math import comb


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

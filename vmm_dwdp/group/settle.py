"""How the ranks settle on one number of experts, before any of them takes memory: each offers, the least is all's."""

from __future__ import annotations

from collections.abc import Sequence

from vmm_dwdp.errors import ConfigError, ExchangeError
from vmm_dwdp.group.agreement import LAST_STEP
from vmm_dwdp.group.exchange import Exchange

_NO_ROOM = "none"


def settle(exchange: Exchange, offer: int | ConfigError, deadline: float) -> int:
    """The least that any rank offers; offers are in the name of the attempt, so that all know the same.

    Args:
        offer: how many experts this rank has room for, or why it cannot hold its share. Then nobody settles.

    Raises:
        ConfigError: ``offer``; or the offer of another rank, which is named, is none.
        ExchangeError: a rank, which is named, did not come, or left. If it left at the end, some may have settled.
    """
    can_hold = f"{offer} experts" if isinstance(offer, int) else "no equal share"
    told = str(offer) if isinstance(offer, int) else _NO_ROOM
    try:
        with exchange.attempt("settle", f"settle: this rank can hold {can_hold}", deadline, told):
            offers = exchange.offers()
            exchange.step(1, "settle: this rank knows what all can hold", deadline)
            exchange.step(LAST_STEP, "settle: all know it", deadline)
    except ExchangeError as error:
        if isinstance(offer, ConfigError):
            raise offer from error
        raise
    if isinstance(offer, ConfigError):
        raise offer
    return least_of([int(each) if each.isdecimal() else None for each in offers])


def least_of(offers: Sequence[int | None]) -> int:
    """What all ranks have room for. Raises `ConfigError` with the ranks that have none."""
    without = [str(rank) for rank, offer in enumerate(offers) if offer is None]
    if without:
        raise ConfigError(f"an equal share of the experts does not fit on rank {', '.join(without)}, which says more")
    return min(offer for offer in offers if offer is not None)

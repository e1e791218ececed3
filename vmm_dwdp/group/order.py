"""How ranks know alike where experts are: one that comes back is told, and an update goes by the latest that any knows.

[Note: The latest order]
A rank that moves experts goes by their new order as soon as it has committed to move them, before it writes. So where a
move broke off, some may go by the new order and some, who never committed, by the one before; all of them are in doubt
then, and none reads. Nobody moves anything while in doubt: there are no more than these two, and the later has the
higher version. The update that ends the doubt says with its attempt which version each rank has; all go by the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm_dwdp.errors import ExchangeError
from vmm_dwdp.group.exchange import Exchange
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.layer import Layer


def order_of(exchange: Exchange, holder: int, layers: Sequence[Layer], deadline: float) -> ExpertOrder:
    """The order by which rank ``holder`` goes. Raises `ExchangeError` if it does not tell."""
    count = 1 + sum(layer.placement.num_experts for layer in layers)
    numbers = exchange.collect_numbers("order", holder, holder, count, deadline)
    try:
        return ExpertOrder.of_numbers(numbers, layers)
    except ValueError as error:
        raise ExchangeError(f"rank {holder} does not tell where experts are: {error}") from error


def latest_order(exchange: Exchange, own: ExpertOrder, layers: Sequence[Layer], deadline: float) -> ExpertOrder:
    """In an attempt to which every rank has offered its version: the order of all from now on."""
    offers = exchange.offers()
    for rank, offer in enumerate(offers):
        if not offer.isdecimal():
            raise ExchangeError(f"rank {rank} does not tell where experts are, but {offer!r}")
    versions = list(map(int, offers))
    latest = max(versions)
    return own if own.version == latest else order_of(exchange, versions.index(latest), layers, deadline)

"""The door that a rank gets by what its user states as the rendezvous."""

from __future__ import annotations

import os

import torch.distributed as dist

from vmm_dwdp.group.addresses import TCPRendezvous, meet
from vmm_dwdp.group.door import Door
from vmm_dwdp.group.rendezvous import Rendezvous
from vmm_dwdp.group.tcp_door import TCPDoor
from vmm_dwdp.group.unix_door import UnixDoor

Where = str | os.PathLike[str] | dist.ProcessGroup | TCPRendezvous


def open_door(where: Where, rank: int, group_size: int) -> Door:
    """The door of rank ``rank`` of so many; `Door.leave` undoes it.

    Raises:
        ConfigError: ``where`` does not go together with the group.
        ExchangeError: it cannot be used.
    """
    if isinstance(where, TCPRendezvous):
        return TCPDoor(meet(where, rank, group_size), rank)
    return UnixDoor(Rendezvous(where))

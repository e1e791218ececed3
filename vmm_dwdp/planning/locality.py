"""What routing says about caches and owners: how soon experts come back, and how evenly their owners are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.placement import ExpertPlacement
from vmm_dwdp.planning.routing import Used

Owners = npt.NDArray[np.int64]  # by layer and expert, [layers, experts]: the rank that owns it


def reuse_distances(used: Used) -> npt.NDArray[np.int64]:
    """For every use but an expert's first in its lane, steps since the use before: 1 if it was used in the last step.

    Args:
        used: bool ``[steps, lanes, experts]``.
    """
    last = np.full(used.shape[1:], -1)
    found = []
    for step, now in enumerate(used):
        again = now & (last >= 0)
        found.append(step - last[again])
        last[now] = step
    return np.concatenate(found)


def in_order(layers: int, experts: int, ranks: int) -> Owners:
    """Owners of runs of experts, as a group of so many ranks places them by default."""
    placement = ExpertPlacement(num_experts=experts, config=DWDPConfig(group_size=ranks))
    return np.tile([placement.locate(expert)[0][0] for expert in range(experts)], (layers, 1))


def dealt_by_load(load: npt.NDArray[Any], ranks: int) -> Owners:
    """Experts dealt out so that owners are asked alike: by falling load, each to the owner with least so far and room.

    Args:
        load: ``[layers, experts]``, how often each was used.
    """
    layers, experts = load.shape
    room = np.bincount(in_order(1, experts, ranks)[0], minlength=ranks)
    owners = np.empty((layers, experts), np.int64)
    for layer in range(layers):
        left, total = room.copy(), np.zeros(ranks)
        for expert in np.argsort(-load[layer], kind="stable"):
            owner = int(np.where(left > 0, total, np.inf).argmin())
            owners[layer, expert] = owner
            left[owner] -= 1
            total[owner] += load[layer, expert]
    return owners


def asked(by_rank: Sequence[Used], owners: Owners) -> npt.NDArray[np.int64]:
    """Experts that each owner's link gives, ``[steps, layers, ranks]``, where every rank reads what it uses in place.

    Args:
        by_rank: for each rank what it uses, bool ``[steps, layers, experts]``; its own experts cross no link.
    """
    ranks = len(by_rank)
    owned = np.eye(ranks, dtype=np.int64)[owners]  # [layers, experts, ranks]
    given = np.zeros((*by_rank[0].shape[:2], ranks), np.int64)
    for rank, used in enumerate(by_rank):
        pulled = np.einsum("sle,ler->slr", used.astype(np.int64), owned)
        pulled[..., rank] = 0
        given += pulled
    return given


def busiest(given: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The busiest owner's share over the mean, along the last axis; 1 where nothing is asked of anybody."""
    mean = given.mean(-1)
    ratio: npt.NDArray[np.float64] = np.divide(given.max(-1), mean, out=np.ones_like(mean), where=mean > 0)
    return ratio

"""How many experts each rank holds where memory was stated instead: found once SGLang has constructed all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.group.settle import least_of
from vmm_dwdp.integrations.sglang.settings import Stated
from vmm_dwdp.layout.auto import AutoExperts
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.needs import MemoryNeeded, memory_needed
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.memory.room import as_many_as_fit, free_bytes


def settled(
    stated: Stated,
    layers: Mapping[int, Mapping[str, WeightSpec]],
    rank: int,
    page_nbytes: int,
    device: torch.device,
    static_fraction: float,
    group: dist.ProcessGroup,
) -> DWDPConfig:
    """The config of the group, with numbers. Collective; equal on all ranks.

    Args:
        layers: what is to be spread of each, by its number; all have as many experts.
        static_fraction: of a GPU's memory that SGLang gives to weights and the KV cache.
        group: the ranks, for host memory.

    Raises:
        ConfigError: what each rank has to hold does not fit on one; that one says what would.
    """
    config = stated.config
    if stated.kv_cache is not None:
        free, total = memory_of(device, config.group_size)
        config = replace(config, memory_bytes=beside(stated.kv_cache, free, total, static_fraction))
    counts = tuple(next(iter(weights.values())).num_experts for weights in layers.values())

    def needed(by: DWDPConfig) -> MemoryNeeded:
        described = [describe_layer(number, weights, by, rank, page_nbytes) for number, weights in layers.items()]
        return memory_needed(described, by, rank)

    auto = AutoExperts(config, counts, stated.spills)
    offer = as_many_as_fit(auto, rank, needed, device)
    offers: list[int | None] = [None] * config.group_size
    with torch.device("cpu"):
        dist.all_gather_object(offers, offer if isinstance(offer, int) else None, group=group)
    if isinstance(offer, ConfigError):
        raise offer
    return auto.settled(least_of(offers))


def beside(kv_cache: int, free: int, total: int, static_fraction: float) -> int:
    """Bytes that experts may take of ``free``: without what SGLang keeps for activations, and the KV cache."""
    return max(1, free - kv_cache - round(total * (1 - static_fraction)))


def memory_of(device: torch.device, group_size: int) -> tuple[int, int]:
    """Bytes that are free and that there are, on a rank's GPU; of the host's memory, which ranks share, its part."""
    free = free_bytes(device)
    if device.type == "cuda":
        return free, int(torch.cuda.mem_get_info(device)[1])
    return free // group_size, free // group_size

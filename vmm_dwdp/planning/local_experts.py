"""What more experts a rank cost and save, and how many fit, by the runtime's own layouts."""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.auto import AutoExperts, Room, with_local_experts
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.needs import MemoryNeeded, memory_needed
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.memory import CONTEXT
from vmm_dwdp.planning.models import ModelSpec

_MOST_ROWS: Final = 9


class LocalExperts(NamedTuple):
    """A group whose ranks hold so many experts of every layer. Bytes are those of the rank that has most.

    Attributes:
        number: experts that each rank holds.
        experts_bytes: shards and slots.
        left_bytes: for the KV cache.
        fetched_bytes: what a rank copies for a layer.
        copying_s: seconds of that while the others copy, too.
        pass_s: seconds of a forward pass.
    """

    number: int
    experts_bytes: int
    left_bytes: int
    fetched_bytes: int
    copying_s: float
    pass_s: float


def settled(model: ModelSpec, gpu: GpuSpec, config: DWDPConfig) -> DWDPConfig:
    """``config`` with the number for which its ``"auto"`` stands, on GPUs that have loaded all else of the model.

    Raises `ConfigError` if an equal share does not fit.
    """
    if config.num_local_experts != "auto":
        return config
    auto = AutoExperts(config, (model.num_experts,))
    free = int(gpu.memory_bytes) - model.replicated_bytes - CONTEXT
    limit = free if config.memory_bytes is None else min(config.memory_bytes, free)
    wanted = free // 2 if config.memory_bytes is None else limit
    number = auto.most_that_fit(lambda config: needed(model, gpu, config), Room(wanted, limit))
    if number is None:
        takes, gib = needed(model, gpu, auto.settled(auto.numbers[0])).on_device, 1 << 30
        raise ConfigError(
            f"an equal share of the experts of {model.name} takes {takes / gib:.1f} GiB of each {gpu.name} in a group "
            f"of {config.group_size}, and experts may take {max(0, limit) / gib:.1f} GiB"
        )
    return auto.settled(number)


def needed(model: ModelSpec, gpu: GpuSpec, config: DWDPConfig) -> MemoryNeeded:
    """By the rank that needs most of its GPU. All layers are alike, so one is laid out."""
    layers = len(model.moe_layers)
    ranks = [
        memory_needed([describe_layer(0, model.expert_weights, config, rank, gpu.granularity)], config, rank)
        for rank in range(config.group_size)
    ]
    slots = min(config.prefetch_depth, layers)
    every = [MemoryNeeded(layers * one.resident, slots * one.staged, layers * one.host) for one in ranks]
    return max(every, key=lambda rank: rank.on_device)


def more_experts(estimate: Estimate) -> list[LocalExperts]:
    """From an equal share to as many as fit: some numbers, evenly spread, that of ``estimate`` among them."""
    model, gpu, config = estimate.share, estimate.gpu, estimate.config
    equal = with_local_experts(config, None)
    auto = AutoExperts(dataclasses.replace(equal, num_local_experts="auto"), (model.num_experts,))
    room = estimate.memory.left + needed(model, gpu, config).on_device
    most = auto.most_that_fit(lambda config: needed(model, gpu, config), Room(room, room))
    if most is None:
        return []
    numbers = range(auto.numbers[0], most + 1)
    chosen = {numbers[row * (len(numbers) - 1) // (_MOST_ROWS - 1)] for row in range(_MOST_ROWS)}
    if isinstance(config.num_local_experts, int):
        chosen.add(config.num_local_experts)
    return [_row(estimate, number, room, auto.settled(number)) for number in sorted(chosen)]


def _row(estimate: Estimate, number: int, room: int, config: DWDPConfig) -> LocalExperts:
    takes = needed(estimate.share, estimate.gpu, config).on_device
    other = dataclasses.replace(estimate, config=config)
    seconds = other.copying_seconds, other.dwdp_seconds
    return LocalExperts(number, takes, room - takes, other.plan.fetched_bytes, *seconds)

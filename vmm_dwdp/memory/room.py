"""What a rank says where there is no room for its experts: what it needs, what is free, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DriverError
from vmm_dwdp.layout.auto import AutoExperts, Room
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.needs import MemoryNeeded, Needed, in_gb, what_fits
from vmm_dwdp.memory.assembly import Assembly


def free_bytes(device: torch.device) -> int:
    """What can be taken of a GPU's memory, with what torch kept of it for later, which is given back; or of the host's
    without that anything is swapped out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def room_for_experts(config: DWDPConfig, device: torch.device) -> Room:
    """What a rank's experts may take with ``num_local_experts="auto"``: see `DWDPConfig.memory_bytes`."""
    free = free_bytes(device)
    if config.memory_bytes is not None:
        most = min(config.memory_bytes, free)
        return Room(wanted=most, limit=most)
    sharing = 1 if device.type == "cuda" else config.group_size
    return Room(wanted=free // sharing // 2, limit=free)


def as_many_as_fit(auto: AutoExperts, rank: int, needed: Needed, device: torch.device) -> int | ConfigError:
    """How many experts this rank has room for, or in words why not even for an equal share."""
    room = room_for_experts(auto.config, device)
    number = auto.most_that_fit(needed, room)
    if number is not None:
        return number
    equal = auto.settled(auto.numbers[0])
    limit = room.limit - equal.kept_on_device
    sentence = says_what_it_needs(rank, needed(equal), free_bytes(device), device, creates_pool=False)
    kept = "expert bank" if equal.expert_bank else "resident cache"
    cache = f", {in_gb(equal.kept_on_device)} of it in the {kept}" * bool(equal.kept_on_device)
    return ConfigError(
        f"{sentence}, of which experts may take {in_gb(room.limit)}{cache}: "
        f"{what_fits(equal, needed, limit, min(auto.counts))}"
    )


def says_what_it_needs(rank: int, needed: MemoryNeeded, free: int, device: torch.device, *, creates_pool: bool) -> str:
    """The sentence with which memory is announced before it is taken, and missed where there is too little."""
    free_on_host = free_bytes(torch.device("cpu"))
    pool = f", and {in_gb(needed.host)} of {in_gb(free_on_host)} of host memory" if creates_pool else ""
    return (
        f"rank {rank} needs {in_gb(needed.on_device)} for experts ({in_gb(needed.resident)} of its own, "
        f"{in_gb(needed.staged)} in slots), and {in_gb(free)} are free on {device}{pool}"
    )


@contextmanager
def told_of_room(
    assembly: Assembly,
    layers: Sequence[Layer],
    device: torch.device,
    settled: Callable[[], DWDPConfig],
    needed: Needed,
) -> Iterator[None]:
    """The body takes memory of ``assembly``: where there is too little, the error says how much, and what would fit.

    Args:
        settled: gives the config, which may be complete only once the body runs.

    Raises `DriverError` as the body raised it, or one that says more.
    """
    try:
        yield
    except DriverError as error:
        if not error.is_for_want_of_memory or not layers:
            raise
        config = settled()
        wanted, creates_pool = needed(config), assembly.pool_nbytes > 0
        taken = assembly.resident_nbytes - assembly.pool_nbytes + assembly.staged_nbytes
        # Of a shard that did not fit, what was taken is neither counted nor free: that is less than a shard.
        free = taken + free_bytes(device)
        sentence = says_what_it_needs(assembly.rank, wanted, free, device, creates_pool=creates_pool)
        if creates_pool and wanted.host > assembly.pool_nbytes + free_bytes(torch.device("cpu")):
            fits = "fewer host_experts would fit"
        else:
            num_experts = min(layer.placement.num_experts for layer in layers)
            fits = what_fits(config, needed, min(free, wanted.on_device - 1), num_experts)
        raise DriverError(error.call, error.code, f"{error.attempt}: {sentence}: {fits}") from error

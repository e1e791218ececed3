"""What a rank says while it loads: the memory that it needs before it takes it, how far it is, and what would fit."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DriverError
from vmm_dwdp.layout.needs import MemoryNeeded
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.runtime import DWDPRuntime

_log = logging.getLogger("vmm_dwdp")

_FULL: Final = ("CUDA_ERROR_OUT_OF_MEMORY", "ENOMEM", "ENOSPC")  # what drivers say where there is no room
_GB: Final = 1e9

Read = Callable[[int], Tensor]


@contextmanager
def taking_memory(runtime: DWDPRuntime, num_experts: int) -> Iterator[None]:
    """Say what the rank needs and what is free; then the body takes it, and publishes.

    Args:
        runtime: with all layers added.
        num_experts: of the layer that has fewest.

    Raises:
        ConfigError: a GPU has less; the sentence says what would fit. No memory was taken.
        DriverError: as the body raised it; where memory ran out, with a note that says what would fit.
    """
    needed, free, free_on_host = runtime.memory_needed(), free_bytes(runtime.device), free_bytes(torch.device("cpu"))
    creates_pool = len(runtime.held_owners) > 1
    pool = f", and {_gb(needed.host)} of {_gb(free_on_host)} of host memory" if creates_pool else ""
    sentence = f"rank {runtime.rank} needs {_gb(needed.on_device)} for experts ({_gb(needed.resident)} of its own, "
    sentence += f"{_gb(needed.staged)} in slots), and {_gb(free)} are free on {runtime.device}"
    _log.info("%s%s", sentence, pool)
    if runtime.device.type == "cuda" and needed.on_device > free:  # what is free on a host is a guess
        raise ConfigError(f"{sentence}: {what_fits(runtime, free, num_experts)}")
    try:
        yield
    except DriverError as error:
        if error.code in _FULL:
            instead = what_fits(runtime, min(free, needed.on_device - 1), num_experts)
            error.add_note(f"{sentence}: {instead}")
        raise


@contextmanager
def told_of_reading(
    runtime: DWDPRuntime, layers: Sequence[Mapping[str, WeightSpec]]
) -> Iterator[Callable[[Read], Read]]:
    """A bar of transformers' own kind, with bytes and time, for what goes through the readers that the body wraps."""
    numbers = [(number, owner) for number in range(len(layers)) for owner in runtime.held_owners]
    held = [(layers[number], len(runtime.local_experts(number, owner))) for number, owner in numbers]
    total = sum(count * spec.expert_nbytes for weights, count in held for spec in weights.values())
    began = time.monotonic()
    title = f"rank {runtime.rank}: reading experts"
    with transformers_logging.tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:

        def told(read: Read) -> Read:
            def reading(expert: int) -> Tensor:
                tensor = read(expert)
                bar.update(tensor.nbytes)
                return tensor

            return reading

        yield told
    _log.info("rank %d: %s of experts read in %.1f s", runtime.rank, _gb(total), time.monotonic() - began)


def free_bytes(device: torch.device) -> int:
    """What can be taken of a GPU's memory, or of the host's without that anything is swapped out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def what_fits(runtime: DWDPRuntime, free: int, num_experts: int) -> str:
    """Which change of the config would make this rank's experts fit into ``free`` bytes of its device, in words."""
    fitting = [
        f"{words} (needs {_gb(needed.on_device)})"
        for words, needed in _alternatives(runtime, free, num_experts)
        if needed.on_device <= free
    ]
    return " or ".join(fitting) + " would fit" if fitting else "no config of a group of this size fits"


def _alternatives(runtime: DWDPRuntime, free: int, num_experts: int) -> Iterator[tuple[str, MemoryNeeded]]:
    """Configs that may need less, from those that cost least speed on, in words, and what they need."""
    config = runtime.config
    fewer_slots = dataclasses.replace(config, prefetch_depth=min(config.prefetch_depth, 1))
    least = dataclasses.replace(config, num_local_experts=None)
    if fewer_slots != config:
        yield "prefetch_depth: 1", runtime.memory_needed(fewer_slots)
    if least != config:
        yield "no num_local_experts", runtime.memory_needed(least)
    if config.assembly == "vmm":  # which can have host memory
        yield _with_host_memory(runtime, least, free, num_experts)
        words, needed = _with_host_memory(
            runtime, dataclasses.replace(fewer_slots, num_local_experts=None), free, num_experts
        )
        if fewer_slots != config:
            yield f"{words} with prefetch_depth: 1", needed


def _with_host_memory(
    runtime: DWDPRuntime, config: DWDPConfig, free: int, num_experts: int
) -> tuple[str, MemoryNeeded]:
    """As few experts in host memory as are enough, found by halving; all of them where they are not."""

    def needed(host_experts: int) -> MemoryNeeded:
        return runtime.memory_needed(dataclasses.replace(config, host_experts=host_experts))

    few, many = config.host_experts, num_experts
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if needed(middle).on_device <= free else (middle, many)
    return f"host_experts: {many}", needed(many)


def _gb(nbytes: int) -> str:
    return f"{nbytes / _GB:.2f} GB"

"""What a rank says while it loads: the memory that it needs before it takes it, and how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers.utils import logging as transformers_logging

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.needs import in_gb, what_fits
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.memory.room import free_bytes, says_what_it_needs
from vmm_dwdp.runtime import DWDPRuntime

_log = logging.getLogger("vmm_dwdp")

Read = Callable[[int], Tensor]


def announce_memory(runtime: DWDPRuntime, num_experts: int) -> None:
    """Say what the rank needs and what is free, before it takes it.

    Args:
        runtime: with all layers added.
        num_experts: of the layer that has fewest.

    Raises `ConfigError` if a GPU has less; the sentence says what would fit.
    """
    needed, free = runtime.memory_needed(), free_bytes(runtime.device)
    creates_pool = len(runtime.held_owners) > 1
    sentence = says_what_it_needs(runtime.rank, needed, free, runtime.device, creates_pool=creates_pool)
    _log.info("%s", sentence)
    if runtime.device.type == "cuda" and needed.on_device > free:  # what is free on a host is a guess
        raise ConfigError(f"{sentence}: {what_fits(runtime.config, runtime.memory_needed, free, num_experts)}")


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
    _log.info("rank %d: %s of experts read in %.1f s", runtime.rank, in_gb(total), time.monotonic() - began)

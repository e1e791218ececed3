"""How fast this machine copies from host memory, and how fast a grouped GEMM reads there in place."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.placement import HOST
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.runtime import DWDPRuntime

SHAPE: Final = (16, 2048, 2048)  # experts, N, K, in bf16: 128 MiB, more than what a GPU caches
REPEATS: Final = 5


@dataclass(frozen=True)
class LinkRates:
    """Bytes a second out of host memory.

    Attributes:
        copies: of a copy of all experts of a weight.
        in_place: of torch's grouped GEMM with a token for each expert.
    """

    copies: float
    in_place: float


def measure_link(device: torch.device) -> LinkRates:
    """Measure on ``device``, in less than a second; on the CPU, where there is no link, the host driver's memory.

    Takes 128 MiB of host memory and of the device's, and gives them back.

    Raises:
        DriverError: memory could not be had.
    """
    experts, *_ = SHAPE
    config = DWDPConfig(group_size=1, host_experts=experts, mode="in_place", prefetch_depth=0)
    with tempfile.TemporaryDirectory() as folder, DWDPRuntime(config, 0, device, Path(folder) / "group") as runtime:
        runtime.add_layer(0, {"w": WeightSpec(SHAPE, torch.bfloat16)})
        runtime.local_shard(0, "w", HOST).zero_()
        runtime.publish()
        return _measure(runtime)


def _measure(runtime: DWDPRuntime) -> LinkRates:
    weight = runtime.acquire(0)["w"]
    assert isinstance(weight, torch.Tensor)
    experts, _, k = weight.shape
    copied = torch.empty_like(weight)
    x = torch.zeros(experts, k, dtype=weight.dtype, device=weight.device)
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=weight.device)

    def seconds(work: Callable[[], object]) -> float:
        work()
        return statistics.median(_elapsed(work, runtime.device) for _ in range(REPEATS))

    copying = seconds(lambda: copied.copy_(weight))
    reading = seconds(lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends))
    return LinkRates(weight.nbytes / copying, weight.nbytes / reading)


def _elapsed(work: Callable[[], object], device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start

"""What a pass takes, for `versus_offloaders.py`: time, the launching thread, and memory of the GPU and of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float, int, Any]:
    """Milliseconds of ``run``, and of the launching thread's CPU time; bytes of the GPU's memory that it takes beyond
    what is taken, at the most; and what it gives."""
    before = allocated(device)
    if device.type == "cpu":
        begin, cpu = time.perf_counter(), time.thread_time()
        y = run()
        return (time.perf_counter() - begin) * 1e3, (time.thread_time() - cpu) * 1e3, 0, y
    torch.cuda.reset_peak_memory_stats(device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    cpu = time.thread_time()
    y = run()
    cpu = time.thread_time() - cpu
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), cpu * 1e3, torch.cuda.max_memory_allocated(device) - before, y


def allocated(device: torch.device) -> int:
    """Bytes of the GPU's memory that torch has given; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_host_bytes() -> int:
    """What Linux says could be had; what torch keeps of pinned memory is given back before."""
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/meminfo states no MemAvailable")

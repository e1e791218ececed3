"""The tables of `multi_gpu.py` about what runs beside the copies of all ranks, and about ranks that stop meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from crossovers import Row
from moe_stack import Stack, dwdp
from rank_copies import LAYERS, alone_and_beside, copy_pass, fetched_nbytes, moved
from ranks import Place, Together, collectives, steady

from vmm_dwdp import DWDPConfig
from vmm_dwdp.testing import run_group

ISSUING: Final = "vmm-dwdp-issue"  # the thread that gives copies to the driver
KERNELS: Final = 60  # launched one after another, as a layer's are
BURSTS: Final = 200
REDUCED_NBYTES: Final = 64 << 20
REDUCTIONS: Final = 20  # that are timed together
ENDS: Final = {"goes on": None, "is stopped": signal.SIGSTOP, "is killed": signal.SIGKILL}
NONE_ANSWERS: Final = 300.0  # seconds after which ranks that measure are given up


def beside(place: Place, stack: Stack, count: int) -> list[Row]:
    """By rank: kernel launches and all-reduces alone, beside copies, and alone again, and what of a core the thread
    takes that issues the copies."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_group(partial(_beside_rank, place, stack, count, folder), count, place.device_type)
    return [row for rows in found for row in rows]


def _beside_rank(place: Place, stack: Stack, group_size: int, folder: str, rank: int) -> list[Row]:
    device = place.device(rank)
    config = DWDPConfig(group_size=group_size)
    rows: list[Row] = []
    with (
        collectives(rank, group_size, place, folder),
        dwdp(stack, config, rank, device, Path(folder, "beside"), driver=place.driver(rank)) as (runtime, _),
    ):
        reduced = torch.ones(REDUCED_NBYTES >> (12 if place.tiny else 0), dtype=torch.uint8, device=device)
        small = torch.zeros(16, device=device)
        measures: dict[str, Callable[[], float]] = {
            "microseconds of a kernel launch": partial(_launch, place, small),
            "ms of an all-reduce": partial(_all_reduce, place, reduced),
        }
        for what, measure in measures.items():
            times: dict[str, list[float]] = {"alone": [], "beside copies": []}
            for way in alone_and_beside(place, runtime, stack, device):
                before, begun = _cpu_seconds(ISSUING), time.monotonic()
                times[way].append(measure())
                if way == "beside copies":
                    share = (_cpu_seconds(ISSUING) - before) / (time.monotonic() - begun)
            alone, with_copies = (statistics.mean(times[way]) for way in times)
            row = {"what": what, "rank": rank, "alone": alone, "beside copies": with_copies}
            rows.append(row | {"beside / alone": with_copies / alone, "of a core, the issuing thread": share})
    return rows


def _launch(place: Place, small: torch.Tensor) -> float:
    """The median of bursts, after each of which the device is waited for."""
    found = []
    for _ in range(2 if place.tiny else BURSTS):
        begin = time.perf_counter()
        for _ in range(KERNELS):
            small.add_(1)
        found.append((time.perf_counter() - begin) / KERNELS)
        place.mark().reach()
    return statistics.median(found) * 1e6


def _all_reduce(place: Place, reduced: torch.Tensor) -> float:
    def run() -> None:
        for _ in range(REDUCTIONS):
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)

    return steady(place, run, passes=4) / REDUCTIONS * 1e3


def _cpu_seconds(name: str) -> float:
    """That this process's threads of this name have used."""
    ticks = 0
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text().strip() == name:
            # The name stands in brackets, and may have any character; user and system time are 12 fields after it.
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def without_one(place: Place, stack: Stack, count: int, link: float | None) -> list[Row]:
    """By rank: copies while the last rank pulls too, is stopped in the middle of a layer, or is killed there.

    Args:
        link: GB/s of one large copy between two GPUs, where there are two.
    """
    rows = [row for end in ENDS for row in _without_one(place, stack, count, end)]
    return rows if link is None else [row | {"of the link": row["GB/s"] / link} for row in rows]


def _without_one(place: Place, stack: Stack, count: int, end: str) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    rows: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        run = partial(_without_one_rank, place, stack, count, end, folder, rows)
        ranks = [context.Process(target=run, args=(rank,)) for rank in range(count)]
        try:
            for rank in ranks:
                rank.start()
            found = [rows.get(timeout=NONE_ANSWERS) for _ in range(count - 1)]
            for rank in ranks[:-1]:
                rank.join()
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
    return sorted(found, key=lambda row: row["rank"])


def _without_one_rank(place: Place, stack: Stack, group_size: int, end: str, folder: str, rows: Any, rank: int) -> None:
    device, others = place.device(rank), group_size - 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    passes = 4 if place.tiny else -(-LAYERS // stack.num_layers)
    config = DWDPConfig(group_size=group_size)
    ended = Path(folder, "ended")
    with dwdp(stack, config, rank, device, Path(folder, "group"), driver=place.driver(rank)) as (runtime, _):
        one = partial(copy_pass, runtime, stack)
        everybody = Together(Path(folder, "everybody"), rank, group_size)
        one()
        everybody.say("begun")
        while not everybody.is_said_by_all("begun"):
            one()
        if rank == others:
            ended.touch()
            if (signal_number := ENDS[end]) is not None:
                runtime.acquire(0)
                runtime.release(0)  # the copies of a layer are under way
                os.kill(os.getpid(), signal_number)
            while True:
                one()
        while not ended.exists():
            one()
        seconds = steady(place, one, passes, Together(Path(folder, "others"), rank, others))
        rate = moved(stack, passes, config.prefetch_depth, fetched_nbytes(runtime, stack)) / (seconds * passes) / 1e9
        rows.put({"the last rank": end, "rank": rank, "GB/s": rate})

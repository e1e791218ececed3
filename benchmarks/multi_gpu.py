"""Several GPUs of one machine, in one command: links, prefetch, and DWDP beside expert and tensor parallelism.

    python benchmarks/multi_gpu.py --gpus 4 --json

    links      peer access, and the rate of one large copy between every pair
    tests      the GPU tests, each rank on its own GPU
    prefetch   copies alone, with 1, 2 and N-1 owners, over a pair's link: with and without slices, one rank or all
               pulling, in step or at random moments
    stack      a stack of MoE layers by DWDP, staged and in place, by expert parallelism (all-to-all) and by tensor
               parallelism (all-reduce), for equal and unequal numbers of tokens, beside what the planner predicts;
               every rank's DWDP results are compared, bit by bit, with a pass whose experts all lie in its own memory
    crossover  from how many tokens on DWDP is no slower, measured and predicted
    slowdown   a grouped GEMM alone and under copies, with the GPU's clock beside it
    predicted  the planner's crossovers alone, for any GPU with a preset; needs none: --only predicted --preset h200

On one GPU, or on the CPU (``--device cpu --tiny``), all of it runs with ranks that share the device: then it proves the
script and the bytes, and its times say nothing about links.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import parser, report
from crossovers import Row, crossovers, spread_tokens
from moe_stack import (
    DTYPE,
    STACKS,
    Bind,
    Pass,
    Stack,
    dwdp,
    expert_parallel,
    reference,
    route,
    run_experts,
    tensor_parallel,
    weights,
)
from stack_prediction import predict

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.testing import run_group

PARTS = ("links", "tests", "prefetch", "stack", "slowdown", "predicted")

# By name, `slice_bytes`: whole segments, the owners one after another; slices in turn; the runtime's default.
PLANS = {"segments in turn": 1 << 40, "slices of 2 MiB": 2 << 20, "auto": "auto"}


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    device_type: str
    tiny: bool

    def device(self, rank: int) -> torch.device:
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    def driver(self, rank: int) -> Any:
        return open_driver(self.device(rank), 4096 if self.device_type == "cpu" else None)

    def wait(self) -> None:
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Pass, passes: int) -> float:
        """Median milliseconds of a pass, by the wall clock, the device idle before and after."""
        run()
        times = []
        for _ in range(passes):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3


def links(count: int) -> list[Row]:
    """Each pair of GPUs, both ways."""
    rows = []
    for source in range(count):
        for target in range(count):
            if source == target:
                continue
            a = torch.empty(1 << 30, dtype=torch.uint8, device=f"cuda:{source}")
            b = torch.empty_like(a, device=f"cuda:{target}")
            elapsed = []
            for _ in range(4):
                torch.cuda.synchronize(target)
                start = time.perf_counter()
                b.copy_(a)
                torch.cuda.synchronize(target)
                elapsed.append(time.perf_counter() - start)
            access = torch.cuda.can_device_access_peer(target, source)
            rows.append({"from": source, "to": target, "access": access, "GB/s": a.numel() / min(elapsed) / 1e9})
    return rows


def gpu_tests() -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not faults", "tests"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    return [{"command": " ".join(command[1:]), "exit status": found.returncode, "last line": _last_line(found.stdout)}]


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


def _join_collectives(rank: int, group_size: int, place: Place, folder: str) -> None:
    dist.init_process_group(
        "nccl" if place.device_type == "cuda" and torch.cuda.device_count() >= group_size else "gloo",
        init_method=f"file://{folder}/collectives",
        rank=rank,
        world_size=group_size,
    )


def _prefetch_rank(
    place: Place, stack: Stack, group_size: int, pair: float | None, folder: str, rank: int
) -> list[Row]:
    """Passes without compute: nothing but copies."""
    _join_collectives(rank, group_size, place, folder)
    device = place.device(rank)
    rows: list[Row] = []
    for plan, slice_bytes in PLANS.items():
        config = DWDPConfig(group_size=group_size, slice_bytes=slice_bytes)  # type: ignore[arg-type]
        rendezvous = Path(folder, f"prefetch-{slice_bytes}")
        with dwdp(stack, config, rank, device, rendezvous, driver=place.driver(rank)) as (runtime, _):

            def copies(runtime: Any = runtime) -> torch.Tensor:
                for layer in range(stack.num_layers):
                    runtime.acquire(layer)
                    runtime.release(layer)
                return torch.empty(0)

            nbytes = stack.layer_nbytes * stack.num_layers * (group_size - 1) / group_size
            for pulling in ("one rank", "all in step", "all at random moments"):
                dist.barrier()
                if pulling == "one rank" and rank:
                    dist.barrier()
                    continue
                if pulling == "all at random moments":
                    time.sleep(random.Random(rank).random() * 0.05)
                rate = nbytes / place.timed(copies, passes=8) / 1e6
                dist.barrier()
                share = {} if pair is None else {"of a pair's link": rate / pair}
                about = {"owners": group_size - 1, "plan": plan, "pulling": pulling, "rank": rank}
                rows.append(about | {"GB/s": rate} | share)
    dist.destroy_process_group()
    return rows


def prefetch(place: Place, stack: Stack, count: int, pair: float | None) -> list[Row]:
    """``pair``: GB/s of one large copy between two GPUs, where that was measured."""
    rows: list[Row] = []
    for group_size in sorted({2, 3, count}):
        if group_size <= count:
            with tempfile.TemporaryDirectory() as folder:
                found = run_group(
                    partial(_prefetch_rank, place, stack, group_size, pair, folder), group_size, place.device_type
                )
            rows += [row for rank_rows in found for row in rank_rows]
    return rows


def _stack_rank(
    place: Place, stack: Stack, group_size: int, cases: list[list[int]], folder: str, rank: int
) -> list[Row]:
    """The three parallelisms, one after another, each with every case: so many tokens on each rank."""
    _join_collectives(rank, group_size, place, folder)
    device = place.device(rank)
    routings = [[route(stack, count, other, device) for other, count in enumerate(case)] for case in cases]
    rows: list[Row] = [{"rank": rank, "tokens": case[rank]} for case in cases]

    def measure(column: str, bind: Bind) -> Iterator[torch.Tensor]:
        """Results, by case, of passes that begin together."""
        for row, every in zip(rows, routings, strict=True):
            run = bind(every)
            dist.barrier()
            row[column] = place.timed(run, passes=5)
            dist.barrier()
            yield run()

    config = DWDPConfig(group_size=group_size, mode="in_place")
    with dwdp(stack, config, rank, device, Path(folder, "dwdp"), driver=place.driver(rank)) as (_, run):
        staged = list(measure("dwdp staged ms", run("staged")))
        in_place = list(measure("dwdp in_place ms", run("in_place")))
    whole = reference(stack, device, [every[rank] for every in routings])
    for row, *results in zip(rows, whole, staged, in_place, strict=True):
        row["identical"] = all(torch.equal(found, results[0]) for found in results[1:])
    del staged, in_place
    for name, parallel in (("expert", expert_parallel), ("tensor", tensor_parallel)):
        bind = parallel(stack, rank, group_size, device)
        for row, found, expected in zip(rows, measure(f"{name} parallel ms", bind), whole, strict=True):
            row[f"{name} parallel error"] = _error(found, expected)
        del bind
    dist.destroy_process_group()
    return rows


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def predictions(stack: Stack, count: int, per_rank: list[int], preset: str) -> list[Row]:
    return [
        {"stack": stack.name, "mean tokens": tokens, "spread": spread, **row}
        for (tokens, spread), shares in spread_tokens(count, per_rank).items()
        for row in predict(stack, load_gpu(preset), shares)
    ]


def stacks(place: Place, stack: Stack, count: int, per_rank: list[int], preset: str | None) -> list[Row]:
    """``preset``: the GPU for which the planner's predictions stand beside what was measured."""
    spreads = spread_tokens(count, per_rank)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(_stack_rank, place, stack, count, list(spreads.values()), folder)
        found = run_group(run, count, place.device_type)
    rows: list[Row] = []
    for case, ((tokens, spread), shares) in enumerate(spreads.items()):
        predicted = predict(stack, load_gpu(preset), shares) if preset else [{} for _ in shares]
        about = {"stack": stack.name, "mean tokens": tokens, "spread": spread}
        rows += [about | of_rank[case] | ours for of_rank, ours in zip(found, predicted, strict=True)]
    return rows


def _slowdown_rank(place: Place, stack: Stack, group_size: int, folder: str, rank: int) -> Row:
    """A grouped GEMM on this rank's own memory, alone and while its runtime copies without end."""
    _join_collectives(rank, group_size, place, folder)
    device = place.device(rank)
    routed = route(stack, 4096 if not place.tiny else 64, rank, device)
    own = [weights(stack, 0, expert, device) for expert in range(min(stack.num_experts, 16))]
    w13, w2 = (torch.stack(parts) for parts in zip(*own, strict=True))
    counts = torch.full((len(own),), len(routed.order) // len(own), device=device)
    rows = torch.randn(int(counts.sum()), stack.hidden, dtype=DTYPE, device=device)
    config = DWDPConfig(group_size=group_size)
    with dwdp(stack, config, rank, device, Path(folder, "slowdown"), driver=place.driver(rank)) as (runtime, _):
        compute: Callable[[], torch.Tensor] = lambda: run_experts(rows, counts, w13, w2)  # noqa: E731

        def beside_copies() -> torch.Tensor:
            for layer in range(stack.num_layers):
                runtime.acquire(layer)
                runtime.release(layer)
            return compute()

        place.wait()
        alone, clock_alone = place.timed(compute, passes=20), _clock(place, device, compute)
        dist.barrier()
        both, clock_both = place.timed(beside_copies, passes=20), _clock(place, device, beside_copies)
        dist.barrier()
    dist.destroy_process_group()
    return {"rank": rank, "alone ms": alone, "with copies ms": both, "MHz alone": clock_alone, "MHz copies": clock_both}


def _clock(place: Place, device: torch.device, run: Pass) -> int:
    """MHz of the GPU while ``run`` is repeated; 0 without one."""
    if device.type != "cuda":
        return 0
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as asked:
        while asked.poll() is None:
            run()
            place.wait()
        return int(asked.stdout.read())  # type: ignore[union-attr]


def slowdown(place: Place, stack: Stack, count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return run_group(partial(_slowdown_rank, place, stack, count, folder), count, place.device_type)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gpus", type=int, default=0, help="ranks (default: the GPUs of this machine)")
    options.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs")
    options.add_argument("--preset", help="GPU that the planner's predictions are for (default: by the GPU's name)")
    options.add_argument("--only", nargs="*", choices=PARTS, default=None)
    given: argparse.Namespace = options.parse_args()
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
    place = Place(given.device.type, given.tiny)
    present = torch.cuda.device_count() if place.device_type == "cuda" else 0
    count = given.gpus or max(2, present)
    wanted = given.only or (["links", "tests"] if present > 1 else []) + ["prefetch", "stack", "slowdown"]
    chosen = [STACKS["tiny"]] if given.tiny else [STACKS["deepseek-r1"], STACKS["gpt-oss-120b"]]
    per_rank = [32] if given.tiny else [4096, 8192, 16384, 32768]
    preset = given.preset or (preset_of(torch.cuda.get_device_name()) if present else None)
    tables: dict[str, list[Row]] = {}
    pair = None
    if "links" in wanted:
        if present < 2:
            raise SystemExit("there are no links: this machine does not have two GPUs")
        tables["links"] = links(present)
        pair = min(row["GB/s"] for row in tables["links"])
    if "tests" in wanted:
        tables["tests"] = gpu_tests()
    if "prefetch" in wanted:
        tables["prefetch"] = prefetch(place, chosen[0], count, pair)
    if "stack" in wanted:
        tables["stack"] = [row for stack in chosen for row in stacks(place, stack, count, per_rank, preset)]
        tables["crossover"] = crossovers(tables["stack"])
    if "slowdown" in wanted:
        tables["slowdown"] = slowdown(place, chosen[0], count)
    if "predicted" in wanted and preset:
        rows = [row for stack in chosen for row in predictions(stack, count, per_rank, preset)]
        tables["predicted"] = crossovers(rows)
    report(given, tables)
    if any(not row["identical"] for row in tables.get("stack", ())):
        raise SystemExit("a rank's result differs from the pass with all experts in its own memory")


if __name__ == "__main__":
    main()

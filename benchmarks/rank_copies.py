"""The tables of `multi_gpu.py` that are about copies: how fast they are, and what products beside them lose."""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from crossovers import Row
from moe_stack import DTYPE, Stack, dwdp
from ranks import Place, Together, begin_at_random, clock_while, collectives, steady

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.testing import run_group

# By name, `slice_bytes`: whole segments, the owners one after another; slices in turn; a stream for each owner; and the
# runtime's default, which chooses the owner of each run where there are two owners or more.
PLANS = {"segments in turn": 1 << 40, "slices of 2 MiB": 2 << 20, "streams": "streams", "auto": "auto"}
LAYERS = 100  # read while the clock runs, at least, so that the first and the last few do not count
APART = 0.1  # seconds within which ranks begin at random moments
EXPERTS = 32  # of the grouped product
PRODUCTS = 20  # that are timed together


def prefetch(
    place: Place, stack: Stack, count: int, link: float | None, plans: Sequence[str]
) -> tuple[list[Row], list[Row]]:
    """Copies alone, in groups of 2, 3 and ``count`` ranks: by rank, and the mean and the worst of each case.

    Args:
        link: GB/s of one large copy between two GPUs, where there are two.
        plans: of `PLANS`.
    """
    rows: list[Row] = []
    for group_size in sorted({2, 3, count}):
        if group_size <= count:
            with tempfile.TemporaryDirectory() as folder:
                run = partial(_prefetch_rank, place, stack, group_size, plans, folder)
                rows += [row for found in run_group(run, group_size, place.device_type) for row in found]
    if link is not None:
        rows = [row | {"of the link": row["GB/s"] / link} for row in rows]
    return rows, of_ranks(rows, ("owners", "plan", "pulling"))


def _cases(group_size: int) -> dict[str, int]:
    """Who pulls, and how many that are: the first of the group."""
    few = {"one rank": 1} | ({"all but one at random moments": group_size - 1} if group_size > 2 else {})
    return few | {"all in step": group_size, "all at random moments": group_size}


def of_ranks(rows: Sequence[Row], case: Sequence[str]) -> list[Row]:
    """For each case, the mean and the worst of its ranks, of every figure that is the better the more it is."""
    cases = dict.fromkeys(tuple(row[name] for name in case) for row in rows)
    found = []
    for wanted in cases:
        same = [row for row in rows if tuple(row[name] for name in case) == wanted]
        row = dict(zip(case, wanted, strict=True)) | {"ranks": len(same)}
        for figure in ("GB/s", "of the link"):
            if figure in same[0]:
                values = [row[figure] for row in same]
                row |= {f"{figure}, mean": statistics.mean(values), f"{figure}, worst": min(values)}
        found.append(row)
    return found


def moved(stack: Stack, passes: int, depth: int, fetched: int) -> int:
    """Bytes that certainly moved in ``passes`` passes: of all layers but those that slots may have held before."""
    return max(0, passes * stack.num_layers - min(depth, stack.num_layers)) * fetched


def _prefetch_rank(
    place: Place, stack: Stack, group_size: int, plans: Sequence[str], folder: str, rank: int
) -> list[Row]:
    rows: list[Row] = []
    passes = 4 if place.tiny else -(-LAYERS // stack.num_layers)
    with collectives(rank, group_size, place, folder):
        for plan in plans:
            slice_bytes = PLANS[plan]
            config = DWDPConfig(group_size=group_size, slice_bytes=slice_bytes)  # type: ignore[arg-type]
            rendezvous = Path(folder, f"prefetch-{slice_bytes}")
            with dwdp(stack, config, rank, place.device(rank), rendezvous, driver=place.driver(rank)) as (runtime, _):
                fetched = fetched_nbytes(runtime, stack)
                for pulling, pullers in _cases(group_size).items():
                    dist.barrier()
                    if rank < pullers:
                        together = Together(Path(folder, f"{slice_bytes} {pulling}"), rank, pullers)
                        if pulling.endswith("at random moments"):
                            begin_at_random(rank, APART)
                        seconds = steady(place, partial(copy_pass, runtime, stack), passes, together)
                        rate = moved(stack, passes, config.prefetch_depth, fetched) / (seconds * passes) / 1e9
                        about = {"owners": group_size - 1, "plan": plan, "pulling": pulling, "rank": rank}
                        rows.append(about | {"GB/s": rate})
                    dist.barrier()
    return rows


def fetched_nbytes(runtime: DWDPRuntime, stack: Stack) -> int:
    """Bytes of a layer that are not this rank's own."""
    own = len(runtime.local_experts(0))
    return stack.layer_nbytes * (stack.num_experts - own) // stack.num_experts


def copy_pass(runtime: DWDPRuntime, stack: Stack) -> None:
    """A pass without compute."""
    for layer in range(stack.num_layers):
        runtime.acquire(layer)
        runtime.release(layer)


def slowdown(place: Place, stack: Stack, count: int) -> list[Row]:
    """A dense and a grouped product, beside copies and alone, on each rank while all ranks copy."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_group(partial(_slowdown_rank, place, stack, count, folder), count, place.device_type)
    return [row for rows in found for row in rows]


def _slowdown_rank(place: Place, stack: Stack, group_size: int, folder: str, rank: int) -> list[Row]:
    device = place.device(rank)
    config = DWDPConfig(group_size=group_size)
    rows: list[Row] = []
    with (
        collectives(rank, group_size, place, folder),
        dwdp(stack, config, rank, device, Path(folder, "slowdown"), driver=place.driver(rank)) as (runtime, _),
    ):
        for name, product in products(stack, device, place.tiny).items():
            times: dict[str, list[float]] = {"alone": [], "beside copies": []}
            clocks: dict[str, int] = {}
            for way in alone_and_beside(place, runtime, stack, device):
                times[way].append(timed(place, product))
                clocks[way] = clock_while(place, device, product)
            rows.append({"product": name, "rank": rank} | beside(times) | {f"MHz {way}": clocks[way] for way in times})
    return rows


def alone_and_beside(place: Place, runtime: DWDPRuntime, stack: Stack, device: torch.device) -> Iterator[str]:
    """ "alone", "beside copies", and "alone" again, as clocks fall while a GPU computes: all ranks measure so."""
    for way in ("alone", "beside copies", "alone"):
        dist.barrier()
        with copying(place, runtime, stack, device) if way == "beside copies" else nullcontext():
            yield way
            dist.barrier()  # the copies go on until every rank has measured


def beside(times: dict[str, list[float]]) -> Row:
    """Milliseconds of the same product alone and beside copies, and the ratio."""
    middle = {way: statistics.mean(seconds) for way, seconds in times.items()}
    ratio = middle["beside copies"] / middle["alone"]
    return {f"{way} ms": seconds * 1e3 for way, seconds in middle.items()} | {"beside / alone": ratio}


def products(stack: Stack, device: torch.device, tiny: bool) -> dict[str, Callable[[], object]]:
    """By name; operands are this rank's own memory, made once."""
    size, tokens = (64, 64) if tiny else (8192, 16384)
    a, b = (torch.randn(size, size, dtype=DTYPE, device=device) for _ in range(2))
    experts = min(stack.num_experts, EXPERTS)
    x = torch.randn(tokens, stack.hidden, dtype=DTYPE, device=device)
    w = torch.randn(experts, stack.intermediate, stack.hidden, dtype=DTYPE, device=device)
    ends = torch.arange(1, experts + 1, device=device).mul(tokens // experts).to(torch.int32)
    return {
        f"dense, {size} cubed": lambda: torch.mm(a, b),
        f"grouped, {tokens} tokens, {experts} experts": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
    }


def timed(place: Place, product: Callable[[], object]) -> float:
    """Seconds of one of `PRODUCTS`, which follow one another on the current stream."""

    def run() -> None:
        for _ in range(PRODUCTS):
            product()

    return steady(place, run, passes=2) / PRODUCTS


@contextmanager
def copying(place: Place, runtime: DWDPRuntime, stack: Stack, device: torch.device) -> Iterator[None]:
    """While the body runs, another thread fetches layer after layer, on a stream of its own, to the end of a pass.

    Raises what stopped the thread.
    """
    stop, under_way = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def fetch() -> None:
        stream: Any = nullcontext()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            stream = torch.cuda.stream(torch.cuda.Stream(device))
        try:
            with stream:
                while not stop.is_set():
                    copy_pass(runtime, stack)
                    under_way.set()
                    place.mark().reach()  # of this stream: one pass is given at a time, and slots are filled meanwhile
        except BaseException as error:
            failed.append(error)
        finally:
            under_way.set()

    thread = threading.Thread(target=fetch, name="copies")
    thread.start()
    under_way.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        place.wait()
    if failed:
        raise failed[0]

"""Several GPUs of one machine, in one command: links, prefetch, and DWDP beside expert and tensor parallelism.

    python benchmarks/multi_gpu.py --gpus 4 --json

    links      peer access, and the rate of one large copy between every pair
    tests      the GPU tests, each rank on its own GPU
    prefetch   copies alone, with 1, 2 and N-1 owners, over a pair's link: with and without slices, one rank or all
               pulling, or all but one, in step or at random moments; each rank, and the mean and the worst of them
    stack      a stack of MoE layers by DWDP, staged and in place, by expert parallelism (all-to-all) and by tensor
               parallelism (all-reduce), for equal and unequal numbers of tokens, beside what the planner predicts;
               every rank's DWDP results are compared, bit by bit, with a pass whose experts all lie in its own memory,
               and their time with the longer of its compute, beside copies, and its copies at the rate of the link.
               "imbalance" is by how much the rank whose experts get most tokens has more than the mean
    crossover  from how many tokens on DWDP is no slower, measured and predicted
    beside     kernel launches and all-reduces alone and beside the copies of all ranks, and what the issuing thread
               takes of a core; and copies of the others while one rank is stopped or killed in the middle of a layer
    slowdown   a dense and a grouped product on each rank, alone and beside the copies of all ranks, and the SMs' clock
    decode     steps of decoding by 1, 4 and 16 sequences a rank, of recorded routing, in CUDA graphs: experts in place,
               with a bank, and expert parallelism; with --only alone: decode_over_links.py says what
    predicted  the planner's crossovers alone, for any GPU with a preset; needs none: --only predicted --preset h200

``--nodes 2`` takes the GPUs for nodes, joined by rails, and runs that part alone: nodes.py says what.

Passes follow one another without a stop, and ranks go on until all have measured: [Note: Clocks] in ranks.py. Where
copies seem to be faster than one large copy of the same run, the command ends with an error and prints no figure.

On one GPU, or on the CPU (``--device cpu --tiny``), all of it runs with ranks that share the device: then it proves the
script and the bytes, and its times say nothing about links.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from beside_pulls import beside, without_one
from common import parser, report, require_within_link
from crossovers import Row, crossovers, spread_tokens
from decode_over_links import decode
from moe_stack import (
    STACKS,
    Bind,
    Stack,
    dwdp,
    expert_parallel,
    in_own_memory,
    reference,
    route,
    tensor_parallel,
)
from nodes import predictions as predicted_over_nodes
from nodes import tables as over_nodes
from rank_copies import PLANS, copying, fetched_nbytes, prefetch, slowdown
from ranks import Place, Together, collectives, steady
from stack_prediction import predict

from vmm_dwdp import DWDPConfig
from vmm_dwdp.cli.checks import slice_bytes
from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.testing import run_group

PARTS = ("links", "tests", "prefetch", "stack", "beside", "slowdown", "decode", "predicted")

PASSES = 6  # that are timed together
IN_A_ROW = 4  # large copies that are timed together, so that to wait for the device hardly counts


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
                for _ in range(IN_A_ROW):
                    b.copy_(a)
                torch.cuda.synchronize(target)
                elapsed.append((time.perf_counter() - start) / IN_A_ROW)
            access = torch.cuda.can_device_access_peer(target, source)
            rows.append({"from": source, "to": target, "access": access, "GB/s": a.numel() / min(elapsed) / 1e9})
    return rows


def gpu_tests() -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not faults", "tests"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    return [{"command": " ".join(command[1:]), "exit status": found.returncode, "last line": _last_line(found.stdout)}]


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


def _stack_rank(
    place: Place,
    stack: Stack,
    config: DWDPConfig,
    cases: list[list[int]],
    balanced: bool,
    link: float | None,
    folder: str,
    rank: int,
) -> list[Row]:
    """The three parallelisms, one after another, each with every case: so many tokens on each rank."""
    device = place.device(rank)
    group_size = config.group_size
    routings = [
        [route(stack, count, other, device, balanced=balanced) for other, count in enumerate(case)] for case in cases
    ]
    rows: list[Row] = [{"rank": rank, "tokens": case[rank]} for case in cases]
    passes = 3 if place.tiny else PASSES

    def measure(column: str, bind: Bind, *, apart: bool) -> Iterator[torch.Tensor]:
        """Results, by case; ``apart``: of passes that have nothing to wait for in other ranks."""
        for case, (row, every) in enumerate(zip(rows, routings, strict=True)):
            run = bind(every)
            dist.barrier()
            together = Together(Path(folder, column, str(case)), rank, group_size) if apart else None
            row[column] = steady(place, run, passes, together) * 1e3
            dist.barrier()
            yield run()

    with collectives(rank, group_size, place, folder):
        with dwdp(stack, config, rank, device, Path(folder, "dwdp"), driver=place.driver(rank)) as (runtime, run):
            staged = list(measure("dwdp staged ms", run("staged"), apart=True))
            in_place = list(measure("dwdp in_place ms", run("in_place"), apart=True))
            compute = in_own_memory(stack, rank, device)
            with copying(place, runtime, stack, device):
                for _ in measure("compute beside copies ms", compute, apart=True):
                    pass
            del compute
            nbytes = stack.num_layers * fetched_nbytes(runtime, stack)
            rows = [row | {"copies ms": nbytes / link * 1e-6} for row in rows] if link else rows
        whole = reference(stack, device, [every[rank] for every in routings])
        for row, *results in zip(rows, whole, staged, in_place, strict=True):
            row["identical"] = all(torch.equal(found, results[0]) for found in results[1:])
        del staged, in_place
        for name, parallel in (("expert", expert_parallel), ("tensor", tensor_parallel)):
            bind = parallel(stack, rank, group_size, device)
            found_by_case = measure(f"{name} parallel ms", bind, apart=False)
            for row, found, expected in zip(rows, found_by_case, whole, strict=True):
                row[f"{name} parallel error"] = _error(found, expected)
            del bind
    for row, every in zip(rows, routings, strict=True):
        if "copies ms" in row:
            row["over the bound"] = row["dwdp staged ms"] / max(row["compute beside copies ms"], row["copies ms"])
        row["expert parallel imbalance"] = imbalance([routed.counts for routed in every], group_size)
    return rows


def imbalance(counts: list[torch.Tensor], group_size: int) -> float:
    """By how much the rank with most rows has more than the mean, where experts are spread evenly over the ranks.

    Args:
        counts: of each rank's tokens, the rows for each expert ``[E]``.
    """
    rows = torch.stack(counts).sum(0).view(group_size, -1).sum(1).double()
    return (rows.max() / rows.mean()).item() - 1


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def predictions(stack: Stack, count: int, per_rank: list[int], preset: str, slice_bytes: int | str) -> list[Row]:
    return [
        {"stack": stack.name, "mean tokens": tokens, "spread": spread, **row}
        for (tokens, spread), shares in spread_tokens(count, per_rank).items()
        for row in predict(stack, load_gpu(preset), shares, slice_bytes)
    ]


def stacks(
    place: Place,
    stack: Stack,
    config: DWDPConfig,
    per_rank: list[int],
    preset: str | None,
    link: float | None,
    *,
    balanced: bool,
) -> list[Row]:
    """Measured passes, and those predicted for the GPU ``preset`` beside them. ``balanced``: see `route`.

    Args:
        link: GB/s of one large copy between two GPUs, where each rank has one: how long copies take at least, and a
            pass over the longer of that and its compute beside copies.
    """
    count = config.group_size
    spreads = spread_tokens(count, per_rank)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(_stack_rank, place, stack, config, list(spreads.values()), balanced, link, folder)
        found = run_group(run, count, place.device_type)
    rows: list[Row] = []
    for case, ((tokens, spread), shares) in enumerate(spreads.items()):
        predicted = predict(stack, load_gpu(preset), shares, config.slice_bytes) if preset else [{} for _ in shares]
        about = {"stack": stack.name, "mean tokens": tokens, "spread": spread}
        rows += [about | of_rank[case] | ours for of_rank, ours in zip(found, predicted, strict=True)]
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gpus", type=int, default=0, help="ranks (default: the GPUs of this machine)")
    options.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs")
    options.add_argument("--preset", help="GPU that the planner's predictions are for (default: by the GPU's name)")
    options.add_argument(
        "--routing",
        choices=("balanced", "random"),
        default="balanced",
        help="balanced: every expert gets as many tokens, which favours expert parallelism (default)",
    )
    options.add_argument("--only", nargs="*", choices=PARTS, help="(default: all but decode and predicted)")
    options.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS), help="of copies, with prefetch")
    options.add_argument(
        "--slice-bytes",
        type=slice_bytes,
        default="auto",
        help="of the config, with stack and predicted (default: auto)",
    )
    options.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="the GPUs as N nodes; no other part but predicted"
    )
    options.add_argument(
        "--stacks", nargs="*", choices=STACKS, help="default: deepseek-r1 and gpt-oss-120b; with --nodes the latter"
    )
    given: argparse.Namespace = options.parse_args()
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
    if given.device.type != "cuda" and not given.tiny and given.only != ["predicted"]:
        options.error("these sizes need GPUs; --tiny shows without one that everything runs")
    place = Place(given.device.type, given.tiny)
    present = torch.cuda.device_count() if place.device_type == "cuda" else 0
    count = given.gpus or max(2, present)
    wanted = given.only or (["links", "tests"] if present > 1 else []) + ["prefetch", "stack", "beside", "slowdown"]
    usual = ["tiny"] if given.tiny else ["gpt-oss-120b"] if given.nodes > 1 else ["deepseek-r1", "gpt-oss-120b"]
    chosen = [STACKS[name] for name in given.stacks or usual]
    per_rank = [32] if given.tiny else [4096, 8192, 16384, 32768]
    preset = given.preset or (preset_of(torch.cuda.get_device_name()) if present else None)
    if given.nodes > 1 and (count % given.nodes or count < 2 * given.nodes or given.only not in (None, ["predicted"])):
        options.error(f"--nodes {given.nodes} needs as many GPUs on each, two at least, not {count} in all")
    uneven = [stack.name for stack in chosen if not stack.divides(count)]
    if "stack" in wanted and given.nodes == 1 and uneven:
        options.error(f"{', '.join(uneven)}: expert and tensor parallelism cannot give {count} ranks equal parts")
    tables: dict[str, list[Row]] = {}
    link = None
    if given.nodes > 1:
        wanted = ["links"] if present >= count and not given.only else []
    if present > 1 and {"links", "prefetch", "stack", "beside", "decode"} & set(wanted):
        tables["links"] = links(min(present, count))
        link = max(row["GB/s"] for row in tables["links"])
    elif "links" in wanted:
        raise SystemExit("there are no links: this machine does not have two GPUs")
    if given.nodes > 1:
        if given.only and preset:
            tables["predicted over nodes"] = predicted_over_nodes(chosen, given.nodes, count, preset)
        else:
            tables |= over_nodes(place, chosen, given.nodes, count, preset, link)
    if "tests" in wanted:
        tables["tests"] = gpu_tests()
    link_of_all = (
        link if count <= present else None
    )  # ranks that share a GPU copy inside of it, and no link limits them
    if "prefetch" in wanted:
        tables["prefetch"], tables["prefetch, all ranks"] = prefetch(place, chosen[0], count, link_of_all, given.plans)
    if "beside" in wanted:
        tables["beside"] = beside(place, chosen[0], count)
        tables["without one"] = without_one(place, chosen[0], count, link_of_all)
    if link_of_all is not None:
        for name in {"prefetch", "without one"} & set(tables):
            require_within_link(tables[name], link_of_all, ["GB/s"])
    if "stack" in wanted:
        balanced = given.routing == "balanced"
        config = DWDPConfig(group_size=count, mode="in_place", slice_bytes=given.slice_bytes)
        tables["stack"] = [
            row
            for stack in chosen
            for row in stacks(place, stack, config, per_rank, preset, link_of_all, balanced=balanced)
        ]
        if link_of_all is not None:  # a pass that is over before its copies can be
            rates = [row | {"GB/s": link_of_all * row["copies ms"] / row["dwdp staged ms"]} for row in tables["stack"]]
            require_within_link(rates, link_of_all, ["GB/s"])
        tables["crossover"] = crossovers(tables["stack"])
    if "slowdown" in wanted:
        tables["slowdown"] = slowdown(place, chosen[0], count)
    if "decode" in wanted:
        tables["decode"] = decode(place, count, link_of_all, preset)
    if "predicted" in wanted and preset:
        rows = [row for stack in chosen for row in predictions(stack, count, per_rank, preset, given.slice_bytes)]
        tables["predicted"] = crossovers(rows)
    report(given, tables)
    if any(not row["identical"] for row in tables.get("stack", ())):
        raise SystemExit("a rank's result differs from the pass with all experts in its own memory")


if __name__ == "__main__":
    main()

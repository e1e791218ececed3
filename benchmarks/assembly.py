"""The same layers and copies through both assemblies: one tensor a weight (vmm), or a list of tensors (tensor_list).

Every rank is a process, and runs passes over layers of two weights, each layer a pair of grouped GEMMs over tokens that
are spread evenly over the experts. Reported is the largest figure of any rank. The TensorList GEMM takes the one tensor
of vmm as a list of one, so the ratio compares the assemblies, not two kernels; torch's own grouped GEMM is beside them.

set-up        seconds from the constructor until publish returns, the shards being filled in between
resident      MiB of physical memory for the rank's own experts
staged        MiB of physical memory for the slots
issue         microseconds of the launching thread for acquire and release of one layer, the median
pass          milliseconds for one pass with its grouped GEMMs, the mean
waited        milliseconds of a pass for which the compute stream waited for copies

Where ranks share a GPU, the copies of all of them share its memory's bandwidth with the GEMMs: the pass says how the
two assemblies compare, and nothing about a link between GPUs. On the CPU the launching thread waits for the copies and
does the GEMMs itself.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from common import Row, parser, report
from torch import Tensor

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.config import AssemblyKind
from vmm_dwdp.kernels import tensor_list_grouped_gemm
from vmm_dwdp.testing import run_group

MIB = 1 << 20


class Shape(NamedTuple):
    """Of the model, and of what passes through it."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    tokens: int  # rows of the grouped GEMMs


SHAPES = {
    "cpu": Shape(layers=8, experts=16, hidden=512, intermediate=1024, tokens=64),
    "cuda": Shape(layers=8, experts=64, hidden=2048, intermediate=2048, tokens=8192),
}


class Way(NamedTuple):
    """How the weights of a layer are assembled, and what multiplies with them: ``(x, weight or list, ends)``."""

    assembly: AssemblyKind
    gemm: Callable[[Tensor, Any, Tensor], Tensor]


def torch_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def list_of_one_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return tensor_list_grouped_gemm(x, [weight], ends)


WAYS: Final = {
    "vmm, torch": Way("vmm", torch_gemm),
    "vmm": Way("vmm", list_of_one_gemm),
    "tensor_list": Way("tensor_list", tensor_list_grouped_gemm),
}


def run_rank(
    shape: Shape, way: Way, group_size: int, device: torch.device, passes: int, directory: Path, rank: int
) -> dict[str, float]:
    """One rank's figures, by name."""
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    config = DWDPConfig(group_size=group_size, assembly=way.assembly)
    start = time.perf_counter()
    with DWDPRuntime(config, rank, here, directory / "group") as runtime:
        for layer in range(shape.layers):
            weights = {
                "up": WeightSpec((shape.experts, shape.intermediate, shape.hidden), torch.bfloat16),
                "down": WeightSpec((shape.experts, shape.hidden, shape.intermediate), torch.bfloat16),
            }
            runtime.add_layer(layer, weights)
            for weight in weights:
                runtime.local_shard(layer, weight).normal_(std=0.02)
        runtime.publish()
        set_up = time.perf_counter() - start

        x = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=here)
        ends = torch.arange(1, shape.experts + 1, device=here) * shape.tokens // shape.experts
        ends = ends.int()
        issue: list[float] = []

        def one_pass() -> None:
            for layer in range(shape.layers):
                before = time.perf_counter()
                weights = runtime.acquire(layer)
                acquired = time.perf_counter()
                way.gemm(way.gemm(x, weights["up"], ends), weights["down"], ends)
                computed = time.perf_counter()
                runtime.release(layer)
                issue.append(acquired - before + time.perf_counter() - computed)

        def synchronize() -> None:
            if here.type == "cuda":
                torch.cuda.synchronize(here)

        one_pass()
        synchronize()
        issue.clear()
        waited, start = runtime.stats().exposed_wait_s, time.perf_counter()
        for _ in range(passes):
            one_pass()
        synchronize()
        per_pass = (time.perf_counter() - start) / passes
        stats = runtime.stats()
        return {
            "set-up s": set_up,
            "resident MiB": stats.resident_bytes / MIB,
            "staged MiB": stats.staged_bytes / MIB,
            "issue us": statistics.median(issue) * 1e6,
            "pass ms": per_pass * 1e3,
            "waited ms": (stats.exposed_wait_s - waited) / passes * 1e3,
        }


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--group-size", type=int, default=4, help="ranks (default: 4)")
    arguments_of.add_argument("--passes", type=int, default=10, help="passes after the first (default: 10)")
    arguments = arguments_of.parse_args()
    shape = SHAPES[arguments.device.type]
    torch.set_num_threads(1)  # the ranks take it over; together they have enough

    figures: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as directory:
            rank = functools.partial(
                run_rank, shape, way, arguments.group_size, arguments.device, arguments.passes, Path(directory)
            )
            ranks = run_group(rank, arguments.group_size, arguments.device)
        figures[name] = {what: max(figure[what] for figure in ranks) for what in ranks[0]}
    other = figures["tensor_list"]
    ratio = {what: value / other[what] if other[what] else None for what, value in figures["vmm"].items()}
    rows: list[Row] = [{"way": name, **row} for name, row in {**figures, "vmm / tensor_list": ratio}.items()]
    report(arguments, {f"{arguments.group_size} ranks, {shape}": rows})


if __name__ == "__main__":
    main()

"""How much of the link grouped GEMMs use when they read weights in host memory in place.

One weight of a MoE layer, all of its experts in host memory. Each row is a grouped GEMM for a batch of tokens, which
choose their experts without repetition, all alike: four routings, one right after another, the median of three times,
all columns in turns. Quantised weights are read with their scales. No figure is printed if one is more than the fastest
copy of the run. On the CPU the same runs on the host driver, which
says nothing about a link.

link        GB/s of a copy of the weight to the GPU, by the copy engine
torch       bytes of the experts used, a second, divided by the link's: torch's grouped GEMM, for bf16
triton      the same: our grouped GEMM over lists of tensors
chosen      the same: our kernel for few tokens, which are not sorted
cut         the same of memory that is cut at the borders of experts, as it is for a resident cache, for bf16
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Row, parser, report, require_shares_within_link, seen
from decode import KERNELS, Gemm, Routing, Shape, elapsed, our_gemm
from expert_formats import FORMATS, fill, product, specs
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime
from vmm_dwdp.kernels import Scales

ROUTINGS, REPEATS = 4, 3
BATCHES = (1, 4, 16, 32)
SMALL = 2 << 20  # bytes of a cache that is not filled
WEIGHTS = {  # model and weight: experts, N, K, top-k
    "gpt-oss-120b w13, half of its experts": (64, 5760, 2880, 4),
    "gpt-oss-120b w2, half of its experts": (64, 2880, 2880, 4),
    "Qwen3-30B-A3B w13": (128, 1536, 2048, 8),
    "Qwen3-30B-A3B w2": (128, 2048, 768, 8),
}


@contextmanager
def held(kind: str, experts: int, n: int, k: int, device: torch.device, *, cut: bool) -> Iterator[DWDPRuntime]:
    """With a weight ``[experts, n, k]`` in host memory, of random numbers."""
    config = DWDPConfig(
        group_size=1, host_experts=experts, mode="in_place", prefetch_depth=0, resident_cache=SMALL if cut else 0
    )
    with tempfile.TemporaryDirectory() as folder, DWDPRuntime(config, 0, device, Path(folder) / "group") as runtime:
        of_layer = specs(kind, experts, {"w": (n, k)})
        runtime.add_layer(0, of_layer)
        generator = torch.Generator(device).manual_seed(0)
        fill({name: runtime.local_shard(0, name, HOST) for name in of_layer}, kind, {"w": (n, k)}, generator)
        runtime.publish()
        yield runtime


def measure(kind: str, experts: int, n: int, k: int, top_k: int, batches: list[int], device: torch.device) -> list[Row]:
    """The rows of one weight."""
    with held(kind, experts, n, k, device, cut=False) as whole:
        if kind != "bf16":
            return list(_rows(kind, {"": whole.acquire(0)}, top_k, k, batches))
        with held(kind, experts, n, k, device, cut=True) as cut:
            return list(_rows(kind, {"": whole.acquire(0), " cut": cut.acquire(0)}, top_k, k, batches))


def _rows(kind: str, memories: dict[str, Any], top_k: int, k: int, batches: list[int]) -> Iterator[Row]:
    weight = memories[""]["w"]
    experts, n, _ = weight.shape
    nbytes = sum(tensor.nbytes for tensor in memories[""].values())
    copied = torch.empty_like(weight)
    shape = Shape(experts, top_k, k, n, torch.bfloat16, layers=1, depth=0)
    for batch in batches:
        routing = Routing(shape, batch, "uniform", ROUTINGS, weight.device)
        x = torch.randn(batch, k, device=weight.device).bfloat16()
        runs: dict[str, Callable[[], object]] = {"link": partial(copied.copy_, weight)}
        for memory, weights in memories.items():
            for name, multiply in grouped(kind, weights, x.repeat_interleave(top_k, 0)).items():
                runs[name + memory] = partial(one_after_another, multiply, routing.ends[:, 0])
        runs["chosen"] = partial(one_after_another, partial(product, x, memories[""], "w"), routing.chosen[:, 0])
        turns = [{name: behind_another(call, weight.device) for name, call in runs.items()} for _ in range(REPEATS)]
        seconds = {name: median(turn[name] for turn in turns) for name in runs}
        link = weight.nbytes / seconds.pop("link")
        used = routing.active * nbytes * ROUTINGS
        shares = {name: used / took / link for name, took in seconds.items()}
        yield seen({"batch": batch, "active": routing.active, "link": link / 1e9, **shares})


def grouped(kind: str, weights: dict[str, Tensor], x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name grouped GEMMs of ``x``, of which each expert has the rows that end where they are told."""
    if kind == "bf16":
        return {name: partial(_multiply, gemm, x, weights["w"], None) for name, gemm in KERNELS.items()}
    scales = Scales(weights["w_scale"])
    if kind == "fp8":
        x = x.to(torch.float8_e4m3fn)
        scales = Scales(weights["w_scale"], torch.ones(len(x), -(-x.shape[1] // 128), device=x.device))
    return {"triton": partial(_multiply, our_gemm, x, weights["w"], scales)}


def _multiply(gemm: Gemm, x: Tensor, weight: Tensor, scales: Scales | None, ends: Tensor) -> Tensor:
    return gemm(x, weight, ends, scales)


def one_after_another(multiply: Callable[[Tensor], Tensor], routings: Tensor) -> None:
    for routing in routings:
        multiply(routing)


def behind_another(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls, which is launched while the device works on the first."""
    run()
    return elapsed(run, device)


def main() -> None:
    arguments_of = parser(__doc__)
    add = arguments_of.add_argument
    add("--weights", choices=FORMATS, action="append", help="may be repeated (default: bf16)")
    models = sorted({name.split()[0] for name in WEIGHTS})
    add("--model", choices=models, action="append", help="may be repeated (default: both)")
    add("--batch", type=int, action="append", help="tokens; may be repeated (default: 1, 4, 16, 32)")
    arguments = arguments_of.parse_args()
    tables: dict[str, list[Row]] = {}
    for kind in arguments.weights or ["bf16"]:
        for name, sizes in WEIGHTS.items():
            if arguments.model and name.split()[0] not in arguments.model:
                continue
            rows = measure(kind, *sizes, arguments.batch or list(BATCHES), arguments.device)
            tables[name if kind == "bf16" else f"{name}, {kind}"] = rows
    every = [row for rows in tables.values() for row in rows]
    if arguments.device.type == "cuda":
        require_shares_within_link(every, [name for name in every[0] if name not in ("batch", "active", "link")])
    report(arguments, tables)


if __name__ == "__main__":
    main()

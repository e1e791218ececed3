"""How much of the link grouped GEMMs use when they read weights in host memory in place.

One weight of a MoE layer, all of its experts in host memory. Each row is a grouped GEMM for a batch of tokens, which
choose their experts without repetition, all alike: four routings, one right after another, the median of three times,
all columns in turns. On the CPU the same runs on the host driver, which says nothing about a link.

link        GB/s of a copy of the weight to the GPU, by the copy engine
torch       bytes of the experts used, a second, divided by the link's: torch's grouped GEMM
triton      the same: our grouped GEMM over lists of tensors
cut         the same of memory that is cut at the borders of experts, as it is for a resident cache
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common import Row, parser, report, seen
from decode import KERNELS, Gemm, Routing, Shape, elapsed
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime, WeightSpec

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
def held(experts: int, n: int, k: int, device: torch.device, *, cut: bool) -> Iterator[DWDPRuntime]:
    """With a weight ``[experts, n, k]`` in host memory, of random numbers, every expert alike."""
    config = DWDPConfig(
        group_size=1, host_experts=experts, mode="in_place", prefetch_depth=0, resident_cache=SMALL if cut else 0
    )
    with tempfile.TemporaryDirectory() as folder, DWDPRuntime(config, 0, device, Path(folder) / "group") as runtime:
        runtime.add_layer(0, {"w": WeightSpec((experts, n, k), torch.bfloat16)})
        expert = torch.randn(n, k).mul(k**-0.5).bfloat16()
        runtime.local_shard(0, "w", HOST).copy_(expert.expand(experts, n, k))
        runtime.publish()
        yield runtime


def measure(experts: int, n: int, k: int, top_k: int, device: torch.device) -> list[Row]:
    """The rows of one weight."""
    with held(experts, n, k, device, cut=False) as whole, held(experts, n, k, device, cut=True) as cut:
        return list(_rows({"": whole.acquire(0)["w"], " cut": cut.acquire(0)["w"]}, top_k))


def _rows(weights: dict[str, Tensor], top_k: int) -> Iterator[Row]:
    weight = weights[""]
    experts, n, k = weight.shape
    copied = torch.empty_like(weight)
    shape = Shape(experts, top_k, k, n, weight.dtype, layers=1, depth=0)
    for batch in BATCHES:
        routing = Routing(shape, batch, "uniform", ROUTINGS, weight.device)
        x = torch.randn(batch * top_k, k, device=weight.device).bfloat16()

        def run(gemm: Gemm, weight: Tensor, x: Tensor, ends: Tensor) -> None:
            for of_layers in ends:
                gemm(x, weight, of_layers[0], None)

        runs: dict[str, Callable[[], object]] = {"link": partial(copied.copy_, weight)}
        for (memory, tensor), (name, gemm) in product(weights.items(), KERNELS.items()):
            runs[name + memory] = partial(run, gemm, tensor, x, routing.ends)
        turns = [{name: behind_another(call, weight.device) for name, call in runs.items()} for _ in range(REPEATS)]
        seconds = {name: median(turn[name] for turn in turns) for name in runs}
        link = weight.nbytes / seconds.pop("link")
        used = routing.active * weight.nbytes * ROUTINGS
        shares = {name: used / took / link for name, took in seconds.items()}
        yield seen({"batch": batch, "active": routing.active, "link": link / 1e9, **shares})


def behind_another(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls, which is launched while the device works on the first."""
    run()
    return elapsed(run, device)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report(arguments, {name: measure(*sizes, arguments.device) for name, sizes in WEIGHTS.items()})


if __name__ == "__main__":
    main()

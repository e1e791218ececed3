"""How much of the link grouped GEMMs use when they read weights in host memory in place.

One weight of a MoE layer, all of its experts in host memory. Each row is one grouped GEMM for a batch of tokens, which
choose their experts without repetition, all alike or expert i of a random order in proportion to 1 / i (zipf); the
median of three times six routings. On the CPU the same runs on the host driver, which says nothing about a link.

link        GB/s of a copy of the weight to the GPU, by the copy engine
torch       bytes of the experts used, a second, divided by the link's: torch's grouped GEMM
triton      the same: our grouped GEMM over lists of tensors
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common import Row, parser, report, seen
from decode import KERNELS, Gemm, Routing, Shape, elapsed
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime, WeightSpec

ROUTINGS, REPEATS = 6, 3
BATCHES = (1, 4, 16, 32)
WEIGHTS = {  # model and weight: experts, N, K, top-k
    "Qwen3-30B-A3B w13": (128, 1536, 2048, 8),
    "Qwen3-30B-A3B w2": (128, 2048, 768, 8),
    "gpt-oss-120b w13, half of its experts": (64, 5760, 2880, 4),
}


def measure(experts: int, n: int, k: int, top_k: int, device: torch.device) -> list[Row]:
    """The rows of one weight ``[experts, n, k]``."""
    config = DWDPConfig(group_size=1, host_experts=experts, mode="in_place", prefetch_depth=0)
    with tempfile.TemporaryDirectory() as folder, DWDPRuntime(config, 0, device, Path(folder) / "group") as runtime:
        runtime.add_layer(0, {"w": WeightSpec((experts, n, k), torch.bfloat16)})
        expert = torch.randn(n, k).mul(k**-0.5).bfloat16()
        runtime.local_shard(0, "w", HOST).copy_(expert.expand(experts, n, k))
        runtime.publish()
        return list(_rows(runtime.acquire(0)["w"], top_k))


def _rows(weight: Tensor, top_k: int) -> Iterator[Row]:
    experts, n, k = weight.shape
    copied = torch.empty_like(weight)
    link = weight.nbytes / median(elapsed(lambda: copied.copy_(weight), weight.device) for _ in range(REPEATS))
    shape = Shape(experts, top_k, k, n, weight.dtype, layers=1, depth=0)
    for kind, batch in product(("uniform", "zipf"), BATCHES):
        routing = Routing(shape, batch, kind, ROUTINGS, weight.device)
        x = torch.randn(batch * top_k, k, device=weight.device).bfloat16()

        def run(gemm: Gemm, x: Tensor, ends: Tensor) -> None:
            for of_layers in ends:
                gemm(x, weight, of_layers[0], None)

        row = {"routing": kind, "batch": batch, "active": routing.active, "link": link / 1e9}
        for name, gemm in KERNELS.items():
            run(gemm, x, routing.ends)
            seconds = median(elapsed(partial(run, gemm, x, routing.ends), weight.device) for _ in range(REPEATS))
            row[name] = routing.active * weight.nbytes * ROUTINGS / seconds / link
        yield seen(row)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report(arguments, {name: measure(*sizes, arguments.device) for name, sizes in WEIGHTS.items()})


if __name__ == "__main__":
    main()

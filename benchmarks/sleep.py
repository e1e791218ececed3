"""How long a rank takes to give its memory back and to take it again, and that graphs replay afterwards.

One process, with shards of ``--gb`` on the device and a few experts in host memory, so that there are slots and copies.
A pass reads experts of both kinds in every layer; on a GPU it is captured into a CUDA graph once, before the first row.
The first row takes the host memory to which shards are copied, later ones use it again; the last one keeps nothing.

sleep s, wake s    seconds of the calls
GB before, asleep, after
                   used of the device: of a GPU, all that is not free, torch's own and the context included; else what
                   the runtime counts
same bits          whether the replay after waking (without a GPU, a pass) gave the bits of the one before sleeping
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, parser, report, seen
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime, WeightSpec

EXPERTS, ON_HOST = 64, 8
READ = (0, EXPERTS - ON_HOST - 1, EXPERTS - ON_HOST, EXPERTS - 1)  # experts of a pass: own ones, and the host's


def used(runtime: DWDPRuntime, device: torch.device) -> float:
    """GB."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e9
    stats = runtime.stats()
    return (stats.resident_bytes - runtime.memory_needed().host + stats.staged_bytes) / 1e9


def made(layers: int, hidden: int, device: torch.device, rendezvous: Path) -> DWDPRuntime:
    """A rank with ``layers`` weights ``[EXPERTS, hidden, hidden]`` of random numbers, published."""
    runtime = DWDPRuntime(DWDPConfig(group_size=1, host_experts=ON_HOST), 0, device, rendezvous)
    for layer in range(layers):
        runtime.add_layer(layer, {"w": WeightSpec((EXPERTS, hidden, hidden), torch.bfloat16)})
    for layer in range(layers):
        for owner in runtime.held_owners:
            shard = runtime.local_shard(layer, "w", owner)
            shard.copy_(torch.randn(hidden, hidden).mul(hidden**-0.5).bfloat16().expand(shard.shape))
    for expert in range(len(shard)):  # the last layer's in host memory differ from each other
        runtime.local_shard(layers - 1, "w", HOST)[expert].mul_(1 + expert / 16)
    del shard
    runtime.publish()
    return runtime


def forward(runtime: DWDPRuntime, layers: int, x: Tensor) -> Tensor:
    for layer in range(layers):
        with runtime.layer(layer) as weights:
            whole = weights["w"]
            assert isinstance(whole, Tensor)
            for expert in READ:
                x = torch.tanh(x @ whole[expert])
    return x


def replayed(runtime: DWDPRuntime, layers: int, x: Tensor) -> Callable[[], Tensor]:
    """A pass: of a graph that is captured here, on a GPU, and reads ``x`` where it is."""
    if x.device.type != "cuda":
        return lambda: forward(runtime, layers, x)
    forward(runtime, layers, x)  # what the first product takes is not taken in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(runtime, layers, x)

    def replay() -> Tensor:
        graph.replay()
        torch.cuda.synchronize()
        return y.clone()

    return replay


def timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(gb: float, layers: int, cycles: int, device: torch.device) -> list[Row]:
    expert_nbytes = gb * 1e9 / layers / (EXPERTS - ON_HOST)
    hidden = max(16, int((expert_nbytes / 2) ** 0.5) // 16 * 16)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, made(layers, hidden, device, Path(folder) / "group") as runtime:
        x = torch.randn(8, hidden).to(device, torch.bfloat16)
        run = replayed(runtime, layers, x)
        expected = run()
        for cycle in range(cycles + 1):
            keep = cycle < cycles
            before = used(runtime, device)
            sleep_s = timed(lambda keep=keep: runtime.sleep(keep=keep), device)  # type: ignore[misc]
            asleep = used(runtime, device)
            wake_s = timed(runtime.wake, device)
            row: dict[str, object] = {
                "cycle": cycle,
                "keep": keep,
                "shards GB": runtime.memory_needed().resident / 1e9,
                "sleep s": sleep_s,
                "wake s": wake_s,
                "GB before": before,
                "GB asleep": asleep,
                "GB after": used(runtime, device),
                "same bits": torch.equal(run(), expected) if keep else None,
            }
            rows.append(seen(row))
        del run
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gb", type=float, default=40.0, help="of shards on the device (default: 40)")
    arguments.add_argument("--layers", type=int, default=32, help="over which they are spread (default: 32)")
    arguments.add_argument("--cycles", type=int, default=3, help="of sleep and wake that keep the bytes (default: 3)")
    stated = arguments.parse_args()
    report(stated, {"sleep and wake": measure(stated.gb, stated.layers, stated.cycles, stated.device)})


if __name__ == "__main__":
    main()

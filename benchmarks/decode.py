"""Few tokens a pass, experts in host memory: staged, in place, with a cache, chosen, and with all experts on the GPU.

A pass is a number of MoE layers of a model's shapes, a grouped GEMM, the gate and another grouped GEMM each, without
the rest of the model. Every pass has another routing, and every token chooses its experts without repetition: all
alike, or expert i of a random order in proportion to 1 / i (zipf). Milliseconds are medians of whole passes, and all
columns but the cache's take turns, there and back, because the link of a shared host drifts. Each kind of routing has a
new runtime, so that mode auto has learnt from no other. The resident cache is empty at first; for its columns it is
filled after the routing of 1,024 other tokens of the same kind. On the CPU the same runs on the host driver, which says
nothing about a link.

kernel       of the pass that reads in place: torch's grouped GEMM, or ours over lists of tensors, in Triton
active       part of the experts that a pass uses
gpu          ms, all experts in the GPU's own memory
staged       ms, all experts copied into slots
in place     ms, experts read where they are
graph        ms, the same, replayed from a CUDA graph, of up to 256 tokens
auto         ms, each pass in the mode that the runtime chooses, after the passes that it takes to find out
auto chose   that mode
link         GB/s of a copy from host memory
of link      bytes of the experts used in place, a second, divided by that; faster than any copy of the run is refused
speed-up     staged / the faster of in place and graph
of ideal     that, divided by the number of experts / experts used
auto behind  auto / the faster of staged and in place, less 1: the median over turns
cached       ms, in place with the cache
cached graph ms, the same, replayed from a CUDA graph
gain         in place / cached, of each the faster of eager and graph
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Row, parser, report, require_shares_within_link, seen
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.config import ModeSetting
from vmm_dwdp.kernels import Scales, grouped_gemm, tensor_list_grouped_gemm

WARM_UP = 12  # passes in which mode auto finds out which mode is faster, near the crossover
HISTORY = 1024  # tokens by whose routing the cache is filled
DECODE = 256  # tokens, up to which a pass may be one of decoding
LONG = 1000  # milliseconds: what takes longer is timed in the first turn only
COPIED = 1 << 30  # bytes, at most, by which the link is timed

Gemm = Callable[[Tensor, Tensor, Tensor, "Scales | None"], Tensor]
Weights = dict[str, Tensor]


class Shape(NamedTuple):
    """MoE layers of a model; ``depth`` slots for ``layers`` layers, several for each slot: else one would keep its slot
    for good, and staged passes would not copy it."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    layers: int
    depth: int


SHAPES = {
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768, torch.bfloat16, layers=6, depth=2),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880, torch.bfloat16, layers=2, depth=1),
    "DeepSeek-R1": Shape(256, 8, 7168, 2048, torch.float8_e4m3fn, layers=2, depth=1),
    "tiny": Shape(16, 2, 256, 128, torch.bfloat16, layers=4, depth=2),
}


def torch_gemm(x: Tensor, weight: Tensor, offsets: Tensor, scales: Scales | None) -> Tensor:
    return grouped_gemm(x, weight, offsets, scales=scales)


def our_gemm(x: Tensor, weight: Tensor, offsets: Tensor, scales: Scales | None) -> Tensor:
    return tensor_list_grouped_gemm(x, [weight], offsets, scales=scales, provider="triton" if x.is_cuda else "auto")


KERNELS: dict[str, Gemm] = {"torch": torch_gemm, "triton": our_gemm}


def specs(shape: Shape) -> dict[str, WeightSpec]:
    sizes = {"w13": (2 * shape.intermediate, shape.hidden), "w2": (shape.hidden, shape.intermediate)}
    found = {name: WeightSpec((shape.experts, *size), shape.dtype) for name, size in sizes.items()}
    if shape.dtype.itemsize == 1:
        found |= {f"{name}_scale": WeightSpec((shape.experts, n), torch.float32) for name, (n, _) in sizes.items()}
    return found


@contextmanager
def published(shape: Shape, device: torch.device, cached: float, banked: float = 0.0) -> Iterator[DWDPRuntime]:
    """A runtime of one rank with all experts in host memory, random, and a cache or a bank of a part."""
    nbytes = shape.layers * shape.experts * sum(spec.expert_nbytes for spec in specs(shape).values())
    config = DWDPConfig(
        group_size=1,
        host_experts=shape.experts,
        prefetch_depth=shape.depth,
        mode="auto",
        resident_cache=int(cached * nbytes),
        expert_bank=int(banked * nbytes),
    )
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(1 << 22, generator=generator, device=device).mul(shape.hidden**-0.5)
    with tempfile.TemporaryDirectory() as directory, DWDPRuntime(config, 0, device, Path(directory) / "g") as runtime:
        for layer in range(shape.layers):
            runtime.add_layer(layer, specs(shape))
        for layer in range(shape.layers):
            for name in specs(shape):
                shard = runtime.local_shard(layer, name, HOST).view(-1)
                values = (block.abs() if name.endswith("scale") else block).to(shard.dtype)
                for part in shard.split(block.numel()):
                    part.copy_(values[: part.numel()])
        del shard, part
        runtime.publish()
        yield runtime


class Routing:
    """Which experts each layer's rows go to, in one pass after another.

    Attributes:
        chosen: int64 ``[passes, layers, batch, top_k]`` on the device: the experts of each token.
        ends: int32 ``[passes, layers, experts]`` on the device: where each expert's rows end.
        active: part of the experts that get a row, the mean.
    """

    def __init__(self, shape: Shape, batch: int, kind: str, passes: int, device: torch.device) -> None:
        popular = torch.ones(shape.layers, shape.experts)
        if kind == "zipf":
            order = torch.rand(popular.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
            popular = 1 / (order + 1)
        chances = popular.to(device).repeat_interleave(batch, 0).repeat(passes, 1)
        rows = torch.multinomial(chances, shape.top_k, generator=torch.Generator(device).manual_seed(batch))
        self.chosen = rows.view(passes, shape.layers, batch, shape.top_k)
        rows = rows.view(passes * shape.layers, -1)
        counts = torch.zeros(len(rows), shape.experts, dtype=torch.long, device=device)
        counts.scatter_add_(1, rows, torch.ones_like(rows))
        self.active = (counts > 0).float().mean().item()
        self.ends = counts.cumsum(1).int().view(passes, shape.layers, -1)


class Passes:
    """Passes of one batch size over a runtime's layers, or over copies of them on the GPU."""

    def __init__(self, shape: Shape, runtime: DWDPRuntime, batch: int) -> None:
        self.shape, self.runtime, self.batch = shape, runtime, batch
        rows = batch * shape.top_k
        self.x = torch.randn(rows, shape.hidden, device=runtime.device).to(shape.dtype)
        self.row_scale = torch.ones(rows, device=runtime.device)
        self.ends = torch.zeros(shape.layers, shape.experts, dtype=torch.int32, device=runtime.device)
        self.chosen = torch.zeros(shape.layers, batch, shape.top_k, dtype=torch.long, device=runtime.device)

    def layer(self, weights: Weights, ends: Tensor, gemm: Gemm) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            scale = weights.get(f"{name}_scale")
            scales = None if scale is None else Scales(scale, self.row_scale)
            return gemm(x.to(self.shape.dtype), weights[name], ends, scales)

        gate, up = linear(self.x, "w13").chunk(2, dim=1)
        return linear((F.silu(gate) * up).contiguous(), "w2")

    def spread(self, gemm: Gemm, mode: ModeSetting) -> Tensor:
        """One pass; what the last layer gives."""
        known = {"mode": mode, "tokens": self.batch, "top_k": self.shape.top_k}
        for number in range(self.shape.layers):
            with self.runtime.layer(number, **known, chosen=self.chosen[number]) as weights:
                out = self.layer(weights, self.ends[number], gemm)
        return out

    def whole(self, copies: dict[int, Weights], gemm: Gemm) -> Tensor:
        """The same pass over copies of the weights."""
        for number, weights in copies.items():
            out = self.layer(weights, self.ends[number], gemm)
        return out

    def time(self, runs: Mapping[str, Callable[[], object]], routing: Routing) -> list[dict[str, float]]:
        """Milliseconds of one pass of each of ``runs``, in one turn for each routing.

        A staged pass leaves copies for the next one on the link when it ends, and other layers in the slots than it
        found after a pass in place. So each of ``runs`` begins when they are done, and its first pass does not count.
        """
        turns: list[dict[str, float]] = []
        for number in range(len(routing.ends)):
            self.route(routing, number)
            names = [name for name in runs if not turns or turns[0][name] < LONG]
            turn = {}
            for name in reversed(names) if number % 2 else names:
                self.finish_copies()
                runs[name]()
                turn[name] = elapsed(runs[name], self.x.device) * 1e3
            turns.append(turn)
        return turns

    def finish_copies(self) -> None:
        """Wait for the device, and before for the copies that it was not given yet."""
        if (staging := self.runtime._schedule._staging) is not None:
            staging.drain()
        synchronize(self.x.device)

    def route(self, routing: Routing, number: int) -> None:
        """The routing of one pass for the passes from now on, those of graphs too."""
        self.ends.copy_(routing.ends[number])
        self.chosen.copy_(routing.chosen[number])

    def require_equal(self, run: Callable[[], Tensor], expected: Callable[[], Tensor]) -> None:
        """Stop if two ways to run a pass give other bits."""
        if not torch.equal(run(), expected()):
            raise SystemExit("read in place, weights give other bits than on the GPU")

    def mode_of(self, run: Callable[[], object]) -> str:
        """In which mode ``run`` makes a pass."""
        before = self.runtime.stats().in_place
        run()
        return "in place" if self.runtime.stats().in_place > before else "staged"

    def settle(self, run: Callable[[], object]) -> None:
        """Passes in mode auto, ``run``, until it has tried what it wants to try."""
        for _ in range(WARM_UP):
            elapsed(run, self.x.device)
            choice = self.runtime.stats().mode_choice
            if choice is None or not choice.in_place_below <= self.batch < choice.staged_from:
                break


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run`` takes on ``device``."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def captured(run: Callable[[], object], other_threads: str = "global") -> Callable[[], object]:
    """``other_threads``: whose calls end the capture, too; "thread_local" for none, as where NCCL has some."""
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), capture_error_mode=other_threads):
        run()
    return graph.replay


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns if name in turn) for name in turns[0]}


def copied(shape: Shape, runtime: DWDPRuntime) -> dict[int, Weights]:
    """All experts in the GPU's own memory."""
    whole = {}
    for number in range(shape.layers):
        with runtime.layer(number, mode="in_place") as weights:
            whole[number] = {name: weight.clone() for name, weight in weights.items()}
    return whole


def rows_of(
    shape: Shape,
    device: torch.device,
    cached: float,
    kind: str,
    batches: list[int],
    passes: int,
    kernels: list[str],
) -> list[dict[str, Any]]:
    """All rows of one kind of routing, of a runtime of their own: another's mode auto has learnt from other routing."""
    with published(shape, device, cached) as runtime:
        whole = copied(shape, runtime)
        rows = list(measure(shape, runtime, whole, kind, batches, passes, kernels))
        if cached:
            measure_cached(shape, runtime, whole, kind, rows, passes)
    return rows


def measure(
    shape: Shape,
    runtime: DWDPRuntime,
    whole: dict[int, Weights],
    kind: str,
    batches: list[int],
    passes: int,
    kernels: list[str],
) -> Iterator[dict[str, Any]]:
    """The rows of one kind of routing, with nothing in the cache."""
    with runtime.layer(0, mode="in_place") as weights:
        source = weights["w13"].view(-1)[: COPIED // shape.dtype.itemsize]
    del weights
    copy = partial(torch.empty_like(source).copy_, source)
    expert_bytes = sum(weight.nbytes for weights in whole.values() for weight in weights.values())
    for batch in batches:
        routing = Routing(shape, batch, kind, passes, runtime.device)
        run = Passes(shape, runtime, batch)
        run.route(routing, 0)
        chosen = partial(run.spread, torch_gemm, "auto")
        run.settle(chosen)
        for kernel in kernels:
            on_gpu = partial(run.whole, whole, KERNELS[kernel])
            in_place = partial(run.spread, KERNELS[kernel], "in_place")
            run.require_equal(in_place, on_gpu)
            runs = {"gpu": on_gpu, "staged": partial(run.spread, torch_gemm, "staged"), "in place": in_place}
            if run.x.is_cuda and batch <= DECODE:
                runs["graph"] = captured(in_place)
            if kernel == "torch":
                runs["auto"] = chosen
            turns = run.time(runs | {"copy": copy}, routing)
            ms = medians(turns)
            quickest = min(ms["in place"], ms.get("graph", ms["in place"]))
            link = source.nbytes / ms["copy"] / 1e6
            row = {
                "routing": kind,
                "batch": batch,
                "kernel": kernel,
                "active": routing.active,
                **{name: ms.get(name) for name in ("gpu", "staged", "in place", "graph", "auto")},
                "auto chose": run.mode_of(chosen) if "auto" in ms else None,
                "link": link,
                "of link": routing.active * expert_bytes / quickest / 1e6 / link,
                "speed-up": ms["staged"] / quickest,
                "of ideal": ms["staged"] / quickest * routing.active,
                "auto behind": behind(turns) if "auto" in ms else None,
            }
            seen(row)
            yield row


def behind(turns: Sequence[Mapping[str, float]]) -> float:
    """By what part mode auto took longer than the mode that was faster in all, the median over turns."""
    ms = medians(turns)
    faster = min(("staged", "in place"), key=lambda name: ms[name])
    return statistics.median(turn["auto"] / turn[faster] for turn in turns if {"auto", faster} <= turn.keys()) - 1


def fill_cache(shape: Shape, runtime: DWDPRuntime, kind: str) -> None:
    """After tokens of this kind."""
    history = Routing(shape, HISTORY, kind, 1, runtime.device).chosen[0]
    for number in range(shape.layers):
        runtime.acquire(number, mode="in_place", chosen=history[number])
        runtime.release(number)
    runtime.refresh_cache()


def measure_cached(
    shape: Shape, runtime: DWDPRuntime, whole: dict[int, Weights], kind: str, rows: list[dict[str, Any]], passes: int
) -> None:
    """Add the columns with the cache to the rows of one kind of routing."""
    fill_cache(shape, runtime, kind)
    for row in rows:
        routing = Routing(shape, row["batch"], kind, passes, runtime.device)
        run = Passes(shape, runtime, row["batch"])
        run.route(routing, 0)
        in_place = partial(run.spread, KERNELS[row["kernel"]], "in_place")
        run.require_equal(in_place, partial(run.whole, whole, KERNELS[row["kernel"]]))
        runs: dict[str, Callable[[], object]] = {"cached": in_place}
        if run.x.is_cuda:
            runs["cached graph"] = captured(in_place)
        ms = medians(run.time(runs, routing))
        without = [row[name] for name in ("in place", "graph") if row[name] is not None]
        row |= {"cached": ms["cached"], "cached graph": ms.get("cached graph"), "gain": min(without) / min(ms.values())}
        seen(row)


def main() -> None:
    arguments_of = parser(__doc__)
    add = arguments_of.add_argument
    add("--model", choices=SHAPES, action="append", help="may be repeated (default: all but tiny)")
    add("--batch", type=int, action="append", help="tokens a pass; may be repeated (default: 1, 2, 4 ... 256)")
    add("--routing", choices=("uniform", "zipf"), action="append", help="may be repeated (default: both)")
    add("--kernel", choices=KERNELS, action="append", help="may be repeated (default: both)")
    add("--passes", type=int, default=5, help="passes that are timed (default: 5)")
    add("--cached", type=float, default=0.25, help="part of the experts that the cache has room for (default: 0.25)")
    arguments = arguments_of.parse_args()
    tables: dict[str, Sequence[Row]] = {}
    for name in arguments.model or [name for name in SHAPES if name != "tiny"]:
        shape = SHAPES[name]
        rows: list[dict[str, Any]] = []
        kinds, kernels = arguments.routing or ["uniform", "zipf"], arguments.kernel or list(KERNELS)
        batches = arguments.batch or [2**power for power in range(9)]
        for kind in kinds:
            rows += rows_of(shape, arguments.device, arguments.cached, kind, batches, arguments.passes, kernels)
        about = f"{name}: {shape.layers} layers of {shape.experts} experts, {shape.dtype}, {shape.depth} slots"
        tables[about] = rows
    if arguments.device.type == "cuda":
        require_shares_within_link([row for rows in tables.values() for row in rows], ["of link"])
    report(arguments, tables)


if __name__ == "__main__":
    main()

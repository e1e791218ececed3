"""A whole model that decodes, all of its experts in host memory: tokens a second beside what the link allows.

Every layer of a model's shapes with random weights (decoder.py), a step in one CUDA graph. Which experts tokens choose
is recorded routing: layers take turns with the layers of a trace, and in each turn another sequence; where tokens use
half as many experts as the trace's, it is every second of those. The same steps go through experts in host memory, read
in place; through a bank besides, which the tokens of the prompts have filled; and through experts in the GPU's own
memory: in turns, because the link of a shared host drifts, each turn with other sequences. Every step's last hidden
state is compared to the bit with the one from the GPU's own memory. On the CPU the same runs on the host driver without
graphs, and says nothing about a link.

experts      where: "in place", "bank" or "gpu"
hits         part of the experts used that were in the bank
replayed     the same, of the replay of its policy
foresight    the same, if it were known what is used next
GB           bytes of experts that crossed the link for a step
link         GB/s of a copy from host memory, the mean over turns
ms           of a step, the mean
tokens/s     of all sequences
bound        tokens/s, if a step took GB / link and as long as with all experts in the GPU's memory
of bound     tokens/s / bound
read         GB / ms, in GB/s
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from bank import forget, measured_link
from common import Row, parser, report, require_within_link, seen
from decode import captured, elapsed
from decoder import SHAPES, Decoder, Read, Shape, Weights
from expert_formats import FORMATS, fill, specs
from repeated_layers import RepeatedLayers
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.caches import bank_policy, foresight, replay
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.routing import RoutingTrace, read_trace, used_experts

TRACES = Path(__file__).parent / "traces"
WHERE = ("in place", "bank", "gpu")
SMALL_PAGE = 64 << 10  # on the CPU, so that experts of the tiny model fill some


class Turn(NamedTuple):
    """What one turn found: by where experts are milliseconds of a step, and shares of hits by who tells them."""

    link: float
    ms: dict[str, float]
    uses: float  # experts of a step, in all layers
    hits: dict[str, float]


def steps_of(trace: RoutingTrace, shape: Shape, batch: int, turn: int) -> tuple[Tensor, int]:
    """Experts ``[steps, layers, batch, top_k]`` of ``batch`` sequences, and how many steps are of the prompts."""
    if (trace.num_experts, trace.top_k) not in ((shape.experts, shape.top_k), (shape.experts, 2 * shape.top_k)):
        raise ConfigError(
            f"the trace has {trace.num_experts} experts, {trace.top_k} a token, and the model {shape.experts} and "
            f"{shape.top_k}"
        )
    steps = np.concatenate([trace.prefill, trace.decode], 1).astype(np.int64)
    layers = []
    for number in range(shape.layers):
        first = batch * (turn + number // trace.num_layers)
        sequences = np.arange(first, first + batch) % len(steps)
        layers.append(steps[sequences, :, number % trace.num_layers, :: trace.top_k // shape.top_k])
    return torch.from_numpy(np.stack(layers).transpose(2, 0, 1, 3)).contiguous(), trace.prefill.shape[1]


def bank_nbytes(shape: Shape, weights: str, part: float, page: int) -> int:
    """Of a bank with room for ``part`` of the experts, each of whose weights takes whole pages in each layer."""
    rows = max(shape.top_k, round(part * shape.experts))
    pages = sum(-(-rows * spec.expert_nbytes // page) for spec in specs(weights, shape.experts, shape.sizes).values())
    return shape.layers * pages * page


@contextmanager
def published(shape: Shape, weights: str, part: float, distinct: int, device: torch.device) -> Iterator[DWDPRuntime]:
    """A runtime of one rank with all experts in host memory, those of ``distinct`` layers again and again."""
    of_layer = specs(weights, shape.experts, shape.sizes)
    opened = open_driver(device, SMALL_PAGE if device.type == "cpu" else None)
    config = DWDPConfig(
        group_size=1,
        host_experts=shape.experts,
        prefetch_depth=0,
        mode="in_place",
        expert_bank=bank_nbytes(shape, weights, part, opened.granularity()),
    )
    driver = cast(Driver, RepeatedLayers(opened, distinct * len(of_layer)))
    with (
        tempfile.TemporaryDirectory() as folder,
        DWDPRuntime(config, 0, device, Path(folder) / "group", driver=driver) as runtime,
    ):
        for layer in range(shape.layers):
            runtime.add_layer(layer, of_layer)
        for layer in range(distinct):
            shards = {name: runtime.local_shard(layer, name, HOST) for name in of_layer}
            fill(shards, weights, shape.sizes, torch.Generator(device).manual_seed(layer))
        del shards
        runtime.publish()
        yield runtime


def copied(runtime: DWDPRuntime, distinct: int) -> list[Weights]:
    """All experts of the first layers in the GPU's own memory."""
    copies: list[Weights] = []
    for number in range(distinct):
        with runtime.layer(number) as weights:
            copies.append({name: cast(Tensor, weight).clone() for name, weight in weights.items()})
    return copies


class Readers:
    """The ways to the experts of a layer, by `WHERE`.

    Args:
        copies: experts in the GPU's own memory, of so many layers, which repeat.
    """

    def __init__(self, runtime: DWDPRuntime, copies: Sequence[Weights], batch: int) -> None:
        self.runtime, self.copies, self.batch = runtime, copies, batch
        self.ways: dict[str, Read] = {"in place": self.in_place, "bank": self.banked, "gpu": self.on_gpu}

    @contextmanager
    def in_place(self, number: int, chosen: Tensor) -> Iterator[tuple[Weights, Tensor]]:
        with self.runtime.layer(number, tokens=self.batch) as weights:
            yield cast(Weights, weights), chosen

    @contextmanager
    def banked(self, number: int, chosen: Tensor) -> Iterator[tuple[Weights, Tensor]]:
        with self.runtime.layer(number, tokens=self.batch):
            weights, rows = self.runtime.look_up(number, chosen)
            yield cast(Weights, weights), rows

    @contextmanager
    def on_gpu(self, number: int, chosen: Tensor) -> Iterator[tuple[Weights, Tensor]]:
        yield self.copies[number % len(self.copies)], chosen


def require_room(nbytes: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()  # of other kinds of weights
    free = torch.cuda.mem_get_info(device)[0]
    if nbytes > free:
        raise SystemExit(
            f"the experts take {nbytes} bytes of the GPU's memory for comparison, and {free} are free: state fewer "
            "--distinct-layers, or a smaller --bank"
        )


class Steps:
    """Steps of a decoder, by each way to the experts."""

    def __init__(self, decoder: Decoder, runtime: DWDPRuntime, readers: Readers, prompt: int, steps: int) -> None:
        self.decoder, self.runtime, self.prompt, self.steps = decoder, runtime, prompt, steps
        self.runs: dict[str, Callable[[], object]] = {}
        for where, read in readers.ways.items():
            step = partial(decoder.step, read)
            decoder.begin(0)
            step()  # compiles what a capture could not
            self.runs[where] = captured(step) if runtime.device.type == "cuda" else step

    def turn(self, number: int, trace: RoutingTrace, link: float) -> Turn:
        shape, batch = self.decoder.shape, self.decoder.batch
        ids, prompt = steps_of(trace, shape, batch, number)
        ids = ids[prompt - self.prompt : prompt + self.steps]
        self.decoder.table.copy_(ids)
        ms, states = {}, {}
        for where in WHERE[:: -1 if number % 2 else 1]:
            if where == "bank":
                forget(self.runtime)
                self.repeat(where, 0, self.prompt)
                before = self.runtime.bank_counts()
            ms[where] = self.repeat(where, self.prompt, self.steps)
            states[where] = self.decoder.kept[self.prompt :].clone()
        for where, state in states.items():
            if not torch.equal(state, states["gpu"]) or not state.isfinite().all():
                raise SystemExit(f"with experts {where!r} states have other bits than with all of them on the GPU")
        counts = [(self.runtime.bank_counts()[layer], old) for layer, old in before.items()]
        uses, hits = (sum(getattr(new, name) - getattr(old, name) for new, old in counts) for name in ("uses", "hits"))
        used = used_experts(ids.numpy().astype(np.uint16), shape.experts).any(2)  # [steps, layers, experts]
        if uses != int(used[self.prompt :].sum()):
            raise SystemExit(
                f"the bank counted {uses} uses of experts, and the routing has {used[self.prompt :].sum()}"
            )
        shares = {"hits": hits / uses}
        rows = min(self.runtime.stats().bank.rows.values())  # type: ignore[union-attr]
        for name, policy in ("replayed", bank_policy), ("foresight", foresight):
            found = replay(used, rows, policy)
            shares[name] = float(found.hits[self.prompt :].sum() / uses)
        return Turn(link, ms, uses / self.steps, shares)

    def repeat(self, where: str, first: int, steps: int) -> float:
        """Milliseconds of a step, of so many one after another."""

        def run() -> None:
            for _ in range(steps):
                self.runs[where]()

        self.decoder.begin(first)
        return elapsed(run, self.runtime.device) * 1e3 / steps


def rows_of(turns: list[Turn], weights: str, batch: int, expert_nbytes: int) -> list[dict[str, Any]]:
    """The rows of one kind of weights."""
    link = statistics.mean(turn.link for turn in turns)
    on_gpu = statistics.mean(turn.ms["gpu"] for turn in turns)
    shares = {name: statistics.mean(turn.hits[name] for turn in turns) for name in turns[0].hits}
    all_gb = statistics.mean(turn.uses for turn in turns) * expert_nbytes / 1e9
    rows = []
    for where in WHERE:
        took = statistics.mean(turn.ms[where] for turn in turns)
        crossed = {"in place": all_gb, "bank": all_gb * (1 - shares["hits"]), "gpu": 0.0}[where]
        bound = crossed / link * 1e3 + on_gpu
        rows.append(
            {
                "weights": weights,
                "batch": batch,
                "experts": where,
                **{name: share if where == "bank" else None for name, share in shares.items()},
                "GB": crossed,
                "link": link,
                "ms": took,
                "tokens/s": batch * 1e3 / took,
                "bound": batch * 1e3 / bound,
                "of bound": bound / took,
                "read": crossed * 1e3 / took,
            }
        )
        seen(rows[-1])
    return rows


def require_possible(rows: list[dict[str, Any]], least_gb: float, device: torch.device) -> None:
    """End the command if the GPU seems to read faster than its memory or the link can."""
    require_within_link(cast("list[Row]", rows), max(row["link"] for row in rows), ["read"])
    if device.type != "cuda":
        return
    name = next((name for name in ("h100", "h200") if name in torch.cuda.get_device_name(device).lower()), None)
    for row in rows:
        if name and least_gb / row["ms"] * 1e12 > load_gpu(name).memory_bandwidth:
            raise SystemExit(f"{row} cannot be: a step reads {least_gb} GB at least; no figure is printed")


def measure(arguments: Any, shape: Shape, weights: str, trace: RoutingTrace) -> list[dict[str, Any]]:
    """The rows of one kind of weights."""
    began = time.monotonic()
    device, batch = arguments.device, arguments.batch
    distinct = min(arguments.distinct_layers or shape.layers, shape.layers)
    steps = min(arguments.steps, trace.decode.shape[1])
    prompt = min(trace.prefill.shape[1], steps)
    of_layer = specs(weights, shape.experts, shape.sizes)
    with published(shape, weights, arguments.bank, distinct, device) as runtime:
        require_room(distinct * sum(spec.num_experts * spec.expert_nbytes for spec in of_layer.values()), device)
        decoder = Decoder(shape, batch, prompt + steps, device)
        decoder.table.copy_(steps_of(trace, shape, batch, 0)[0][: prompt + steps])
        run = Steps(decoder, runtime, Readers(runtime, copied(runtime, distinct), batch), prompt, steps)
        seen({"weights": weights, "seconds of setting up": time.monotonic() - began, "distinct layers": distinct})
        turns = [run.turn(number, trace, measured_link(runtime)) for number in range(arguments.turns)]
        bank = runtime._assembly.bank
        assert bank is not None
        bank.verify()
        del run
    expert_nbytes = sum(spec.expert_nbytes for spec in of_layer.values())
    rows = rows_of(turns, weights, batch, expert_nbytes)
    least = decoder.nbytes_of_a_step + turns[0].uses * expert_nbytes * 0.9
    require_possible(rows, least / 1e9, device)
    return rows


def main() -> None:
    arguments_of = parser(__doc__)
    add = arguments_of.add_argument
    models = [name for name in SHAPES if name != "tiny"]
    add("--model", choices=models, default=models[0], help=f"(default: {models[0]})")
    add("--weights", choices=FORMATS, action="append", help="may be repeated (default: fp8 and mxfp4)")
    add("--batch", type=int, default=1, help="sequences, which decode together (default: 1)")
    add("--bank", type=float, default=0.25, help="part of the experts that it has room for (default: 0.25)")
    add("--trace", default="mixed-0.01", help="of benchmarks/traces (default: mixed-0.01)")
    add("--steps", type=int, default=128, help="that are timed, and as many of the prompts at most (default: 128)")
    add("--turns", type=int, default=2, help="with other sequences each (default: 2)")
    add("--distinct-layers", type=int, help="layers have the experts' bytes of so many (default: of all)")
    add("--quick", action="store_true", help="a rehearsal: 16 steps, one turn, two distinct layers")
    add("--tiny", action="store_true", help="a model of seven small layers, and the demo's trace")
    arguments = arguments_of.parse_args()
    if arguments.quick:
        arguments.steps, arguments.turns, arguments.distinct_layers = 16, 1, 2
    name, trace = ("tiny", "demo") if arguments.tiny else (arguments.model, arguments.trace)
    shape, recorded = SHAPES[name], read_trace(TRACES / f"{trace}.npz")
    tables: dict[str, list[Row]] = {}
    for weights in arguments.weights or ["fp8", "mxfp4"]:
        rows = measure(arguments, shape, weights, recorded)
        distinct = min(arguments.distinct_layers or shape.layers, shape.layers)
        about = (
            f"{name}, {weights}: {shape.layers} layers, the bytes of {distinct}; {trace}; a bank of {arguments.bank}"
        )
        tables[about] = cast("list[Row]", rows)
    report(arguments, tables)


if __name__ == "__main__":
    main()

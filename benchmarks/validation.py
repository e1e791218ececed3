"""docs/validation.md: what the planner and the simulator say, beside what was published and what was measured.

    python benchmarks/validation.py --write docs/validation.md

Published figures are those of arXiv 2604.01621 (DeepSeek-R1 NVFP4 on GB200). Every constant that a prediction needs is
named beside it; none is taken from the row that it predicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import four_gpus
import torch
from common import percent, table
from pull_policies import WAYS, reached

from vmm_dwdp import DWDPConfig, WeightSpec
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.planning.contention import meeting_shares, serial_efficiency
from vmm_dwdp.planning.estimate import Estimate, steady_period
from vmm_dwdp.planning.gpus import Efficiency, load_gpu
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.memory import expert_memory
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.roofline import Batch, Operation, all_to_all, layer_operations, total
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate
from vmm_dwdp.planning.work import GEMM_SENSITIVITY, average_operations, layer_work, link_rates, slowdown

RESULTS = Path(__file__).parent / "results"
OVERLAP_LAYERS = 4  # of the run in prefetch-h100.json
MODEL, GPU = load_model("deepseek-r1-nvfp4"), load_gpu("gb200")
PERFECT = dataclasses.replace(
    GPU,
    efficiency=Efficiency(dense_gemm=1, grouped_gemm=1, attention=1, memory=1, elementwise=1, link=1, host=1),
)
IN_TURN = 1 << 40  # slice_bytes: whole segments, the owners one after another
SLICE = 64 << 20  # bytes: short beside a fetch, and long enough to be followed one by one

MEETINGS = {
    3: (50.00, 50.00),
    4: (44.44, 44.44, 11.11),
    6: (40.96, 40.96, 15.36, 2.56, 0.16),
    8: (39.66, 39.66, 16.52, 3.67, 0.46),
}
ROOFLINE = {1024: (0.19, 0.10), 8192: (0.62, 0.73), 16384: (1.52, 1.27), 32768: (4.77, 1.17)}
ITERATION = {"attention": 269.67, "grouped_gemm": 342.40, "memory": 241.69, "dense_gemm": 177.50}
EXPERT_PARALLEL, PREFETCHING, COPYING = 1319.85, 1131.58, 429.00
SLICING = {1.05: "0.995 -> 1.081", 1.5: "", 2.0: "", 2.64: "1.140 -> 1.139"}  # by compute over prefetch


def contention(trials: int) -> str:
    rows = []
    for size, published in MEETINGS.items():
        simulated = simulated_meetings(size, trials)
        for k, share in enumerate(published):
            formula = 100 * meeting_shares(size)[k]
            rows.append((size, k, share, formula, simulated[k], simulated[k] - formula))
            assert round(formula, 2) == share, (size, k, formula)
    columns = ("ranks", "others met", "published %", "formula %", "simulated %", "difference, points")
    return f"""## Pulls that meet others at one owner

Formula: `meeting_shares` in [contention.py](../vmm_dwdp/planning/contention.py), with its derivation. Simulation: the
runtime's own plans with whole segments, the owners in turn, on links that are never full, so that nothing brings ranks
into step; {trials} random starts, and the pulls of the time in which all ranks run.

{table(columns, rows)}"""


def simulated_meetings(size: int, trials: int) -> dict[int, float]:
    """Percent of pulls, by how many others were met."""
    seconds = float(size - 1)  # a fetch: one from each other rank
    config = DWDPConfig(group_size=size, slice_bytes=IN_TURN)
    busy = LayerWork((Phase(1e-9),), (Phase(1e-9),))  # copies follow one another without a pause
    chance = random.Random(size)
    met: Counter[int] = Counter()
    for _ in range(trials):
        group = Group(
            config=config,
            weights={"w": WeightSpec((size, 1 << 20), torch.uint8)},
            num_layers=4,
            granularity=1,
            rates=Rates(reader=float(1 << 20), owner=float(size << 20), host_reader=1.0, host=1.0),
            start=[chance.uniform(0, seconds) for _ in range(size)],
        )
        met += simulate(group, [[busy]] * size).meetings(seconds, 3 * seconds)
    return {k: 100 * count / met.total() for k, count in met.items()} | {k: 0.0 for k in range(size) if k not in met}


def roofline() -> str:
    prefetch = Estimate(MODEL, PERFECT, DWDPConfig(group_size=4), Batch.of(1024)).prefetch_seconds
    rows = []
    for tokens, (ratio, speedup) in ROOFLINE.items():
        whole = products(layer_operations(MODEL, PERFECT, Batch.of(tokens)))
        share = products(layer_operations(MODEL, PERFECT, Batch.of(tokens), experts=MODEL.num_experts // 4))
        exchanged = share + all_to_all(MODEL, PERFECT, tokens, 4)
        ours = (whole / prefetch, exchanged / max(whole, prefetch))
        rows.append((tokens, ratio, ours[0], percent(ours[0], ratio), speedup, ours[1], percent(ours[1], speedup)))
    columns = ("tokens", "compute / prefetch", "ours", "off by", "T_DEP / T_DWDP", "ours", "off by")
    return f"""## Compute over prefetch, and the time of a layer

Four ranks, one request. Their roofline counts matrix products and attention, all at peak rates: so does ours here
(datasheet: bf16 2.5, FP4 10 PFLOP/s, 8 TB/s, NVLink 900 GB/s; every efficiency 1; norms, activations and the moves of
routing left out). Attention and its projections are bf16, as in the checkpoint; a token travels once to each expert on
another rank, in NVFP4, and comes back in bf16. T_DWDP is the longer of compute and prefetch.

{table(columns, rows)}"""


def products(operations: Iterable[Operation]) -> float:
    return total([operation for operation in operations if operation.kind != "memory"])


def scaled(operations: Sequence[Operation], factor: float) -> list[Operation]:
    return [dataclasses.replace(operation, seconds=operation.seconds * factor) for operation in operations]


def predicted_iteration() -> tuple[float, float]:
    """Milliseconds of an iteration, and of it with copies under way: the mean of four random draws."""
    operations = average_operations(MODEL, GPU, Batch.of(32768, 8192))
    layers = len(MODEL.moe_layers)
    ours = {kind: total([o for o in operations if o.kind == kind]) for kind in ITERATION}
    as_published = [
        dataclasses.replace(o, seconds=o.seconds / ours[o.kind] * ITERATION[o.kind] * 1e-3 / layers) for o in operations
    ]
    results = []
    for seed in range(4):
        chance = random.Random(seed)
        factors = [[chance.uniform(0.8, 1.2) for _ in range(4)] for _ in range(4)]
        mean = statistics.mean(factor for row in factors for factor in row)
        group = Group(
            config=DWDPConfig(group_size=4, slice_bytes=IN_TURN),
            weights=MODEL.expert_weights,
            num_layers=10,
            granularity=GPU.granularity,
            rates=link_rates(GPU),
            resolution="copies",
        )
        outcome = simulate(group, [[layer_work(scaled(as_published, f / mean), GPU) for f in row] for row in factors])
        part = layers / 10 / 4 * 1e3
        results.append((outcome.pass_end[:, -1].mean() * part, outcome.copying.mean() * part))
    predicted, copying = (statistics.mean(column) for column in zip(*results, strict=True))
    return predicted, copying


def iteration() -> str:
    predicted, copying = predicted_iteration()
    computed = sum(ITERATION.values())
    rows = [
        ("expert parallel, of which", EXPERT_PARALLEL, EXPERT_PARALLEL, "given"),
        ("computing", computed, computed, "given"),
        ("communication and synchronisation", EXPERT_PARALLEL - computed, EXPERT_PARALLEL - computed, "given"),
        ("prefetching, without the merge copy", PREFETCHING, predicted, percent(predicted, PREFETCHING)),
        ("saved", EXPERT_PARALLEL - PREFETCHING, EXPERT_PARALLEL - predicted, ""),
        ("copies under way", COPYING, copying, percent(copying, COPYING)),
    ]
    kinds = {
        kind: slowdown(kind, GPU, from_host=False) for kind in ("memory", "dense_gemm", "grouped_gemm", "attention")
    }
    return f"""## An iteration

Given: the operations of the expert-parallel iteration (attention 269.67, grouped GEMM 342.40, other memory-bound
241.69, dense GEMM 177.50). Predicted: the same operations with prefetching, simulated for four ranks whose passes
differ at random by up to 20 %, whole segments in turn. Constants:

- order in a layer, and the split of each kind of operation within it: `layer_operations`, in the roofline's shares;
- link: 0.88 x 900 GB/s, nvbandwidth on GB200;
- while copies use all of the link, memory-bound operations take {kinds["memory"]:.3f} times as long: the copies write
  and are read, 2 x 792 GB/s of the 0.85 x 8 TB/s that can be reached;
- GEMMs {kinds["dense_gemm"]:.3f}: {GEMM_SENSITIVITY:.2f} of the copies' share of the memory's bandwidth, measured on an
  H100;
- attention {kinds["attention"]:.3f}: the paper's measurement of attention beside short copies, in another table;
- where a copy meets others and gets less of the link, it disturbs by less, for longer.

No constant was chosen by this row, but the model was refined while it was in sight: before it knew that GEMMs suffer,
that only a part of the memory's bandwidth can be reached, and that the output projection comes after attention, it said
1085 (-4.1 %).

{table(("", "published", "ours", "off by"), rows)}"""


def slicing() -> str:
    rows = []
    for ratio, published in SLICING.items():
        tokens = tokens_for(ratio)
        in_turn = throughput(tokens, IN_TURN, 1)
        sliced, streams = (100 * (throughput(tokens, *how) / in_turn - 1) for how in ((SLICE, 4), ("streams", 1)))
        rows.append((ratio, tokens, published, sign(sliced), f"{sliced:+.1f} %", f"{streams:+.1f} %"))
    columns = ("compute / prefetch", "tokens", "published", "sign of ours", "slices", "a stream for each owner")
    return f"""## Slices

Throughput of four ranks whose passes differ at random by up to 20 %, against whole segments with the owners in turn on
one stream: with slices of which four are under way, and with the runtime's default, a stream for each owner. A change
under 0.5 % counts as none. Published: throughput over expert parallelism without and with slices, for compute that
barely covers the copies and for compute that covers them well. The ratios are ours; the last is that of the iteration
above, 1131.58 / 429.00.

{table(columns, rows)}"""


def tokens_for(ratio: float) -> int:
    low, high = 256, 1 << 18
    while high - low > 16:
        middle = (low + high) // 2
        estimate = Estimate(MODEL, GPU, DWDPConfig(group_size=4), Batch.of(middle, 8192))
        low, high = (middle, high) if estimate.work.seconds < ratio * estimate.prefetch_seconds else (low, middle)
    return high


def throughput(tokens: int, slice_bytes: int | str, in_flight: int) -> float:
    config = DWDPConfig(group_size=4, slice_bytes=slice_bytes)  # type: ignore[arg-type]
    rates = []
    for seed in range(2):
        chance = random.Random(seed)
        counts = [[round(tokens * chance.uniform(0.8, 1.2)) for _ in range(4)] for _ in range(4)]
        work = [[Estimate(MODEL, GPU, config, Batch.of(n, 8192)).work for n in row] for row in counts]
        group = Group(
            config=config,
            weights=MODEL.expert_weights,
            num_layers=8,
            granularity=GPU.granularity,
            rates=link_rates(GPU),
            in_flight=in_flight,
        )
        ends = simulate(group, work).pass_end[:, -1]
        rates.append(sum(sum(row) / end for row, end in zip(counts, ends, strict=True)))
    return statistics.mean(rates)


def sign(effect: float) -> str:
    return "none" if abs(effect) < 0.5 else "better" if effect > 0 else "worse"


def small_batches() -> str:
    rows = []
    for model, gpu, size in (
        ("deepseek-r1-fp8", "mi355x", 8), ("gpt-oss-120b", "mi355x", 8), ("gpt-oss-120b", "mi355x", 4),
        ("deepseek-r1-nvfp4", "gb200", 4),
    ):  # fmt: skip
        config = DWDPConfig(group_size=size)
        estimate = Estimate(load_model(model), load_gpu(gpu), config, Batch.of(4096))
        rows.append((model, f"{size} x {estimate.gpu.name}", estimate.speedup, f"{estimate.pays_from or 'never'}"))
    return f"""## Small batches

Published: 0.32 to 0.39 times the throughput of expert parallelism at 4,096 tokens a rank, on another vendor's GPU.
Ours, with the presets' efficiencies: a loss everywhere, larger where GPUs are connected one to one, and larger than
published; model and group of the published figures are not known here.

{table(("model", "group", "speedup at 4,096 tokens", "pays from, tokens"), rows)}"""


def cannot_be_run_here() -> str:
    plans = [
        (
            size,
            serial_efficiency(size),
            *(reached(size, slice_bytes, turns).mean for slice_bytes, turns in WAYS.values()),
        )
        for size in (3, 4, 8)
    ]
    work = Estimate(MODEL, GPU, DWDPConfig(group_size=4), Batch.of(16384, 8192)).work
    slow = slower(work, 1.5)
    jitter = []
    for size in (4, 8, 72):
        group = nvl72(size)
        alone = simulate(group, [[work] * 4] * size).pass_end[:, -1]
        beside = simulate(group, [[slow] * 4] + [[work] * 4] * (size - 1)).pass_end[:, -1]
        jitter.append((size, percent(beside[0], alone[0]), percent(beside[1:].max(), alone[1:].max())))
    racks = []
    for tokens in (8192, 16384):
        began = time.process_time()
        one = Estimate(MODEL, GPU, DWDPConfig(group_size=72), Batch.of(tokens, 8192)).work
        chance = random.Random(0)
        passes = [slower(one, chance.uniform(0.8, 1.2)) for _ in range(50)]
        outcome = simulate(nvl72(72, 58), [chance.choices(passes, k=100) for _ in range(72)])
        waited = outcome.exposed.sum() / outcome.pass_end[:, -1].sum()
        spent = time.process_time() - began
        racks.append((tokens, 1e3 * outcome.seconds_per_pass, f"{100 * waited:.2f} %", f"{spent:.0f}"))
    columns = ("ranks", "formula", *WAYS)
    return f"""## What cannot be run here

The share of the links' rate that copies reach when every rank copies all the time, from random starts, by
`benchmarks/pull_policies.py`: in fixed orders, of which a stream for each owner is the runtime's default, and in runs
whose owners are chosen (`slice_bytes: auto`), by the thread that needs no interpreter, or by one of Python's that
gives a run 25 microseconds after the one before ended. The formula is that of independent meetings,
`serial_efficiency`. What four H200 reached: [below](#four-h200-all-pulling).

{table(columns, plans)}
One rank that computes 1.5 times slower than the others (16,384 tokens, requests of 8K): by how much its own passes
take longer, and those of the others at most. Under expert parallelism every rank takes as long as the slowest.

{table(("ranks", "the slow rank", "the others"), jitter)}
An NVL72, 72 ranks x 58 layers x 100 passes that differ at random by up to 20 %. As 256 experts do not divide by 72,
some owners are read from more than others, which shows where copies take longer than compute.

{table(("tokens", "pass, ms", "exposed wait", "simulated in, s of one core"), racks)}"""


def slower(work: LayerWork, factor: float) -> LayerWork:
    def longer(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        return tuple(dataclasses.replace(phase, seconds=factor * phase.seconds) for phase in phases)

    return LayerWork(longer(work.before), longer(work.experts))


def nvl72(size: int, layers: int = 8) -> Group:
    return Group(
        config=DWDPConfig(group_size=size),
        weights=MODEL.expert_weights,
        num_layers=layers,
        granularity=GPU.granularity,
        rates=link_rates(GPU),
        resolution="fetches",
    )


def hidden_on_an_h100() -> str:
    """The table "overlap" of benchmarks/prefetch.py, predicted from its compute alone."""
    found = json.loads((RESULTS / "prefetch-h100.json").read_text())
    about, h100 = found["machine"], load_gpu("h100")
    layer = describe_layer(0, load_model("qwen3-30b-a3b").expert_weights, DWDPConfig(group_size=4), 0, h100.granularity)
    copying = layer.plan.fetched_bytes / h100.host_rate
    factor = slowdown("grouped_gemm", h100, from_host=True)
    rows = []
    for name in ("overlap, slices of 2 MiB", "overlap, auto"):
        for row in found[name]:
            work = LayerWork((), (Phase(row["compute ms"] / 1e3 / OVERLAP_LAYERS, factor),))
            predicted = 1e3 * OVERLAP_LAYERS * steady_period(work, copying, 2)
            rows.append(
                (
                    name,
                    row["compute / copies"],
                    row["compute ms"],
                    predicted,
                    row["both ms"],
                    percent(predicted, row["both ms"]),
                )
            )
    columns = ("copies", "compute / copies", "compute alone, ms", "predicted ms", "measured ms", "off by")
    return f"""## Passes on an H100, experts in host memory

{about["gpu"]}, driver {about["driver"]}, torch {about["torch"]}, {about["date"]}: `{about["command"]}`
([results](../benchmarks/results/prefetch-h100.json)). Passes over four layers with the experts of Qwen3-30B-A3B, three
quarters of them in host memory, two slots. Given: compute alone, as measured there. Predicted with the preset's link
(0.84 x 64 GB/s) and `steady_period`; compute takes {factor:.3f} times as long beside copies. Where the prediction is
highest, compute alone ran hotter, and so slower, than compute that waits.

{table(columns, rows)}"""


def memory_on_an_h100() -> str:
    """The runs of benchmarks/assembly.py, planned."""
    found = json.loads((RESULTS / "assembly-h100.json").read_text())
    ((_, runs),) = ((title, rows) for title, rows in found.items() if title.startswith("4 ranks"))
    config = DWDPConfig(group_size=4)
    weights = {name: WeightSpec((64, 2048, 2048), torch.bfloat16) for name in ("up", "down")}
    planned = expert_memory(describe_layer(0, weights, config, 0, 2 << 20), 8, 0, config.prefetch_depth)
    (taken,) = (run for run in runs if run["way"] == "vmm, torch")
    rows = [
        (what, f"{ours >> 20}", f"{theirs:.0f}", percent(float(ours >> 20), theirs))
        for what, ours, theirs in (
            ("resident", planned.resident, taken["resident MiB"]),
            ("slots", planned.staged, taken["staged MiB"]),
        )
    ]
    return f"""## Memory of a running group

Four ranks on {found["machine"]["gpu"]}, eight layers with two weights of 64 experts, 2048 x 2048, in bf16
([results](../benchmarks/results/assembly-h100.json)): MiB a rank, planned, and as the runtime counted what the driver
gave. `tests/multiprocess/test_planned_memory.py` compares odd shapes, overlap and host memory, to the
byte, without a GPU.

{table(("what", "planned", "taken", "off by"), rows)}"""


def ratios_of(found: dict[str, Any]) -> list[float]:
    """Predicted over measured, of each pass of benchmarks/predicted.py."""
    return [row["predicted ms"] / row["measured ms"] for row in found["pass"]]


def within(ratios: list[float]) -> int:
    return sum(abs(ratio - 1) <= 0.1 for ratio in ratios)


def measured() -> str:
    found = json.loads((RESULTS / "predicted-h200.json").read_text())
    before = ratios_of(json.loads((RESULTS / "predicted-h100.json").read_text()))
    about = found["machine"]
    runs = [
        (r["model"], r["in host memory"], r["tokens"], r["depth"], r["predicted ms"], r["measured ms"],
         percent(r["predicted ms"], r["measured ms"]))
        for r in found["pass"]
    ]  # fmt: skip
    memory = [
        (r["model"], r["ranks"], r["depth"], f"{r['predicted']:,}", f"{r['measured']:,}",
         percent(r["predicted"], r["measured"]))
        for r in found["memory"]
    ]  # fmt: skip
    ratios = ratios_of(found)
    calibrated = [
        shares
        | {"grouped_gemm": ", ".join(f"{tokens[:-2]}: {share}" for tokens, share in shares["grouped_gemm"].items())}
        for shares in found["efficiencies measured"]
    ]
    for shares in calibrated:
        del shares["link"]  # the preset's
    columns = ("model", "experts in host memory", "tokens", "depth", "predicted ms", "measured ms", "off by")
    return f"""## Predicted against measured, compute too

{about["gpu"]}, driver {about["driver"]}, torch {about["torch"]}, {about["date"]}: `{about["command"]}`
([results](../benchmarks/results/predicted-h200.json)). The machine had {about["cpu cores"]} cores and a second GPU,
which ran other benchmarks that do not use this GPU's link. It was calibrated first, with the shapes of each model; no
prediction was told anything of its run. Within 10 %: {within(ratios)} of {len(runs)}; predicted passes take
{min(ratios):.3f} to {max(ratios):.3f} times as long as measured ones. With an earlier calibration, on an H100
([results](../benchmarks/results/predicted-h100.json)), it was {within(before)} of {len(before)}, from
{min(before):.2f} to {max(before):.2f} times.

{table(columns, runs)}
Shares of the peaks that were reached, for grouped products by tokens per expert:

{table(tuple(calibrated[0]), [tuple(row.values()) for row in calibrated])}
Memory that the runtime takes of the GPU, in bytes: by the planner, and by what the driver says is gone. Four ranks are
four processes that share the GPU.

{table(("model", "ranks", "depth", "predicted", "measured", "off by"), memory)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there instead of printing it")
    parser.add_argument("--trials", type=int, default=1500, help="random starts for the meetings (default: 1500)")
    arguments = parser.parse_args()
    title = """# What the planner says, beside what was published and measured

Made by `python benchmarks/validation.py --write docs/validation.md`. "Published" is arXiv 2604.01621.
"""
    sections = (
        contention(arguments.trials), roofline(), iteration(), slicing(), small_batches(), cannot_be_run_here(),
        four_gpus.section(), hidden_on_an_h100(), memory_on_an_h100(), measured(),
    )  # fmt: skip
    page = "\n".join((title, *filter(None, sections)))
    if arguments.write:
        arguments.write.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()

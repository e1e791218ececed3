"""What four H200 reached when all pulled at once, beside what the simulator says of the same: docs/validation.md.

    python benchmarks/four_gpus.py

copies    nothing but copies, DeepSeek-R1's bytes: one thread that sees all and takes each run from the owner with
          fewest pullers, some 25 microseconds after the one before; the runtime's C in a program of four processes;
          and this library's runtime at commit 89f2aac
stacks    passes over stacks of MoE layers, the mean of the ranks: milliseconds, and those of expert parallelism
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from common import Row, parser, percent, report, table
from crossovers import spread_tokens
from moe_stack import STACKS
from pull_policies import MIB, PAIR, RUNS, STREAMS, reached
from stack_prediction import predict

from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.pulling import Turns

RESULTS = Path(__file__).parent / "results"
LOOP_GAP = 25e-6  # seconds in which that thread, a loop in Python, looked at all ranks
RUNTIME: dict[str, int | str] = {"auto": STREAMS, "segments": 1 << 40, "32M": 32 * MIB, "128M": 128 * MIB}


def copies() -> list[Row]:
    """Shares of one large copy's rate, the mean of the four ranks."""
    measured = json.loads((RESULTS / "pulls-4-h200.json").read_text())
    link = measured["one puller, one owner GB/s"]
    rows: list[Row] = []
    for found in measured["one thread that sees all"]:
        if found["owner"] == "fewest pullers first" and found["in flight"] == 1:
            turns = Turns(run_bytes=found["run MiB"] * MIB, gap=LOOP_GAP, native=False)
            seen, said = found["GB/s"] / link, reached(4, RUNS, turns).mean
            rows.append({"copies": f"one thread, runs of {found['run MiB']} MiB", "measured": seen, "simulated": said})
    runs = json.loads((RESULTS / "runs-4-h200.json").read_text())["by the length of a run in MiB, of the pair"]
    for mib, seen in runs.items():
        said = reached(4, RUNS, Turns(run_bytes=int(mib) * MIB)).mean
        rows.append({"copies": f"the runtime's C, runs of {mib} MiB", "measured": seen, "simulated": said})
    for name, slice_bytes in RUNTIME.items():
        rates = [
            rate
            for found in measured["runtime, copies alone"]
            if found["slice_bytes"] == name and found["pulling"] != "one rank"
            for rate in found["each"]
        ]
        seen, said = statistics.mean(rates) * 1e9 / PAIR, reached(4, slice_bytes).mean
        about = "streams, the default of then" if name == "auto" else f"slice_bytes: {name}"
        rows.append({"copies": about, "measured": seen, "simulated": said})
    return rows


def stacks() -> list[Row]:
    """The measured passes ran one at a time, the device idle before and after; so do the simulated ones."""
    measured = json.loads((RESULTS / "multi_gpu-4-h200.json").read_text())["stack"]
    rows: list[Row] = []
    for stack in (STACKS["deepseek-r1"], STACKS["gpt-oss-120b"]):
        tokens = sorted({row["mean tokens"] for row in measured if row["stack"] == stack.name})
        for (mean, spread), shares in spread_tokens(4, tokens).items():
            case = (stack.name, mean, spread)
            found = [row for row in measured if (row["stack"], row["mean tokens"], row["spread"]) == case]
            said = predict(stack, load_gpu("h200"), shares, STREAMS, stops=True)
            row: dict[str, object] = {"stack": stack.name, "tokens": mean, "spread": spread}
            for column in ("dwdp staged ms", "expert parallel ms"):
                row[column] = statistics.mean(rank[column] for rank in found)
                row[f"predicted {column}"] = statistics.mean(rank[f"predicted {column}"] for rank in said)
            rows.append(row)
    return rows


def section() -> str:
    """Of docs/validation.md."""
    alone = [(r["copies"], r["measured"], r["simulated"], _off(r, "simulated", "measured")) for r in copies()]
    columns = ["stack", "tokens", "spread"]
    columns += ["prefetched, ms", "predicted", "off by", "expert parallel, ms", "predicted", "off by"]
    passes = []
    for row in stacks():
        line = [row[name] for name in ("stack", "tokens", "spread")]
        for way in ("dwdp staged ms", "expert parallel ms"):
            line += [f"{row[way]:.0f}", f"{row[f'predicted {way}']:.0f}", _off(row, f"predicted {way}", way)]
        passes.append(line)
    return f"""## Four H200, all pulling

Four H200 of one host (NV18), driver 580.159.04, 2026-11-27; `python benchmarks/four_gpus.py` makes both tables.
Copies alone, DeepSeek-R1's bytes: the share of one large copy's rate, the mean of the ranks, measured
([results](../benchmarks/results/pulls-4-h200.json)) and simulated on links that those who meet share evenly. One
thread: a program that saw all GPUs and gave each the next run from the owner with fewest pullers, about 25 microseconds
after the run before. The runtime's C: the files that choose runs and give them, in a program of four processes that
is not part of this project ([results](../benchmarks/results/runs-4-h200.json)); between two runs of a rank there were
6.4 microseconds, the median, and the simulated ones have the same. There runs that met nobody moved at 366 GB/s while
all four pulled, and at 384 while fewer did, which the simulator does not know. The rest is the runtime at commit
89f2aac.

{table(("copies", "measured", "simulated", "off by"), alone)}
Stacks of MoE layers, the mean of the four ranks ([results](../benchmarks/results/multi_gpu-4-h200.json)), by the
preset's efficiencies, which were measured on machines with one H200 and with two. These passes ran one at a time, with
the device idle before and after, and so do the simulated ones. Few tokens show the copies, many the compute.

{table(columns, passes)}"""


def _off(row: Row, ours: str, theirs: str) -> str:
    return percent(float(row[ours]), float(row[theirs]))  # type: ignore[arg-type]


if __name__ == "__main__":
    report(parser(__doc__).parse_args(), {"copies": copies(), "stacks": stacks()})

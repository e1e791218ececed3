"""What share of the links copies reach when every rank pulls at once, by policy: simulated, so that no GPU is needed.

    python benchmarks/pull_policies.py

Every rank copies DeepSeek-R1's bytes (256 experts in FP8, 11.3 GB a layer), layer after layer without compute, from a
random moment on. A rank's link and an owner's link carry 390 GB/s, what one large copy reached between two H200; those
who pull from one owner share its link evenly. Shares are of that rate: the mean of the ranks, and the worst.

policies    fixed orders (a stream for each owner; segments and slices in turn), and owners chosen run by run as the
            runtime does by default (`layout/turns.py`), by the native thread and by Python's
gaps        runs of the native thread, by the length of a run and the seconds from its end to the start of the next
sight       sixteen ranks that see only those of their own node
rack        the same of 72, which takes many minutes
crossover   from how many tokens a rank on a stack of MoE layers on H200 is no slower than under expert parallelism
"""

from __future__ import annotations

import random
import statistics
from typing import NamedTuple

import torch
from common import Row, parser, report, seen
from crossovers import crossovers, spread_tokens
from moe_stack import STACKS
from stack_prediction import predict

from vmm_dwdp import DWDPConfig, WeightSpec
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.pulling import AS_THE_RUNTIME, Turns
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate

PAIR = 390e9  # bytes a second
EXPERTS = 288  # which 2, 3, 4, 8, 16 and 72 divide
LAYER_BYTES = 256 * 3 * 7168 * 2048
MIB = 1 << 20
STREAMS, RUNS = "streams", "auto"  # slice_bytes
FIXED: dict[str, int | str] = {
    "a stream for each owner": STREAMS,
    "segments in turn": 1 << 40,
    "slices of 64 MiB in turn": 64 * MIB,
}
PYTHON = Turns(gap=25e-6, native=False)  # as late as a loop of Python's was seen to be
WAYS: dict[str, tuple[int | str, Turns]] = {
    **{name: (slice_bytes, AS_THE_RUNTIME) for name, slice_bytes in FIXED.items()},
    "runs": (RUNS, AS_THE_RUNTIME),
    "runs, by a thread of Python's": (RUNS, PYTHON),
}


class Reached(NamedTuple):
    """Shares of the link's rate."""

    mean: float
    worst: float


def reached(
    size: int, slice_bytes: int | str = STREAMS, turns: Turns = AS_THE_RUNTIME, *, starts: int = 3, passes: int = 5
) -> Reached:
    """Of ``size`` ranks that copy all the time: the mean over random starts.

    The first pass of each rank is left out, and the last, after which there is no layer to look ahead to.
    """
    expert = LAYER_BYTES // EXPERTS // 48 * 16
    weights = {"w13": WeightSpec((EXPERTS, 2 * expert), torch.uint8), "w2": WeightSpec((EXPERTS, expert), torch.uint8)}
    alone = 3 * expert * EXPERTS * (size - 1) / size / PAIR
    busy = LayerWork((Phase(1e-9),), (Phase(1e-9),))
    chance = random.Random(size)
    found = []
    for _ in range(starts):
        group = Group(
            config=DWDPConfig(group_size=size, slice_bytes=slice_bytes),  # type: ignore[arg-type]
            weights=weights,
            num_layers=4,
            granularity=1,
            rates=Rates(reader=PAIR, owner=PAIR, host_reader=1.0, host=1.0),
            turns=turns,
            start=[alone * chance.random() for _ in range(size)],
        )
        ends = simulate(group, [[busy] * passes] * size).pass_end
        found.append(4 * (passes - 2) * alone / (ends[:, -2] - ends[:, 0]))
    return Reached(statistics.mean(float(of.mean()) for of in found), min(float(of.min()) for of in found))


def policies() -> list[Row]:
    rows = []
    for size in (2, 3, 4, 8):
        for name, (slice_bytes, turns) in WAYS.items():
            rows.append(seen({"ranks": size, "policy": name} | reached(size, slice_bytes, turns)._asdict()))
    return rows


def gaps() -> list[Row]:
    rows = []
    for size in (4, 8):
        for mib in (32, 64, 128, 256):
            shares = {
                f"{us} us": reached(size, RUNS, Turns(run_bytes=mib * MIB, gap=us * 1e-6)).mean for us in (6.4, 25, 50)
            }
            rows.append(seen({"ranks": size, "run MiB": mib, "run us": mib * MIB / PAIR * 1e6} | shares))
    return rows


def sight() -> list[Row]:
    found = reached(16, starts=1, passes=3)
    rows = [seen({"ranks": 16, "a node": "a stream for each owner"} | found._asdict())]
    return rows + [_seen_by(16, sees) for sees in (4, 8, 16)]


def rack() -> list[Row]:
    return [_seen_by(72, sees) for sees in (8, 72)]


def _seen_by(size: int, sees: int) -> Row:
    return seen({"ranks": size, "a node": sees} | reached(size, RUNS, Turns(sees=sees), starts=1, passes=3)._asdict())


def crossover() -> list[Row]:
    rows: list[Row] = []
    per_rank = [4096, 8192, 16384, 32768]
    for size in (4, 8):
        for policy in (STREAMS, RUNS):
            for name in ("deepseek-r1", "gpt-oss-120b"):
                stack = STACKS[name]
                found = [
                    {"stack": stack.name, "mean tokens": tokens, "spread": spread, **row}
                    for (tokens, spread), shares in spread_tokens(size, per_rank).items()
                    for row in predict(stack, load_gpu("h200"), shares, policy)
                ]
                rows += [seen({"ranks": size, "slice_bytes": policy, **row}) for row in crossovers(found)]
    return rows


TABLES = {"policies": policies, "gaps": gaps, "sight": sight, "rack": rack, "crossover": crossover}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    given = options.parse_args()
    report(given, {name: TABLES[name]() for name in given.only})


if __name__ == "__main__":
    main()

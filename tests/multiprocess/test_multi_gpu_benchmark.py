"""The benchmark for several GPUs runs, and its three parallelisms compute the same; with ranks that share the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmm_dwdp.planning.caches import bank_policy, replay
from vmm_dwdp.planning.routing import read_trace, used_experts

ROOT = Path(__file__).parents[2]


def printed(*options: str, gpus: int = 2) -> dict[str, Any]:
    always = ["--device", "cpu", "--tiny", "--gpus", str(gpus), "--json"]
    command = [sys.executable, "benchmarks/multi_gpu.py", *always, *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_dwdp_is_identical_and_the_baselines_agree() -> None:
    report = printed("--only", "stack", "--preset", "h100")
    rows = report["stack"]
    assert [row["spread"] for row in rows] == ["equal"] * 2 + ["unequal"] * 2
    for row in rows:
        assert row["identical"] is True
        assert row["expert parallel error"] < 1e-6, "the same rows through the same kernel, elsewhere"
        assert row["tensor parallel error"] < 3e-2, "bfloat16 sums in another order"
        assert row["expert parallel imbalance"] == 0, "balanced routing, which is the default"
        assert min(value for column, value in row.items() if column.startswith("predicted")) > 0
    assert [row["spread"] for row in report["crossover"]] == ["equal", "unequal"]


def test_copies_and_products_are_of_every_rank_in_every_case() -> None:
    report = printed("--only", "prefetch", "slowdown")
    cases = [(row["plan"], row["pulling"], row["rank"]) for row in report["prefetch"]]
    every = {(plan, pulling) for plan, pulling, _ in cases}
    assert len(every) == 12
    assert sorted(cases) == sorted(
        (plan, pulling, rank) for plan, pulling in every for rank in range(1 if pulling == "one rank" else 2)
    )
    assert all(row["GB/s"] > 0 and "of the link" not in row for row in report["prefetch"]), "there is no link here"
    for row in report["prefetch, all ranks"]:
        of_ranks = [
            of["GB/s"] for of in report["prefetch"] if all(of[name] == row[name] for name in ("plan", "pulling"))
        ]
        assert row["GB/s, worst"] == min(of_ranks)
    assert {row["plan"] for row in printed("--only", "prefetch", "--plans", "auto")["prefetch"]} == {"auto"}
    assert [row["rank"] for row in report["slowdown"]] == [0, 0, 1, 1]
    assert {row["product"].partition(",")[0] for row in report["slowdown"]} == {"dense", "grouped"}


def test_others_go_on_beside_a_rank_that_stops_or_dies() -> None:
    report = printed("--only", "beside", gpus=3)
    cases = [(row["the last rank"], row["rank"]) for row in report["without one"]]
    assert cases == [(end, rank) for end in ("goes on", "is stopped", "is killed") for rank in (0, 1)]
    assert all(row["GB/s"] > 0 for row in report["without one"])
    assert sorted(row["rank"] for row in report["beside"]) == [0, 0, 1, 1, 2, 2]
    for row in report["beside"]:
        assert row["beside / alone"] == row["beside copies"] / row["alone"]


def test_decoding_by_every_way_has_the_same_states_and_reads_what_missed() -> None:
    rows = printed("--only", "decode")["decode"]  # which ends where a state has other bits
    assert len(rows) == 2 * 2 * (3 + 3 + 2), "weights, sequences, and ways with routing of both kinds"
    assert {row["weights"] for row in rows} == {"bf16", "fp8"}
    for sequences, hits_of_replay, used in replayed():
        for row in (row for row in rows if row["sequences"] == sequences):
            expert_gb = 3 * 256 * 128 * {"bf16": 2.0, "fp8": 1 + 4 / 128**2}[row["weights"]] / 1e9
            if row["experts"] in ("all-to-all", "all-gather"):
                assert 0 < row["error"] < 2e-2, "bfloat16 sums in another order"
            elif row["routing"] == "none hits":
                assert (row["copied"] is None) == (row["hits"] is None) == (row["experts"] != "bank")
                assert row["copied"] is None or row["copied"] == pytest.approx(1 / 8, rel=0.1)
            elif row["experts"] == "in place":
                assert row["GB"] == pytest.approx(used * expert_gb)
            elif row["experts"] == "bank":
                assert row["hits"] == pytest.approx(hits_of_replay, rel=0.1)
                assert row["GB"] == pytest.approx(used * expert_gb * (1 - row["hits"]), rel=0.03)


def replayed() -> Iterator[tuple[int, float, float]]:
    """Sequences of each rank, and the means of two: the hits that the replay of the demo's trace has in banks of a
    quarter, in later rounds, and others' experts of a step."""
    trace = read_trace(ROOT / "benchmarks/traces/demo.npz").mixed()
    for sequences in (1, 3):
        hits, used = [], []
        for rank in range(2):
            chosen = trace.decode[sequences * rank : sequences * (rank + 1), :24]
            now = used_experts(chosen, 16).any(0)  # [steps, layers, experts]
            now[..., 8 * rank : 8 * rank + 8] = False
            found = replay(np.concatenate([now] * 3), 4, bank_policy)
            hits.append(found.hits[48:].sum() / found.uses[48:].sum())
            used.append(now.sum() / 24)
        yield sequences, float(np.mean(hits)), float(np.mean(used))

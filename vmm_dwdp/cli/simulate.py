"""``vmm-dwdp simulate``: a group of any size, rank by rank, with requests of random length."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

from vmm_dwdp.cli.console import print_table
from vmm_dwdp.cli.plan import add_group_arguments, estimate_from
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.simulator import Group, LayerWork, Outcome, Phase, simulate
from vmm_dwdp.planning.work import average_operations, layer_work, link_rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_group_arguments(parser)
    parser.add_argument("--passes", type=int, default=10, metavar="N", help="forward passes of each rank (default: 10)")
    parser.add_argument(
        "--spread", type=float, default=0.2, metavar="SHARE", help="tokens vary evenly by so much (default: 0.2)"
    )
    parser.add_argument("--slow-rank", type=float, metavar="FACTOR", help="rank 0 computes so many times slower")
    parser.add_argument(
        "--resolution",
        choices=("fetches", "copies"),
        default="fetches",
        help="follow each fetch as one flow, or each copy: exact, and slow in large groups (default: fetches)",
    )
    parser.add_argument(
        "--sees",
        type=int,
        metavar="N",
        help="with --slice-bytes auto, of copies: ranks of one node, who see each other (default: all)",
    )
    parser.add_argument("--in-flight", type=int, default=1, metavar="N", help="copies of a stream at once (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random lengths (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    estimate = estimate_from(arguments)
    estimate.require_fit()
    if arguments.passes < 1 or arguments.in_flight < 1 or not 0 <= arguments.spread < 1:
        raise ConfigError("--passes and --in-flight must be at least 1, and --spread at least 0 and less than 1")
    if arguments.slow_rank is not None and arguments.slow_rank <= 0:
        raise ConfigError(f"--slow-rank must be more than 0, not {arguments.slow_rank}")
    if arguments.sees is not None and (arguments.slice_bytes != "auto" or arguments.resolution != "copies"):
        raise ConfigError("--sees needs --slice-bytes auto and --resolution copies: it says whose copies a rank sees")
    random = np.random.default_rng(arguments.seed)
    shape = (estimate.world_size, arguments.passes)
    tokens = np.rint(arguments.tokens * random.uniform(1 - arguments.spread, 1 + arguments.spread, shape)).astype(int)
    slow = {0: arguments.slow_rank} if arguments.slow_rank is not None else {}
    group = Group(
        config=estimate.config,
        weights=estimate.share.expert_weights,
        num_layers=len(estimate.model.moe_layers),
        granularity=estimate.gpu.granularity,
        rates=link_rates(estimate.gpu),
        turns=dataclasses.replace(estimate.turns, sees=arguments.sees),
        in_flight=arguments.in_flight,
        resolution=arguments.resolution,
        nodes=estimate.nodes.count,
    )
    began = time.perf_counter()
    work = [
        [_slowed(estimate.with_tokens(int(count)).work, slow.get(rank, 1.0)) for count in row]
        for rank, row in enumerate(tokens)
    ]
    outcome = simulate(group, work)
    together = _expert_parallel(estimate, tokens, slow)
    report = _report(outcome, work, together) | {"simulated_in_s": time.perf_counter() - began}
    if arguments.json:
        print(json.dumps(report))
    else:
        title = f"{estimate.model.name} on {estimate.world_size} x {estimate.gpu.name}, {arguments.passes} passes"
        print_table(title, ("what", ""), [(name.replace("_", " "), f"{value:.4g}") for name, value in report.items()])
    return 0


def _slowed(work: LayerWork, factor: float) -> LayerWork:
    def longer(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        slowed = (phase.seconds * (1.0 if phase.meets else factor) for phase in phases)
        return tuple(dataclasses.replace(phase, seconds=each) for phase, each in zip(phases, slowed, strict=True))

    return LayerWork(longer(work.before), longer(work.experts))


def _expert_parallel(estimate: Estimate, tokens: Any, slow: dict[int, float]) -> float:
    """Seconds of all passes when every layer waits for the rank with most to do, before its experts and after."""
    model, gpu, size = estimate.model, estimate.gpu, estimate.world_size
    held = max(1, model.num_experts // size)
    total = 0.0
    for column in tokens.T:
        before, experts = 0.0, 0.0
        for rank, count in enumerate(column):
            work = layer_work(average_operations(model, gpu, estimate.with_tokens(int(count)).batch, held), gpu)
            before = max(before, slow.get(rank, 1.0) * sum(phase.seconds for phase in work.before))
            experts += sum(phase.seconds for phase in work.experts) / size
        experts *= max(slow.values(), default=1.0)
        exchange = estimate.nodes.expert_parallel_exchange(model, gpu, int(column.max()), estimate.config.group_size)
        total += len(model.moe_layers) * (before + experts + exchange)
    return total


def _report(outcome: Outcome, work: list[list[LayerWork]], together: float) -> dict[str, float]:
    layers = outcome.exposed.shape[1]
    compute = sum(item.seconds for row in work for item in row) * layers
    ended = outcome.pass_end[:, -1]
    spent = float(ended.sum())
    meetings, met = outcome.meetings(), float(outcome.meeting.sum())
    return {
        "pass_ms": outcome.seconds_per_pass * 1e3,
        "slowest_rank_ms": float(ended.max()) / outcome.pass_end.shape[1] * 1e3,
        "fastest_rank_ms": float(ended.min()) / outcome.pass_end.shape[1] * 1e3,
        "exposed_wait_share": float(outcome.exposed.sum()) / spent,
        "waited_for_nodes_share": met / spent,
        "slowed_by_copies_share": 1 - (compute + met + float(outcome.exposed.sum())) / spent,
        "copying_share": float(outcome.copying.sum()) / spent,
        "pulls_that_met_others_share": 1 - meetings[0] / meetings.total() if meetings else 0.0,
        "expert_parallel_pass_ms": together / outcome.pass_end.shape[1] * 1e3,
        "throughput_over_expert_parallel": float(np.mean(together / ended)),
    }

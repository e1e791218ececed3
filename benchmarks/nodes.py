"""Experts over nodes: the part of `multi_gpu.py` that takes GPUs of one machine for nodes, joined by rails.

    python benchmarks/multi_gpu.py --gpus 4 --nodes 2 --json

Four GPUs are 2 x 2: the ranks of a node are a DWDP group over NVLink with half of the experts, and tokens go between
nodes by NCCL's all-to-all on two rails. Beside it one DWDP group of all ranks, and expert parallelism over all ranks.

    nodes            passes over a stack, by rank: NCCL over NVLink, and again without P2P and shared memory, which
                     leaves it sockets: a slow network, for all that expert parallelism sends within nodes too
    bytes            that a rank fetches for a layer in both ways, and their ratio
    nodes crossover  from how many tokens on each way is no slower than expert parallelism, and from how many it takes
                     longer than its copies, measured and predicted: see `hidden_from`

Every rank's clock runs while all ranks run passes ([Note: Clocks] in ranks.py); on a rail the rank of node 0 says
whether to go on, so that all of it run as many.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from common import require_within_link, seen
from crossovers import Row, crossovers, spread_tokens
from moe_stack import (
    DTYPE,
    Bind,
    Routed,
    Stack,
    between,
    dwdp,
    expert_parallel,
    reference,
    route,
    run_experts,
    weights,
)
from node_prediction import predict_nodes
from ranks import Place, Together, collectives, steady

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.nodes import NodeShare
from vmm_dwdp.nodes.rail import NOT_HERE, Dispatched, TorchRail
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu
from vmm_dwdp.testing import RankFailed, run_group

SLOW: Final = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
MOST_ERROR: Final = 0.06  # relative, of all tokens together; to round sums once more makes 0.04 in six layers
MOST_OF_A_TOKEN: Final = 0.3  # relative; one wrong expert of its four in one layer makes 0.5 and more


class Case(NamedTuple):
    """What is run by one group of processes.

    Attributes:
        name: of what NCCL goes over.
        per_rank: mean tokens of a rank.
        passes: that are timed.
        prefetches: whether one DWDP group of all ranks is timed, which NCCL does not change.
    """

    name: str
    environment: dict[str, str]
    per_rank: list[int]
    passes: int
    prefetches: bool


TINY: Final = [Case("gloo", {}, [32], 2, True)]
NVLINK: Final = Case("NVLink", {}, [2048, 4096, 8192, 16384, 32768], 5, True)
SOCKETS: Final = Case("sockets", SLOW, [2048, 8192], 2, False)


class OnRail(Together):
    """`Together` where the ranks of a rail run as many passes: that of node 0 is asked, and the others hear of it."""

    def __init__(self, folder: Path, rank: int, ranks: int, group_size: int) -> None:
        super().__init__(folder, rank, ranks)
        self._node, self._rail = divmod(rank, group_size)
        self._asked = 0

    def is_said_by_all(self, word: str) -> bool:
        answer = self._folder / f"answer-{self._rail}-{self._asked}"
        self._asked += 1
        if self._node == 0:
            said = super().is_said_by_all(word)
            answer.with_suffix(".part").write_text(str(int(said)))
            answer.with_suffix(".part").rename(answer)
            return said
        while not answer.exists():
            time.sleep(1e-4)
        return answer.read_text() == "1"


@contextmanager
def hybrid(
    stack: Stack, nodes: int, rank: int, group_size: int, rail: TorchRail, place: Place, folder: Path
) -> Iterator[Bind]:
    """Passes in which experts are spread over ``nodes``, and each node's over a group of ``group_size``.

    Args:
        rank: of all ranks, node after node; ``folder``: where those of a node meet.
    """
    node, own_rank = divmod(rank, group_size)
    device = place.device(rank)
    own = NodeShare(stack.num_experts, nodes).experts(node)
    config = DWDPConfig(group_size=group_size)
    with DWDPRuntime(config, own_rank, device, folder / f"node-{node}", driver=place.driver(rank)) as runtime:
        for layer in range(stack.num_layers):
            runtime.add_layer(layer, shapes(stack, len(own)))
            for row, expert in enumerate(runtime.local_experts(layer)):
                values = weights(stack, layer, own.start + expert, device)
                for name, value in zip(("w13", "w2"), values, strict=True):
                    runtime.local_shard(layer, name)[row].copy_(value)
        runtime.publish(timeout=120)
        attention = between(stack, device)

        def run(x: torch.Tensor, chosen: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
            for layer in range(stack.num_layers):
                x = attention(x)
                with runtime.exchange(layer):
                    there = rail.dispatch(x, chosen, factors, stack.num_experts)
                with runtime.layer(layer) as held:
                    sums = partial_sums(there, len(own), held["w13"], held["w2"])  # type: ignore[arg-type]
                with runtime.exchange(layer):
                    x = rail.combine(sums, there)
            return x

        def bind(every: list[Routed]) -> Callable[[], torch.Tensor]:
            routed = every[rank]
            chosen = choices(stack, routed)
            return partial(run, routed.x, chosen, torch.full(chosen.shape, 1 / stack.top_k, device=device))

        yield bind


def shapes(stack: Stack, experts: int) -> dict[str, WeightSpec]:
    return {
        "w13": WeightSpec((experts, 2 * stack.intermediate, stack.hidden), DTYPE),
        "w2": WeightSpec((experts, stack.hidden, stack.intermediate), DTYPE),
    }


def choices(stack: Stack, routed: Routed) -> torch.Tensor:
    """``[T, k]``: each token's experts."""
    experts = torch.arange(stack.num_experts, device=routed.x.device).repeat_interleave(routed.counts)
    return torch.empty_like(routed.order).scatter_(0, routed.order, experts).view(-1, stack.top_k)


def partial_sums(there: Dispatched, experts: int, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Of each row that came, over its experts on this node: choice by choice, so that there is one order."""
    key = torch.where(there.experts == NOT_HERE, experts, there.experts).flatten()
    counts = key.bincount(minlength=experts + 1)[:experts]
    order = key.argsort(stable=True)[: int(counts.sum())]
    row = order // there.experts.shape[1]
    out = run_experts(there.hidden[row], counts, w13, w2) * there.weights.flatten()[order, None].to(DTYPE)
    by_choice = out.new_zeros(key.numel(), out.shape[1])
    by_choice[order] = out
    return by_choice.view(*there.experts.shape, -1).sum(1)


def _rank(
    place: Place, stack: Stack, nodes: int, count: int, case: Case, cases: list[list[int]], folder: str, rank: int
) -> list[Row]:
    """Every way, one after another, each with every number of tokens."""
    device, group_size = place.device(rank), count // nodes
    routings = [
        [route(stack, tokens, other, device, balanced=True) for other, tokens in enumerate(each)] for each in cases
    ]
    rows: list[Row] = [{"rank": rank, "tokens": each[rank]} for each in cases]

    def measure(column: str, bind: Bind, together: Callable[[Path], Together | None]) -> Iterator[torch.Tensor]:
        for number, (row, every) in enumerate(zip(rows, routings, strict=True)):
            run = bind(every)
            dist.barrier()
            row[column] = steady(place, run, case.passes, together(Path(folder, column, str(number)))) * 1e3
            dist.barrier()
            yield run()

    with collectives(rank, count, place, folder):
        rails = [dist.new_group(list(range(each, count, group_size))) for each in range(group_size)]
        rail = TorchRail(rails[rank % group_size])
        whole = reference(stack, device, [every[rank] for every in routings])
        if case.prefetches:
            config, driver = DWDPConfig(group_size=count), place.driver(rank)
            with dwdp(stack, config, rank, device, Path(folder, "one"), driver=driver) as (_, run):
                found = measure("dwdp staged ms", run("staged"), lambda path: Together(path, rank, count))
                for row, ours, expected in zip(rows, found, whole, strict=True):
                    row["identical"] = torch.equal(ours, expected)
        with hybrid(stack, nodes, rank, group_size, rail, place, Path(folder)) as bind:
            found = measure("over nodes ms", bind, lambda path: OnRail(path, rank, count, group_size))
            for row, ours, expected in zip(rows, found, whole, strict=True):
                row |= errors("over nodes", ours, expected)
        found = measure("expert parallel ms", expert_parallel(stack, rank, count, device), lambda _: None)
        for row, ours, expected in zip(rows, found, whole, strict=True):
            row |= errors("expert parallel", ours, expected)
    for row, every in zip(rows, routings, strict=True):
        row["sent bytes"] = sent_bytes(stack, nodes, rank // group_size, every[rank])
    return rows


def errors(way: str, found: torch.Tensor, expected: torch.Tensor) -> Row:
    """Relative, ``[T, hidden]``: of all tokens together, and of the one for which it is most."""
    wrong, right = found.double() - expected.double(), expected.double()
    of_token = (wrong.norm(dim=1) / right.norm(dim=1)).max()
    return {f"{way} error": float(wrong.norm() / right.norm()), f"{way} error, a token": float(of_token)}


def sent_bytes(stack: Stack, nodes: int, node: int, routed: Routed) -> int:
    """To other nodes for a layer, there and back of the tokens' sums, as many bytes."""
    share, chosen = NodeShare(stack.num_experts, nodes), choices(stack, routed)
    visits = 0
    for other in set(range(nodes)) - {node}:
        own = share.experts(other)
        visits += int(((chosen >= own.start) & (chosen < own.stop)).any(1).sum())
    return visits * stack.hidden * DTYPE.itemsize


def fetched_bytes(stack: Stack, experts: int, group_size: int, granularity: int) -> int:
    """Of the rank that fetches most, for a layer."""
    config, spec = DWDPConfig(group_size=group_size), shapes(stack, experts)
    return max(describe_layer(0, spec, config, rank, granularity).plan.fetched_bytes for rank in range(group_size))


def run_case(place: Place, stack: Stack, nodes: int, count: int, case: Case, gpu: GpuSpec | None) -> list[Row]:
    spreads = spread_tokens(count, case.per_rank)
    before = {name: os.environ.get(name) for name in case.environment}
    os.environ.update(case.environment)  # of the ranks that begin
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = partial(_rank, place, stack, nodes, count, case, list(spreads.values()), folder)
            found = run_group(run, count, place.device_type)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    rows: list[Row] = []
    for number, ((tokens, spread), shares) in enumerate(spreads.items()):
        about = {"stack": stack.name, "network": case.name, "mean tokens": tokens, "spread": spread}
        said = predict_nodes(stack, gpu, shares, nodes) if gpu and case.name == NVLINK.name else [{}] * count
        rows += [about | of_rank[number] | ours for of_rank, ours in zip(found, said, strict=True)]
    return rows


def with_rates(rows: list[Row], stack: Stack, nodes: int, count: int, case: Case, granularity: int) -> list[Row]:
    """With GB/s of what certainly moved in the timed passes, and TFLOP/s: what the hardware bounds."""
    layers = (case.passes * stack.num_layers - 2) / case.passes  # of a pass; two may have been in slots before
    share = NodeShare(stack.num_experts, nodes)
    by_node = fetched_bytes(stack, min(len(share.experts(node)) for node in range(nodes)), count // nodes, granularity)
    one = fetched_bytes(stack, stack.num_experts, count, granularity)
    products = 6 * stack.top_k * stack.hidden * stack.intermediate + stack.attention_flops_per_token
    for row in rows:
        seconds = row["over nodes ms"] / 1e3
        row["over nodes GB/s"] = by_node * layers / seconds / 1e9
        row["rail GB/s"] = 2 * row["sent bytes"] * stack.num_layers / seconds / 1e9
        if "dwdp staged ms" in row:
            row["dwdp GB/s"] = one * layers / (row["dwdp staged ms"] / 1e3) / 1e9
        same = [each for each in rows if _case(each) == _case(row)]
        of_rail = [each for each in same if (each["rank"] - row["rank"]) % (count // nodes) == 0]
        computed = {
            "dwdp staged ms": [row],
            "over nodes ms": of_rail,
            "expert parallel ms": same,
        }  # with whom it shares
        row["TFLOP/s, most"] = max(
            products * stack.num_layers * statistics.mean(each["tokens"] for each in sharing) / row[way] / 1e9
            for way, sharing in computed.items()
            if way in row
        )
    return rows


def _case(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("stack", "network", "mean tokens", "spread"))


def bytes_table(stack: Stack, nodes: int, count: int, granularity: int) -> list[Row]:
    share = max(len(NodeShare(stack.num_experts, nodes).experts(node)) for node in range(nodes))
    by_node = fetched_bytes(stack, share, count // nodes, granularity)
    one = fetched_bytes(stack, stack.num_experts, count, granularity)
    row = {"stack": stack.name, "ranks": count, "nodes": nodes, "one group, GB": one / 1e9}
    return [row | {"over nodes, GB": by_node / 1e9, "ratio": one / by_node}]


def crossing(rows: list[Row]) -> list[Row]:
    """`crossovers` of each way beside expert parallelism."""
    found = []
    for network in _networks(rows):
        of = [row for row in rows if row["network"] == network]
        for way in ("dwdp staged", "over nodes"):
            names = {f"{source}{way} ms": f"{source}dwdp staged ms" for source in ("", "predicted ")}
            if not names.keys().isdisjoint(of[0]):
                kept = [{k: v for k, v in row.items() if k in names or k not in names.values()} for row in of]
                renamed = [{names.get(name, name): value for name, value in row.items()} for row in kept]
                found += [
                    {"network": network, "way": way, **row, **_hidden(renamed, row)} for row in crossovers(renamed)
                ]
    return found


def _hidden(rows: list[Row], of: Row) -> Row:
    """`hidden_from` for one row of `crossovers`, measured and, where known, predicted."""
    same = [row for row in rows if (row["stack"], row["spread"]) == (of["stack"], of["spread"])]
    found = {}
    for source in ("", "predicted "):
        if f"{source}dwdp staged ms" in same[0] and len({row["mean tokens"] for row in same}) > 1:
            by_tokens = {
                tokens: statistics.mean(row[f"{source}dwdp staged ms"] for row in same if row["mean tokens"] == tokens)
                for tokens in dict.fromkeys(row["mean tokens"] for row in same)
            }
            found[f"{source}copies hidden from"] = hidden_from(by_tokens)
    return found


def hidden_from(times: dict[int, float]) -> float:
    """The tokens from which a pass takes longer than its copies, of its times by tokens.

    With few tokens a pass takes as long as its copies, whatever the tokens, and with many in proportion to them: the
    two meet there. It falls with the bytes that are fetched, and with the time in which they are.
    """
    few, many = min(times), max(times)
    return times[few] * many / times[many]


def tables(
    place: Place, stacks: list[Stack], nodes: int, count: int, preset: str | None, link: float | None
) -> dict[str, list[Row]]:
    """All of this part. ``link``: GB/s of one large copy of this run.

    Raises:
        SystemExit: a figure is more than the hardware has, or results differ.
    """
    gpu = load_gpu(preset) if preset else None
    granularity = gpu.granularity if gpu and not place.tiny else 4096
    rows: list[Row] = []
    failed: list[Row] = []
    for stack in stacks:
        for case in TINY if place.tiny else (NVLINK, SOCKETS):
            try:
                found = run_case(place, stack, nodes, count, case, gpu)
            except RankFailed as failure:
                if case is not SOCKETS:  # which some machines refuse NCCL; what was measured before stays
                    raise
                failed.append({"stack": stack.name, "network": case.name, "why": str(failure)})
                continue
            found = with_rates(found, stack, nodes, count, case, granularity)
            require_right(found)
            if link is not None:
                require_within_link(found, link, ["over nodes GB/s", "rail GB/s", "dwdp GB/s"])
            if gpu is not None and not place.tiny:
                require_within_peak(found, gpu.peak("bf16") / 1e12)
            rows += map(seen, found)
    by_network = {name: [row for row in rows if row["network"] == name] for name in _networks(rows)}
    return {
        **{f"nodes, {name}": of for name, of in by_network.items()},
        "bytes": [row for stack in stacks for row in bytes_table(stack, nodes, count, granularity)],
        **{f"nodes crossover, {name}": crossing(of) for name, of in by_network.items()},
        **({"not run": failed} if failed else {}),
    }


def predictions(stacks: list[Stack], nodes: int, count: int, preset: str) -> list[Row]:
    """What the planner says of the GPU ``preset``, its links between nodes, too; needs no GPU."""
    rows: list[Row] = []
    for stack in stacks:
        for (tokens, spread), shares in spread_tokens(count, NVLINK.per_rank).items():
            about = {"stack": stack.name, "network": NVLINK.name, "mean tokens": tokens, "spread": spread}
            rows += [about | said for said in predict_nodes(stack, load_gpu(preset), shares, nodes)]
    return crossing(rows)


def _networks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def require_right(rows: list[Row]) -> None:
    for row in rows:
        right = [
            row[f"{way} error"] <= MOST_ERROR and row[f"{way} error, a token"] <= MOST_OF_A_TOKEN  # which no NaN is
            for way in ("over nodes", "expert parallel")
        ]
        if not (row.get("identical", True) and all(right)):
            raise SystemExit(f"a result differs from the pass with all experts in the rank's own memory: {row}")


def require_within_peak(rows: list[Row], peak: float) -> None:
    for row in rows:
        if not 0 < row["TFLOP/s, most"] <= peak:
            raise SystemExit(f"{row} cannot be: the GPU's peak is {peak:.0f} TFLOP/s. No figure is printed")

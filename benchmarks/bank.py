"""A bank of experts in decoding, all experts in host memory: over recorded routing, and where nothing hits.

A pass is a number of MoE layers of a model's shapes, as in decode.py, with what sorts the rows by expert, replayed from
a CUDA graph; ours in Triton is the grouped GEMM. In each step the same routing goes through a pass without a bank, one
with it, and one with all experts in the GPU's own memory, in turns, because the link of a shared host drifts. Every
pass with the bank is compared to the bit with the one on the GPU. Routing: a trace's sequences decode after their
prompts' last tokens, which fill the bank and are not timed; or adversary.py chooses, so that nothing hits and as much
is copied as the planner lets happen. On the CPU the same runs on the host driver, without graphs, which says nothing
about a link.

batch        sequences decoded together
routing      the trace, or "none hits"
hits         part of the experts used that were in the bank
copied       part of the experts used that were copied into it
replayed     hits, of the replay of its policy
foresight    the same, if it were known what is used next
gpu          ms, the mean over steps, all experts in the GPU's own memory
in place     ms, without the bank
planned      ms, where the bank is empty, and stays so: what the planner costs
bank         ms, with the bank
gain         in place / bank
planner      planned / in place, less 1
link         GB/s of a copy from host memory, before or after: the faster, as the link of a shared host drifts
of bound     (bytes that missed / link + gpu) / bank
in place of bound  (bytes used / link + gpu) / in place
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from adversary import BEFORE, none_hits
from common import LINK_TOLERANCE, parser, report, seen
from decode import COPIED, SHAPES, Gemm, Shape, Weights, captured, copied, elapsed, our_gemm, published
from routing import recorded
from torch import Tensor

from vmm_dwdp import DWDPRuntime
from vmm_dwdp.config import ModeSetting
from vmm_dwdp.memory import bank as memory_bank
from vmm_dwdp.planning.caches import bank_policy, foresight, replay_decoding
from vmm_dwdp.planning.routing import used_experts

TRACES = Path(__file__).parent / "traces"
COPIES = 5  # of the link, of which the median counts
NONE_HITS = "none hits"
TIMED = 32  # passes in which nothing hits


def each_expert(x: Tensor, rows: Tensor, weights: Weights, gemm: Gemm) -> Tensor:
    """What each of a token's experts gives, ``[batch, top_k, hidden]``.

    Args:
        rows: ``[batch, top_k]``, where each chosen expert is in the weights.
    """
    in_order, order = rows.flatten().sort(stable=True)
    places = torch.arange(len(weights["w13"]), device=x.device)
    ends = torch.searchsorted(in_order, places, right=True).int()
    gate, up = gemm(x[order // rows.shape[1]], weights["w13"], ends, None).chunk(2, dim=1)
    y = gemm((F.silu(gate) * up).contiguous(), weights["w2"], ends, None)
    return torch.empty_like(y).index_copy_(0, order, y).view(*rows.shape, -1)


def routed(x: Tensor, rows: Tensor, weights: Weights, gemm: Gemm) -> Tensor:
    """What a layer gives, ``[batch, hidden]``: the mean of its experts'."""
    return each_expert(x, rows, weights, gemm).mean(1)


class Passes:
    """Passes of one batch size over a runtime's layers, and over copies of them on the GPU.

    Attributes:
        chosen: int64 ``[layers, batch, top_k]`` on the device: the experts of each token of the pass to come.
    """

    def __init__(
        self, shape: Shape, runtime: DWDPRuntime, whole: dict[int, Weights], batch: int, gemm: Gemm = our_gemm
    ) -> None:
        self.shape, self.runtime, self.whole, self.gemm = shape, runtime, whole, gemm
        self.x = torch.randn(batch, shape.hidden, device=runtime.device).to(shape.dtype)
        self.chosen = torch.zeros(shape.layers, batch, shape.top_k, dtype=torch.long, device=runtime.device)
        self.chosen[:] = torch.arange(shape.top_k, device=runtime.device)

    def on_gpu(self) -> Tensor:
        x = self.x
        for number, weights in self.whole.items():
            x = routed(x, self.chosen[number], weights, self.gemm)
        return x

    def spread(self, *, banked: bool = False, mode: ModeSetting = "in_place") -> Tensor:
        x = self.x
        for number in range(self.shape.layers):
            with self.runtime.layer(number, mode=mode, tokens=len(x)) as weights:
                rows = self.chosen[number]
                if banked:
                    weights, rows = self.runtime.look_up(number, rows)
                x = routed(x, rows, weights, self.gemm)  # type: ignore[arg-type]
        return x


def graphed(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """What runs it once more, and what it gives then; on the CPU without a graph."""
    y = run()
    if not y.is_cuda:
        return lambda: y.copy_(run()), y
    held = [y]
    return captured(lambda: held.__setitem__(0, run())), held[0]


def in_turn(runs: dict[str, Callable[[], object]], place: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each."""
    names = list(runs)
    return {name: elapsed(runs[name], device) * 1e3 for name in (reversed(names) if place % 2 else names)}


def tokens_of(trace: str, shape: Shape, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of one group of sequences after another: experts ``[tokens, layers, batch, top_k]`` of the prompts and in
    decoding."""
    found = recorded(TRACES / f"{trace}.npz")
    for first in range(0, len(found.kinds) - batch + 1, batch):
        used = [part[:, first : first + batch, : shape.layers] for part in (found.prefill, found.decode)]
        ids = [torch.from_numpy(part.nonzero()[-1]).view(*part.shape[:-1], shape.top_k) for part in used]
        yield ids[0].transpose(1, 2).contiguous(), ids[1].transpose(1, 2).contiguous()


def nothing_hits(shape: Shape, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of one group, chosen against the planner."""
    chosen = torch.from_numpy(none_hits(shape.experts, shape.top_k, batch, passes=BEFORE + TIMED))
    ids = chosen[:, None].expand(-1, shape.layers, -1, -1)
    yield ids[:BEFORE].contiguous(), ids[BEFORE:].contiguous()


def steps_of(
    routing: str, shape: Shape, batch: int, groups: int, room: int
) -> Iterator[tuple[Tensor, Tensor, dict[str, float]]]:
    """So many of these groups, and the hits that the replay has, in banks with ``room``."""
    policies = {"replayed": bank_policy, "foresight": foresight}
    found = nothing_hits(shape, batch) if routing == NONE_HITS else tokens_of(routing, shape, batch)
    for ids in itertools.islice(found, groups):
        used = [used_experts(part.transpose(1, 2).numpy().astype(np.uint16), shape.experts) for part in ids]
        yield *ids, {name: replay_decoding(*used, room, policy, batch).share() for name, policy in policies.items()}


def measure(
    shape: Shape, runtime: DWDPRuntime, whole: dict[int, Weights], batch: int, routing: str, groups: int
) -> dict[str, Any]:
    """One row. Ends the command where a pass on a GPU is ahead of its bound."""
    link = measured_link(runtime)
    run = Passes(shape, runtime, whole, batch)
    bank = runtime._assembly.bank
    assert bank is not None
    on_gpu, expected = graphed(run.on_gpu)
    in_place, _ = graphed(run.spread)
    banked, found = graphed(partial(run.spread, banked=True))
    most, memory_bank.MOST_COPIED = memory_bank.MOST_COPIED, 0  # type: ignore[misc]
    planned, _ = graphed(partial(run.spread, banked=True))
    memory_bank.MOST_COPIED = most  # type: ignore[misc]
    turns: list[dict[str, float]] = []
    shares: list[dict[str, float]] = []
    used, hits, copies = 0, 0, 0
    for prompt, decoding, share in steps_of(routing, shape, batch, groups, bank.stats().rows[0]):
        shares.append(share)
        forget(runtime)
        plans = []
        for place, chosen in enumerate(decoding.to(runtime.device)):
            run.chosen.copy_(chosen)
            plans.append(in_turn({"in place": in_place, "planned": planned}, place, runtime.device))
        forget(runtime)
        for chosen in prompt.to(runtime.device):
            run.chosen.copy_(chosen)
            banked()
        before = runtime.bank_counts()
        for place, chosen in enumerate(decoding.to(runtime.device)):
            run.chosen.copy_(chosen)
            runs = {"gpu": on_gpu, "in place": in_place, "bank": banked}
            turns.append(in_turn(runs, place, runtime.device))
            turns[-1]["planner"] = plans[place]["planned"] - plans[place]["in place"]
            if not torch.equal(found, expected):
                raise SystemExit("from the bank, weights give other bits than on the GPU")
        for number, counts in runtime.bank_counts().items():
            counted = zip((used, hits, copies), counts, before[number], strict=True)
            used, hits, copies = (total + now - then for total, now, then in counted)
        runtime.check_integrity(verify=False)
        bank.verify()
    link = max(link, measured_link(runtime))
    ms = {name: statistics.mean(turn[name] for turn in turns) for name in turns[0]}
    expert = sum(weight[0].nbytes for weight in whole[0].values())
    all_ms, missed_ms = (count / len(turns) * expert / link / 1e6 for count in (used, used - hits))
    row = {
        "batch": batch,
        "routing": routing,
        "hits": hits / used,
        "copied": copies / used,
        **{name: statistics.mean(share[name] for share in shares) for name in ("replayed", "foresight")},
        **{name: ms[name] for name in ("gpu", "in place")},
        "planned": ms["in place"] + ms["planner"],
        "bank": ms["bank"],
        "gain": ms["in place"] / ms["bank"],
        "planner": ms["planner"] / ms["in place"],
        "link": link,
        "of bound": (missed_ms + ms["gpu"]) / ms["bank"],
        "in place of bound": (all_ms + ms["gpu"]) / ms["in place"],
    }
    seen(row)
    if runtime.device.type == "cuda" and max(row["of bound"], row["in place of bound"]) > LINK_TOLERANCE:
        raise SystemExit(f"{row} cannot be: the link is faster than the copies that were timed. No figure is printed")
    return row


def forget(runtime: DWDPRuntime) -> None:
    """The bank is empty, and has seen nothing."""
    bank = runtime._assembly.bank
    assert bank is not None
    for table in bank._tables.values():
        table.scores.zero_()
        table.credit.zero_()
    bank.empty()


def measured_link(runtime: DWDPRuntime) -> float:
    """GB/s of a copy from host memory."""
    with runtime.layer(0, mode="in_place") as weights:
        weight = weights["w13"]
        source = weight.view(-1)[: COPIED // weight.dtype.itemsize]  # type: ignore[union-attr]
        copy = partial(torch.empty_like(source).copy_, source)
        copy()
        seconds = statistics.median(elapsed(copy, runtime.device) for _ in range(COPIES))
        nbytes = source.nbytes
        del weights, weight, source, copy
    return nbytes / seconds / 1e9


def main() -> None:
    arguments_of = parser(__doc__)
    add = arguments_of.add_argument
    add("--model", choices=("Qwen3-30B-A3B", "tiny"), default="Qwen3-30B-A3B", help="(default: Qwen3-30B-A3B)")
    add("--batch", type=int, action="append", help="sequences; may be repeated (default: 1, 4, 16)")
    add("--routing", action="append", help=f"a trace, or '{NONE_HITS}'; may be repeated (default: both, and that)")
    add("--groups", type=int, default=2, help="of sequences that are decoded, one after another (default: 2)")
    arguments = arguments_of.parse_args()
    shape = SHAPES[arguments.model]
    if arguments.model == "tiny":  # with as many experts as the demo's trace
        shape = shape._replace(top_k=4)
    routings = arguments.routing or (
        ["mixed-0.01", "mixed-0.001", NONE_HITS] if arguments.model != "tiny" else ["demo", NONE_HITS]
    )
    banked = 2.0 if arguments.model == "tiny" else 0.25  # whose experts fill no page
    with published(shape, arguments.device, 0.0, banked=banked) as runtime:
        whole = copied(shape, runtime)
        rows = [
            measure(shape, runtime, whole, batch, routing, arguments.groups)
            for batch in arguments.batch or [1, 4, 16]
            for routing in routings
        ]
    about = f"{arguments.model}: {shape.layers} layers of {shape.experts} experts, {shape.dtype}, a bank of a quarter"
    report(arguments, {about: rows})


if __name__ == "__main__":
    main()

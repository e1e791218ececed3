"""The part of `multi_gpu.py` about decoding: experts of other GPUs read in place, through a bank, or where they are.

    python benchmarks/multi_gpu.py --gpus 2 --only decode --json

A step is a token of each sequence through MoE layers with Qwen3-30B-A3B's experts, each after a norm and added to what
came in; attention is left out. Experts are spread over the ranks, and each rank decodes sequences of its own, of
recorded routing: so many tokens that they wrote, again and again. All ways have the same weights and the same kernel
for few tokens. A step is a CUDA graph that takes the next row of a table of choices; the clock runs over one round of
the table, while all ranks decode ([Note: Clocks] in ranks.py). Each rank's states of a whole round are compared, to the
bit, with those of experts in its own memory, which no other rank has written; expert parallelism adds up in another
order, and its error is stated.

weights           of the experts, bf16 or FP8 with scales of blocks
sequences         of each rank
routing           the trace, or "none hits": chosen by adversary.py so that nothing hits and as much is copied as the
                  planner lets happen, half of the experts of other ranks; of 16 sequences four times four choose alike
experts           "own": all in each rank's own memory; "in place": those of others read over the link; "bank": the
                  same, with room for a quarter of a layer's experts on the rank; "all-to-all" and "all-gather": expert
                  parallelism, each token sent to all ranks once, and one sum of each rank for it back, by NCCL's
                  all-to-all both ways, or by all-gather and reduce-scatter
graph             whether a step was a CUDA graph
ms                of a step, the mean of the ranks and the worst
hits, copied      parts of the other ranks' experts used that were in the bank, and that were copied into it
GB                of other ranks' experts that crossed the link to a rank in a step, the mean
GB/s              GB / ms, the highest of the ranks
over the bound    ms / (GB / one large copy's rate + ms of "own"), the mean of the ranks and the worst
over in place     mean ms / mean ms of "in place", same routing
over expert parallel  mean ms / mean ms of the faster of its two exchanges
error             of expert parallelism's states, relative, the worst rank's
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from adversary import ROUND
from bank import NONE_HITS, forget
from common import require_within_link, seen
from crossovers import Row
from decode import captured
from decode_steps import EXCHANGES, Mix, Steps, expert_parallel, nothing_hits, read_by, recorded, uses
from decoder import SHAPES, Shape, Weights
from expert_formats import fill, specs
from ranks import Place, Together, collectives, steady
from torch import Tensor
from whole_model import TRACES, Readers, bank_nbytes

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.routing import read_trace
from vmm_dwdp.testing import run_group

FORMATS: Final = ("bf16", "fp8")
BANK: Final = 0.25  # of a layer's experts
OWN, IN_PLACE, BANKED = "own", "in place", "bank"
MOST_HITS: Final = 0.25  # where nothing is to hit: some do of the tiny model, and with more than two ranks
MOST_ERROR: Final = 0.1  # of sums in another order, relative; a wrong expert makes more


class Case(NamedTuple):
    """What is decoded. ``steps``: of a round of the table, a multiple of those in which `none_hits` repeats;
    in two rounds what filled the empty bank has left it."""

    shape: Shape
    trace: str
    sequences: tuple[int, ...]
    steps: int


TINY: Final = Case(SHAPES["tiny"], "demo", (1, 3), 24)
QWEN3: Final = Case(SHAPES["Qwen3-30B-A3B"], "mixed-0.01", (1, 4, 16), ROUND)


def in_own_memory(shape: Shape, weights: str, device: torch.device) -> list[Weights]:
    """All experts of all layers: the same numbers on every rank."""
    whole: list[Weights] = []
    for layer in range(shape.layers):
        of_layer = specs(weights, shape.experts, shape.sizes)
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in of_layer.items()}
        fill(tensors, weights, shape.sizes, torch.Generator(device).manual_seed(layer))
        whole.append(tensors)
    return whole


@contextmanager
def published(
    place: Place, shape: Shape, weights: str, whole: Sequence[Weights], rank: int, ranks: int, folder: Path
) -> Iterator[DWDPRuntime]:
    """Experts spread over the ranks, with a bank."""
    driver = place.driver(rank)
    nbytes = bank_nbytes(shape, weights, BANK, driver.granularity())
    config = DWDPConfig(group_size=ranks, prefetch_depth=0, mode="in_place", expert_bank=nbytes)
    with DWDPRuntime(config, rank, place.device(rank), folder, driver=driver) as runtime:
        for layer, tensors in enumerate(whole):
            runtime.add_layer(layer, specs(weights, shape.experts, shape.sizes))
            own = runtime.local_experts(layer)
            for name, tensor in tensors.items():
                runtime.local_shard(layer, name).copy_(tensor[own.start : own.stop])
        runtime.publish(timeout=120)
        yield runtime


class Rounds:
    """One way to decode, and how often it was run.

    Args:
        capture: whether a step may be a graph; its first runs eagerly, and compiles what a capture could not.
    """

    def __init__(self, place: Place, steps: Steps, mix: Mix, *, capture: bool) -> None:
        self._place, self._steps = place, steps
        self._run: Callable[[], object] = partial(steps.step, mix)
        self._run()
        self.captured = False
        if capture:
            with torch.cuda.stream(torch.cuda.current_stream()):  # which a capture that fails does not restore
                try:
                    self._run, self.captured = captured(self._run, "thread_local"), True
                except RuntimeError as error:  # the step goes on eagerly, and its rows say so
                    seen({"not captured": str(error)})
        self.ran = 0

    def once(self) -> None:
        self._run()
        self.ran += 1

    def ms(self, together: Together | None) -> float:
        """Of a step, over one round of the table."""
        return steady(self._place, self.once, len(self._steps.table), together) * 1e3


def read(
    place: Place,
    case: Case,
    weights: str,
    batch: int,
    runtime: DWDPRuntime,
    whole: Sequence[Weights],
    routings: Mapping[str, Tensor],
    together: Callable[[str], Together],
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows of a rank of all ways to read experts; and by routing the states with all in its own memory."""
    shape, own = case.shape, runtime.local_experts(0)
    steps = Steps(shape, batch, case.steps, runtime.device)
    readers = Readers(runtime, whole, batch)
    readers_of = {OWN: readers.on_gpu, IN_PLACE: readers.in_place, BANKED: readers.banked}
    capture = place.device_type == "cuda"
    ways = {name: Rounds(place, steps, read_by(reader), capture=capture) for name, reader in readers_of.items()}
    expert_gb = sum(spec.expert_nbytes for spec in specs(weights, shape.experts, shape.sizes).values()) / 1e9
    rows: list[dict[str, Any]] = []
    states = {}
    for routing, table in routings.items():
        remote, used = uses(table, shape.experts, own)
        for name, way in ways.items():
            steps.begin(table)
            if name == BANKED:
                forget(runtime)
                for _ in range(2 * len(table)):
                    way.once()
            before, way.ran = counted(runtime), 0
            ms = way.ms(together(f"{weights} {batch} {routing} {name}"))
            counts, hits, copies = (now - then for now, then in zip(counted(runtime), before, strict=True))
            rounds, more = divmod(way.ran, len(remote))
            if name == BANKED and counts != rounds * sum(remote) + sum(remote[:more]):
                raise SystemExit(f"the bank counted {counts} uses of experts in {way.ran} steps of {remote}")
            share, copied = (hits / counts, copies / counts) if name == BANKED else (None, None)
            crossed = {OWN: 0.0, IN_PLACE: 1.0, BANKED: 1 - (share or 0.0)}[name] * sum(remote) / len(remote)
            if name == OWN:
                states[routing] = steps.kept.clone()
            rows.append(
                {
                    "weights": weights,
                    "sequences": batch,
                    "routing": routing,
                    "experts": name,
                    "graph": way.captured,
                    "ms": ms,
                    "hits": share,
                    "copied": copied,
                    "GB": crossed * expert_gb,
                    "used GB": used / len(remote) * expert_gb,
                    "identical": torch.equal(steps.kept, states[routing]) and bool(steps.kept.isfinite().all()),
                    "error": None,
                }
            )
    return rows, states


def counted(runtime: DWDPRuntime) -> tuple[int, int, int]:
    """Of all layers: other ranks' experts used where the bank looked, those that were in it, and those that came."""
    uses, hits, copied = map(sum, zip(*runtime.bank_counts().values(), strict=True))
    return uses, hits, copied


def exchanged(
    place: Place, case: Case, weights: str, batch: int, table: Tensor, expected: Tensor, rank: int, whole: list[Weights]
) -> list[dict[str, Any]]:
    """The rows of a rank of expert parallelism."""
    device = place.device(rank)
    steps = Steps(case.shape, batch, case.steps, device)
    steps.begin(table)
    rows = []
    for exchange in EXCHANGES:
        mix = expert_parallel(case.shape, exchange, batch, whole, rank)
        way = Rounds(place, steps, mix, capture=dist.get_backend() == "nccl")
        steps.begin(table)
        ms = way.ms(None)
        error = (steps.kept.double() - expected.double()).norm() / expected.double().norm()
        rows.append(
            {
                "weights": weights,
                "sequences": batch,
                "routing": case.trace,
                "experts": exchange,
                "graph": way.captured,
                "ms": ms,
                "hits": None,
                "copied": None,
                "GB": None,
                "used GB": None,
                "identical": None,
                "error": error.item(),
            }
        )
    return rows


def of_rank(place: Place, case: Case, ranks: int, folder: str, rank: int) -> list[dict[str, Any]]:
    """All rows of a rank. Ways that read experts come first, so that no collective is under way beside a capture."""
    device = place.device(rank)
    trace = read_trace(TRACES / f"{case.trace}.npz").mixed()
    rows: list[dict[str, Any]] = []
    expected = {}
    tables = {batch: recorded(trace, case.shape, batch, rank, case.steps) for batch in case.sequences}
    for weights in FORMATS:
        whole = in_own_memory(case.shape, weights, device)
        with published(place, case.shape, weights, whole, rank, ranks, Path(folder, weights)) as runtime:
            for batch, table in tables.items():
                routings = {case.trace: table, NONE_HITS: nothing_hits(case.shape, batch, ranks, case.steps)}
                together = partial(_together, folder, rank, ranks)
                found, states = read(place, case, weights, batch, runtime, whole, routings, together)
                expected[weights, batch] = states[case.trace]
                rows += found
                _tell(found, rank)
    with collectives(rank, ranks, place, folder):
        for weights in FORMATS:
            whole = in_own_memory(case.shape, weights, device)
            for batch, table in tables.items():
                found = exchanged(place, case, weights, batch, table, expected[weights, batch], rank, whole)
                rows += found
                _tell(found, rank)
    return rows


def _together(folder: str, rank: int, ranks: int, name: str) -> Together:
    return Together(Path(folder, name), rank, ranks)


def _tell(rows: Sequence[Row], rank: int) -> None:
    for row in rows:
        if rank == 0:
            seen(row)


def of_ranks(found: Sequence[Sequence[Mapping[str, Any]]], link: float | None) -> list[dict[str, Any]]:
    """The rows of all ranks as one of each case.

    Args:
        found: by rank, rows in the same order.
        link: GB/s of one large copy between two GPUs, where each rank has one.
    """

    def key(row: Mapping[str, Any], way: str) -> tuple[Any, ...]:
        return row["weights"], row["sequences"], row["routing"], way

    by_case = {key(same[0], same[0]["experts"]): same for same in zip(*found, strict=True)}
    ms = {case: statistics.mean(row["ms"] for row in same) for case, same in by_case.items()}
    rows = []
    for case, same in by_case.items():
        row = same[0]
        shared = {name: row[name] for name in ("weights", "sequences", "routing", "experts")}
        reads = row["GB"] is not None
        parallel = [ms[key(row, exchange)] for exchange in EXCHANGES if key(row, exchange) in ms]
        new = shared | {
            "graph": all(each["graph"] for each in same),
            "ms, mean": ms[case],
            "ms, worst": max(each["ms"] for each in same),
            **{name: _mean(each[name] for each in same) for name in ("hits", "copied")},
            "GB": statistics.mean(each["GB"] for each in same) if reads else None,
            "GB/s": max(each["GB"] / each["ms"] * 1e3 for each in same) if reads else None,
        }
        if link:
            owns = [own["ms"] for own in by_case[key(row, OWN)]]
            over = [each["ms"] / (each["GB"] / link * 1e3 + own) for each, own in zip(same, owns, strict=True) if reads]
            new |= {
                "over the bound, mean": statistics.mean(over) if reads else None,
                "over the bound, worst": max(over) if reads else None,
            }
        new["over in place"] = ms[case] / ms[key(row, IN_PLACE)]
        new["over expert parallel"] = ms[case] / min(parallel) if parallel else None
        new["error"] = None if reads else max(each["error"] for each in same)
        rows.append(new)
    return sorted(rows, key=lambda row: (FORMATS.index(row["weights"]), row["sequences"], row["routing"] == NONE_HITS))


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return statistics.mean(known) if known else None


def require_possible(found: Sequence[Sequence[Mapping[str, Any]]], link: float | None, preset: str | None) -> None:
    """End the command if a rank's states are not those of experts in its own memory, or it seems to read faster than
    its memory or the link can."""
    for row in (row for of_one in found for row in of_one):
        if row["identical"] is False:
            raise SystemExit(f"in {dict(row)} states have other bits than with all experts in a rank's own memory")
        if row["error"] is not None and not row["error"] <= MOST_ERROR:
            raise SystemExit(f"in {dict(row)} states are not those of the same experts")
        if row["routing"] == NONE_HITS and (row["hits"] or 0) > MOST_HITS:
            raise SystemExit(f"in {dict(row)} something hits")
        if row["GB"] is None:
            continue
        if link:
            require_within_link([{**row, "GB/s": row["GB"] / row["ms"] * 1e3}], link, ["GB/s"])
        if preset and row["used GB"] / row["ms"] * 1e12 > load_gpu(preset).memory_bandwidth:
            raise SystemExit(f"{dict(row)} cannot be: the GPU's memory is slower; no figure is printed")


def decode(place: Place, count: int, link: float | None, preset: str | None) -> list[Row]:
    """Measured steps of ``count`` ranks; see the module.

    Args:
        link: as of `of_ranks`.
        preset: of the GPU, whose memory's bandwidth no figure may exceed.
    """
    case = TINY if place.tiny else QWEN3
    layers = read_trace(TRACES / f"{case.trace}.npz").num_layers  # each with choices of its own
    case = case._replace(shape=case.shape._replace(layers=layers))
    if case.shape.experts % count:
        raise SystemExit(f"{case.shape.experts} experts do not divide evenly among {count} ranks")
    with tempfile.TemporaryDirectory() as folder:
        found = run_group(partial(of_rank, place, case, count, folder), count, place.device_type)
    require_possible(found, link, preset)
    return list(of_ranks(found, link))

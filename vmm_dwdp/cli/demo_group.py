"""A group of ranks that runs a model, each with its own prompt, and the whole model beside it.

The reference is the unsharded model, run in this process over every rank's prompt with the same seed. Each rank is a
process of its own that holds its share of the experts. Identical means: the logits of every generated token are equal
bit by bit, and so is the text. On a GPU each rank continues its prompt once more, by replays of one captured step of
decoding, and is compared again with what the whole model made eagerly; nothing counts replays, so all other figures
are of the passes before.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.cli.console import group_progress, report_step, working
from vmm_dwdp.cli.demo_decoding import KERNELS, in_cuda_graph
from vmm_dwdp.cli.demo_models import Continuation, Generated, Text, continue_by_the_whole, quiet_transformers
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import StateError
from vmm_dwdp.observe.stats import Stats
from vmm_dwdp.temporary import temporary_folder
from vmm_dwdp.testing import run_group

HOST_GRANULARITY: Final = 4 << 10  # the model is smaller than a page of 2 MiB per weight and layer
STEPS: Final = ("starting", "loading", "generating", "done")


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    model: Path
    config: DWDPConfig
    device: str  # "cpu" or "cuda"
    granularity: int | None
    prompts: tuple[str, ...]  # by rank
    new_tokens: int
    directory: Path  # private to the group


@dataclass(frozen=True)
class RankResult:
    """What a rank returns."""

    device: str
    experts_held: int
    stats: Stats
    generated: Generated
    replayed: Generated | None
    not_captured: str
    leaked: dict[str, int]

    def compared(self, rank: int, expected: Generated) -> RankReport:
        return RankReport(
            rank=rank,
            device=self.device,
            experts_held=self.experts_held,
            resident_bytes=self.stats.resident_bytes,
            staged_bytes=self.stats.staged_bytes,
            fetched_bytes=self.stats.fetched_bytes,
            hits=self.stats.hits,
            misses=self.stats.misses,
            in_place=self.stats.in_place,
            exposed_wait_s=round(self.stats.exposed_wait_s, 6),
            tokens_per_s=self.generated.tokens_per_s,
            identical=self.generated.same(expected),
            replays=None
            if self.replayed is None
            else Replays(len(self.replayed.logits) - 1, self.replayed.tokens_per_s, self.replayed.same(expected)),
            not_captured=self.not_captured,
            prompt=self.generated.prompt,
            continuation=self.generated.text,
        )


@dataclass(frozen=True)
class Replays:
    """What a rank's prompt was continued with once more: each token but the first by a replay."""

    steps: int
    tokens_per_s: float
    identical: bool  # to what the whole model makes eagerly


@dataclass(frozen=True)
class RankReport:
    """One entry of ``ranks`` in what ``--json`` prints."""

    rank: int
    device: str
    experts_held: int  # of every layer
    resident_bytes: int
    staged_bytes: int
    fetched_bytes: int
    hits: int
    misses: int
    in_place: int  # how often a layer was read in place
    exposed_wait_s: float
    tokens_per_s: float
    identical: bool  # to what the whole model makes of the same prompt
    replays: Replays | None  # none on a CPU, and where a step cannot be captured
    not_captured: str  # why it cannot
    prompt: str
    continuation: str

    @property
    def all_identical(self) -> bool:
        return self.identical and (self.replays is None or self.replays.identical)


@dataclass(frozen=True)
class Report:
    """What ``--json`` prints."""

    model: str
    device: str
    driver: str
    group_size: int
    identical: bool
    ranks: list[RankReport]
    leaked: dict[str, int]
    seconds: float

    def problems(self, *, fetching: bool) -> list[str]:
        """What is not as it has to be, a sentence each; with ``fetching`` every rank must have read others' experts."""
        found = [f"{self.model}: rank {r.rank} differs from the whole model" for r in self.ranks if not r.identical]
        wrong = [r.rank for r in self.ranks if r.replays and not r.replays.identical]
        found += [f"{self.model}: replays of rank {rank} differ from the whole model" for rank in wrong]
        if fetching:
            idle = [r.rank for r in self.ranks if r.fetched_bytes == 0 and r.in_place == 0]
            found += [f"{self.model}: rank {rank} fetched nothing, so nothing was proved" for rank in idle]
        found += [f"{self.model}: {count} {kind} left after close" for kind, count in self.leaked.items() if count]
        return found


def compare(
    model: Path, config: DWDPConfig, device: str, prompts: tuple[str, ...], new_tokens: int, *, shown: bool
) -> Report:
    """Run the whole model and then the group, each rank with its prompt of ``prompts``.

    Progress is drawn if ``shown``. Nothing stays allocated.
    """
    start = time.monotonic()
    if device == "cpu":
        torch.set_num_threads(1)  # another number rounds sums differently; the ranks take this one over
    driver = open_driver(torch.device(device)).name
    with working("running the whole model", shown=shown):
        expected = continue_by_the_whole(model, device, prompts, new_tokens)
    with temporary_folder() as folder:
        granularity = HOST_GRANULARITY if device == "cpu" else None
        job = Job(model, config, device, granularity, prompts, new_tokens, folder)
        with group_progress(job.directory, config.group_size, STEPS, shown=shown):
            results = run_group(functools.partial(_run_rank, job), config.group_size, device)
    ranks = [result.compared(rank, expected[rank]) for rank, result in enumerate(results)]
    return Report(
        model=model.name,
        device=device,
        driver=driver,
        group_size=config.group_size,
        identical=all(rank.all_identical for rank in ranks),
        ranks=ranks,
        leaked={kind: sum(result.leaked[kind] for result in results) for kind in KINDS},
        seconds=round(time.monotonic() - start, 3),
    )


def _run_rank(job: Job, rank: int) -> RankResult:
    """One process of the group: what it saw, what it generated, and what was left open after close."""
    from vmm_dwdp.integrations.transformers import from_pretrained

    quiet_transformers()
    report_step(job.directory, rank, "loading")
    device = f"cuda:{torch.cuda.current_device()}" if job.device == "cuda" else "cpu"
    driver = open_driver(torch.device(device), job.granularity)
    model = from_pretrained(
        job.model, job.config, rank=rank, device=device, rendezvous=job.directory / "group", driver=driver, dtype="auto"
    )
    try:
        report_step(job.directory, rank, "generating")
        generated, stats, replayed, not_captured = _continued(model, job, rank)
        held = len(model.dwdp.local_experts(0))
    finally:
        ledger = model.dwdp.close()
    report_step(job.directory, rank, "done")
    return RankResult(device, held, stats, generated, replayed, not_captured, ledger.counts())


def _continued(model: Any, job: Job, rank: int) -> tuple[Generated, Stats, Generated | None, str]:
    """What the rank's prompt was continued with, the figures of that, and what it was by replays or why there are none.

    Returns without anything that could be replayed, so that the runtime may be closed.
    """
    continuation = Continuation(model, Text.of(job.model, model), job.prompts[rank], job.new_tokens)
    continuation.generate(min(KERNELS, job.new_tokens))  # what is timed loads no kernels
    generated = continuation.generate()
    stats = model.dwdp.stats()
    if job.device == "cpu":
        return generated, stats, None, ""
    try:
        continuation.capture(in_cuda_graph)
    except StateError as error:
        return generated, stats, None, str(error)
    return generated, stats, continuation.generate(), ""

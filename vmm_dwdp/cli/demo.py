"""``vmm-dwdp demo``: a group of ranks runs a model, each with its own prompt, and is compared with the whole model.

The reference is the unsharded model, run in this process over every rank's prompt with the same seed. Each rank is a
process of its own that holds its share of the experts. Identical means: the logits of every generated token are equal
bit by bit, and so is the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.cli.console import group_progress, print_table, report_step, size, working
from vmm_dwdp.cli.demo_models import (
    MODEL,
    Generated,
    Text,
    continue_by_the_whole,
    generate,
    models_to_run,
    quiet_transformers,
)
from vmm_dwdp.config import DWDPConfig, ModeSetting
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.observe.stats import Stats
from vmm_dwdp.testing import run_group

HOST_GRANULARITY: Final = 4 << 10  # the model is smaller than a page of 2 MiB per weight and layer
NEW_TOKENS: Final = 96
RANDOM_NEW_TOKENS: Final = 16  # of a model with random weights, whose text nobody reads
STEPS: Final = ("starting", "loading", "generating", "done")
PROMPTS: Final = (
    "It is a truth universally acknowledged, that",
    "HAMLET\n",
    "She had been walking for some time when",
    "ROMEO\n",
    "The carriage was at the door, and",
    "KING HENRY V\n",
    "My dear sister,",
    "Enter three Witches",
)


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
            tokens_per_s=round(len(self.generated.logits) / self.generated.seconds, 1),
            identical=self.generated.same(expected),
            prompt=self.generated.prompt,
            continuation=self.generated.text,
        )


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
    prompt: str
    continuation: str


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
        if fetching:
            idle = [r.rank for r in self.ranks if r.fetched_bytes == 0 and r.in_place == 0]
            found += [f"{self.model}: rank {rank} fetched nothing, so nothing was proved" for rank in idle]
        found += [f"{self.model}: {count} {kind} left after close" for kind, count in self.leaked.items() if count]
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a Hugging Face model (%(default)s)")
    parser.add_argument("--config", type=Path, help="YAML file of a DWDPConfig; the options below override it")
    parser.add_argument("--group-size", type=int, help="number of ranks (4)")
    parser.add_argument("--num-local-experts", type=int, help="experts each rank holds of every layer (just enough)")
    parser.add_argument("--prefetch-depth", type=int, help="layers whose experts are fetched ahead (2)")
    parser.add_argument("--host-experts", type=int, help="experts of every layer that live in host memory (0)")
    parser.add_argument("--mode", choices=get_args(ModeSetting), help="how experts of other owners are read (staged)")
    parser.add_argument("--generate", type=int, metavar="N", help=f"tokens to generate ({NEW_TOKENS})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--prompt", action="append", help="may be repeated: one for each rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    quiet_transformers()
    if arguments.generate is not None and arguments.generate < 1:
        raise ConfigError(f"--generate must be at least 1, not {arguments.generate}")
    config = config_from(arguments)
    prompts = tuple(itertools.islice(itertools.cycle(arguments.prompt or PROMPTS), config.group_size))
    reports = []
    with models_to_run(arguments.model, config, device) as models:
        for model in models:
            given = model == arguments.model
            new_tokens = arguments.generate or (NEW_TOKENS if given else RANDOM_NEW_TOKENS)
            report = compare(model, config, device, prompts, new_tokens, shown=not arguments.json)
            reports.append(report)
            if not arguments.json:
                _print(report, with_text=given)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(reports[-1])))
    problems = [p for report in reports for p in report.problems(fetching=report is reports[-1])]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems and not arguments.json:
        print("identical: the group computed what the whole model computes, bit by bit")
    return 1 if problems else 0


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
    with tempfile.TemporaryDirectory(prefix="vmm-dwdp-") as folder:
        granularity = HOST_GRANULARITY if device == "cpu" else None
        job = Job(model, config, device, granularity, prompts, new_tokens, Path(folder))
        with group_progress(job.directory, config.group_size, STEPS, shown=shown):
            results = run_group(functools.partial(_run_rank, job), config.group_size, device)
    ranks = [result.compared(rank, expected[rank]) for rank, result in enumerate(results)]
    return Report(
        model=model.name,
        device=device,
        driver=driver,
        group_size=config.group_size,
        identical=all(rank.identical for rank in ranks),
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
        generated = generate(model, Text.of(job.model, model), job.prompts[rank], job.new_tokens)
        stats = model.dwdp.stats()
        held = len(model.dwdp.local_experts(0))
    finally:
        ledger = model.dwdp.close()
    report_step(job.directory, rank, "done")
    return RankResult(device, held, stats, generated, ledger.counts())


def config_from(arguments: argparse.Namespace) -> DWDPConfig:
    """The config file, or the default group of four, with the options that were given in place of its values."""
    config = DWDPConfig.from_yaml(arguments.config) if arguments.config else DWDPConfig(group_size=4)
    names = ("group_size", "num_local_experts", "prefetch_depth", "host_experts", "mode")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(config, **given)


def _print(report: Report, *, with_text: bool) -> None:
    title = f"{report.model}: {report.group_size} ranks on {report.device} ({report.driver} driver)"
    sizes, counts = ("experts", "resident", "staged", "fetched"), ("hits", "misses", "in place")
    columns = ("rank", "on", *sizes, *counts, "waited", "tokens/s", "same")
    rows = [
        (
            str(r.rank),
            r.device,
            str(r.experts_held),
            size(r.resident_bytes),
            size(r.staged_bytes),
            size(r.fetched_bytes),
            str(r.hits),
            str(r.misses),
            str(r.in_place),
            f"{r.exposed_wait_s * 1e3:.1f} ms",
            f"{r.tokens_per_s:.1f}",
            "yes" if r.identical else "NO",
        )
        for r in report.ranks
    ]
    print_table(title, columns, rows)
    for r in report.ranks if with_text else ():
        print(f"\nrank {r.rank}: {r.prompt.strip()} ...")
        print(textwrap.indent(r.continuation.strip(), "    "))
    print()

"""``vmm-dwdp demo``: a group of ranks runs a model, each with its own prompt, and is compared with the whole model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from vmm_dwdp.cli.checks import number_or_auto, require_device, require_model
from vmm_dwdp.cli.console import print_table, size
from vmm_dwdp.config import DWDPConfig, ModeSetting
from vmm_dwdp.errors import ConfigError

if TYPE_CHECKING:
    from vmm_dwdp.cli.demo_group import Report  # which needs torch, and that takes seconds

MODEL: Final = Path(__file__).parents[1] / "models" / "bytes-moe"
NEW_TOKENS: Final = 96
RANDOM_NEW_TOKENS: Final = 16  # of a model with random weights, whose text nobody reads
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=MODEL,
        help="folder of a Hugging Face model, or its name in the hub if downloaded (%(default)s)",
    )
    parser.add_argument("--config", type=Path, help="YAML file of a DWDPConfig; the options below override it")
    parser.add_argument("--group-size", type=int, help="number of ranks (4)")
    parser.add_argument(
        "--num-local-experts", type=number_or_auto, help="experts each rank holds of every layer, or auto (just enough)"
    )
    parser.add_argument("--prefetch-depth", type=int, help="layers whose experts are fetched ahead (2)")
    parser.add_argument("--host-experts", type=int, help="experts of every layer that live in host memory (0)")
    parser.add_argument("--mode", choices=get_args(ModeSetting), help="how experts of other owners are read (staged)")
    parser.add_argument("--generate", type=int, metavar="N", help=f"tokens to generate ({NEW_TOKENS})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--prompt", action="append", help="may be repeated: one for each rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    if arguments.generate is not None and arguments.generate < 1:
        raise ConfigError(f"--generate must be at least 1, not {arguments.generate}")
    config = config_from(arguments)
    given = arguments.prompt or ()
    if len(given) > config.group_size:
        raise ConfigError(
            f"{len(given)} prompts were given to a group of {config.group_size}: at most one for each rank"
        )
    prompts = tuple(itertools.islice(itertools.cycle(given or PROMPTS), config.group_size))
    given_model = require_model(arguments.model)
    device = _device(arguments.device)

    from vmm_dwdp.cli.demo_group import compare
    from vmm_dwdp.cli.demo_models import models_to_run, quiet_transformers

    quiet_transformers()
    reports = []
    with models_to_run(given_model, config, device) as models:
        for model in models:
            own = model == given_model
            new_tokens = arguments.generate or (NEW_TOKENS if own else RANDOM_NEW_TOKENS)
            report = compare(model, config, device, prompts, new_tokens, shown=not arguments.json)
            reports.append(report)
            if not arguments.json:
                _print(report, with_text=own)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(reports[-1])))
    problems = [p for report in reports for p in report.problems(fetching=report is reports[-1])]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems and not arguments.json:
        print("identical: the group computed what the whole model computes, bit by bit")
    return 1 if problems else 0


def _device(asked: str) -> str:
    import torch

    require_device(asked)
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def config_from(arguments: argparse.Namespace) -> DWDPConfig:
    """The config file, or the default group of four, with the options that were given in place of its values."""
    config = DWDPConfig.from_yaml(arguments.config) if arguments.config else DWDPConfig(group_size=4)
    names = ("group_size", "num_local_experts", "prefetch_depth", "host_experts", "mode")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(config, **given)


def _print(report: Report, *, with_text: bool) -> None:
    title = f"{report.model}: {report.group_size} ranks on {report.device} ({report.driver} driver)"
    sizes, counts = ("experts", "resident", "staged", "fetched"), ("hits", "misses", "in place")
    graphs = ("in a graph",) if report.driver == "cuda" else ()
    columns = ("rank", "on", *sizes, *counts, "waited", "tokens/s", *graphs, "same")
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
            *(f"{r.replays.tokens_per_s:.1f}" if r.replays else "-" for _ in graphs),
            "yes" if r.all_identical else "NO",
        )
        for r in report.ranks
    ]
    print_table(title, columns, rows)
    for r in report.ranks:
        if r.not_captured:
            print(f"rank {r.rank}: {r.not_captured}")
    for r in report.ranks if with_text else ():
        print(f"\nrank {r.rank}: {r.prompt.strip()} ...")
        print(textwrap.indent(r.continuation.strip(), "    "))
    print()

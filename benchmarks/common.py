"""What every benchmark here shares: its arguments, the machine it ran on, medians, and how it prints."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, object]

LINK_TOLERANCE = 1.05  # one large copy differs by so much from run to run, and from copies from several owners


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the arguments of every benchmark: ``--device`` and ``--json``."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", type=_device, default=default, help=f"cpu, cuda or cuda:N (default: {default})")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return result


def _device(name: str) -> torch.device:
    """Made current: what is timed runs on its streams."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{name}: there is no GPU here")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def machine(device: torch.device) -> dict[str, object]:
    """What a figure cannot be understood without."""
    described: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": _cpu_model(),
        "cpu cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
        described["driver"] = _driver_version()
    return described


def medians(measure: Callable[[], Mapping[str, float]], repeats: int) -> dict[str, float]:
    """The median of each figure over ``repeats`` calls, after one call that does not count."""
    measure()
    runs = [measure() for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def seen(row: Row) -> Row:
    """``row``, which is also printed to stderr, for whoever waits for the rest or cannot."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def require_within_link(rows: Iterable[Row], link: float, figures: Sequence[str]) -> None:
    """End the command, before it prints anything, if a copy seems to be faster than its link: then a clock left it out.

    Args:
        link: GB/s of one large copy, measured in the same run.
        figures: columns of GB/s, of which rows may lack some.

    Raises:
        SystemExit: with a sentence, so that the exit status is 1.
    """
    for row in rows:
        for figure in figures:
            rate = row.get(figure, 0.0)
            if not isinstance(rate, int | float) or not 0 <= rate <= link * LINK_TOLERANCE:
                raise SystemExit(
                    f"{figure} of {dict(row)} cannot be: one large copy made {link:.1f} GB/s in this run. "
                    "What was counted is not what was timed; no figure is printed"
                )


def require_shares_within_link(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    """`require_within_link` of figures that are parts of their row's own "link", in GB/s.

    A copy may be slow for once on a shared host, and then what follows it is more than the whole of it: what no figure
    exceeds is the fastest copy of the run.
    """
    rates = [{**row, **{figure: row[figure] * row["link"] for figure in figures if figure in row}} for row in rows]
    require_within_link(rates, max(row["link"] for row in rows), figures)


def report(arguments: argparse.Namespace, tables: Mapping[str, Sequence[Row]]) -> None:
    """Print the machine, and tables whose rows all have the same columns, as text or as one JSON object."""
    about = machine(arguments.device)
    if arguments.json:
        print(json.dumps({"machine": about, **tables}, indent=1))
        return
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    for title, rows in tables.items():
        lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(f"\n{title}")
        for line in lines:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""

    def text(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([text(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def percent(ours: float, theirs: float) -> str:
    """By how much ``ours`` is more."""
    return f"{100 * (ours / theirs - 1):+.1f} %"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _driver_version() -> str:
    about = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.[\d.]+", about.read_text()) if about.exists() else None
    return found.group() if found else "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()

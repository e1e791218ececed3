"""What a person sees: tables and progress, drawn on a terminal and plain elsewhere."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_SOCKET: Final = "progress"
_LONGEST: Final = 1024  # bytes of one report


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; where that is no terminal, aligned columns without lines or colours."""
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(nbytes: int) -> str:
    """``nbytes`` with the largest binary unit that leaves a number of at least 1: ``"1.5 MiB"``."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def working(message: str, *, shown: bool) -> AbstractContextManager[object]:
    """Show ``message`` while the body runs, if ``shown`` and standard error is a terminal."""
    console = Console(stderr=True)
    return console.status(message) if shown and console.is_terminal else nullcontext()


@contextmanager
def group_progress(directory: Path, group_size: int, steps: Sequence[str], *, shown: bool) -> Iterator[None]:
    """Show how far each rank is, as its process says with `report_step`, while the body runs.

    ``directory`` is private to the group. Nothing is drawn unless ``shown`` and standard error is a terminal.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports,
        Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress,
    ):
        reports.bind(str(directory / _SOCKET))
        tasks = [progress.add_task(f"rank {rank}: {steps[0]}", total=len(steps)) for rank in range(group_size)]

        def receive() -> None:
            while report := reports.recv(_LONGEST).decode():
                rank, step = report.split(" ", 1)
                progress.update(tasks[int(rank)], description=f"rank {rank}: {step}", completed=steps.index(step) + 1)

        receiver = threading.Thread(target=receive, name="vmm-dwdp progress")
        receiver.start()
        try:
            yield
        finally:
            _send(directory, "")
            receiver.join()


def report_step(directory: Path, rank: int, step: str) -> None:
    """Tell the process that runs `group_progress` over ``directory`` which of its steps this rank has begun."""
    _send(directory, f"{rank} {step}")


def _send(directory: Path, report: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(report.encode(), str(directory / _SOCKET))

"""The command line: ``vmm-dwdp COMMAND ...``, one module a command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NamedTuple, Protocol, cast

from vmm_dwdp.errors import DWDPError
from vmm_dwdp.version import __version__


class _Command(NamedTuple):
    module: str  # imported only when the command is asked for: most of them need torch
    summary: str


class _CommandModule(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """The exit status."""


COMMANDS: Final = {
    "bench": _Command("vmm_dwdp.cli.bench", "run the benchmarks that suit this machine, or measure its rates"),
    "demo": _Command(
        "vmm_dwdp.cli.demo", "run a model with its experts spread over a group, and compare with the whole"
    ),
    "doctor": _Command("vmm_dwdp.cli.doctor", "say what this machine can do, and why not"),
    "plan": _Command("vmm_dwdp.cli.plan", "say what a model needs on some GPUs, and whether it pays"),
    "simulate": _Command("vmm_dwdp.cli.simulate", "run a group of any size, event by event, on paper"),
    "trace": _Command("vmm_dwdp.cli.trace", "run layers in a group and write when everything happened"),
}

_SHELL_SIGNAL: Final = 128  # what a shell adds to the number of the signal that ended a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where what it looked for is not so, 2 where it could not be run.

    Where nobody reads what it prints any more, as behind ``| head``, it ends without a word, as by SIGPIPE; after
    Ctrl-C with one line.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _SHELL_SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt:
        print("vmm-dwdp: interrupted", file=sys.stderr)
        return _SHELL_SIGNAL + signal.SIGINT


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vmm-dwdp",
        description="Mixture-of-Experts weights spread over a group of GPUs, seen whole by each of them.",
        epilog="commands:\n" + "\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vmm-dwdp {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="one of the commands below; each has a --help of its own")
    name = parser.parse_args(argv[:1]).command

    command = COMMANDS[name]
    module = cast("_CommandModule", import_module(command.module))
    description = command.summary[0].upper() + command.summary[1:] + "."
    parser = argparse.ArgumentParser(prog=f"vmm-dwdp {name}", description=description)
    module.add_arguments(parser)
    arguments = parser.parse_args(argv[1:])
    try:
        return module.run(arguments)
    except DWDPError as error:
        print(f"vmm-dwdp {name}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2

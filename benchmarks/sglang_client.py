"""SGLang's own client, ``sglang.bench_serving``, in a process that imports it once: that takes longer than a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from cuts import uncut
from engine_processes import EngineProcess, Failed


class Client:
    """Its process begins at once, and another takes the place of one that failed or hung.

    Args:
        folder: for what runs give.
        logs: for what the processes say, a file each.
        seconds: in which one is ready.
    """

    def __init__(self, folder: Path, logs: Path, seconds: float) -> None:
        self._folder, self._logs, self._seconds = folder, logs, seconds
        self._processes = self._runs = 0
        self._begin()

    def figures(self, options: str, seconds: float) -> dict[str, Any]:
        """What a run of these options found. Raises `Failed` if it failed, or was not done after so many seconds."""
        self._runs += 1
        try:
            if not self._is_ready:
                self._process.wait_until_ready(self._seconds)
                self._is_ready = True
            file = self._folder / f"run-{self._runs}.jsonl"
            found: dict[str, Any] = self._process.turn((options.split(), file), seconds)
        except Failed as failed:
            with uncut():
                self.kill()
                self._begin()
            raise Failed(f"SGLang's client: {failed}") from None
        return found

    def kill(self) -> None:
        """It ends at once. May be called again."""
        self._process.kill()

    def _begin(self) -> None:
        self._processes += 1
        self._is_ready = False
        self._process = EngineProcess(runs, self._logs / f"client-{self._processes}.log")


def runs(wait_for_turn: Callable[[], Any]) -> Generator[dict[str, Any]]:
    """The client's process: in each turn a run of its command line, which sets all that it looks at anew."""
    from sglang.bench_serving import cli_main

    while True:
        options, file = wait_for_turn()
        sys.argv = ["sglang.bench_serving", *options, "--output-file", str(file)]
        cli_main()
        yield json.loads(file.read_text())  # one line: no other run writes there

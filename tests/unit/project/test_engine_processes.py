"""The processes of a benchmark's engines: one after another is asked, and none that fails or hangs keeps the others."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from engine_processes import EngineProcess, Failed, Serve, reason

LONG = 60.0  # seconds that no test waits
Rows = Generator[dict[str, Any]]


def counts(wait_for_turn: Callable[[], None], *, turns: Path) -> Rows:
    wait_for_turn()
    with turns.open("a") as file:
        file.write("begun\n")
    yield from ({"row": number} for number in range(3))
    with turns.open("a") as file:
        file.write("ended\n")


def dies(wait_for_turn: Callable[[], None], *, when: str) -> Rows:
    if when == "starting":
        raise ValueError("no engine for this")
    wait_for_turn()
    yield {"row": 0}
    raise FileNotFoundError("no answer to that")


def hangs(wait_for_turn: Callable[[], None], *, when: str, child: Path) -> Rows:
    """With a child that would live on, as an engine has; it has the lock of the file ``child`` as long as it lives."""
    with child.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.Popen(["sleep", "1000"], pass_fds=[file.fileno()])
        file.write("locked")
    if when == "measuring":
        wait_for_turn()
        yield {"row": 0}
    threading.Event().wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[Serve], EngineProcess]]:
    processes: list[EngineProcess] = []

    def start(serve: Serve) -> EngineProcess:
        processes.append(EngineProcess(serve, tmp_path / f"{len(processes)}.log"))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def test_rows_come_when_it_is_its_turn(started: Callable[[Serve], EngineProcess], tmp_path: Path) -> None:
    turns = [tmp_path / "first", tmp_path / "second"]
    processes = [started(partial(counts, turns=each)) for each in turns]
    assert all(0 < process.wait_until_ready(LONG) < LONG for process in processes)
    assert not any(each.exists() for each in turns), "it begins when it is asked"

    for process, each, later in zip(processes, turns, [turns[1], tmp_path / "none"], strict=True):
        assert list(process.rows(LONG)) == [{"row": 0}, {"row": 1}, {"row": 2}]
        assert each.read_text() == "begun\nended\n"
        assert not later.exists()
        process.end()


@pytest.mark.parametrize(
    ("when", "sentence"),
    [("starting", "ValueError: no engine for this"), ("measuring", "FileNotFoundError: no answer to that")],
)
def test_what_it_died_of_is_said(when: str, sentence: str, started: Callable[[Serve], EngineProcess]) -> None:
    process = started(partial(dies, when=when))
    if when == "starting":
        with pytest.raises(Failed) as failed:
            process.wait_until_ready(LONG)
    else:
        process.wait_until_ready(LONG)
        rows = process.rows(LONG)
        assert next(rows) == {"row": 0}
        with pytest.raises(Failed) as failed:
            next(rows)
    assert str(failed.value) == sentence


@pytest.mark.parametrize("when", ["starting", "measuring"])
def test_what_hangs_is_ended_with_all_that_it_started(
    when: str, started: Callable[[Serve], EngineProcess], tmp_path: Path
) -> None:
    child = tmp_path / "child"
    process = started(partial(hangs, when=when, child=child))
    if when == "starting":
        while not child.exists() or not child.read_text():
            pass
        with pytest.raises(Failed, match="not ready after 0 s"):
            process.wait_until_ready(0)
    else:
        process.wait_until_ready(LONG)
        with pytest.raises(Failed, match="not done after 0 s"):
            list(process.rows(0))
    process.kill()

    with child.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # comes when the child is gone
    process.kill()  # again


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("", "it died and said nothing"),
        ("loading\n\n", "loading"),
        (
            "torch.OutOfMemoryError: CUDA out of memory\nkill_process_tree called\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("EOFError\nValueError: the first\nRuntimeError: Rank 0 scheduler died\n", "ValueError: the first"),
        ("AssertionError: no such cores\nraise EOFError\nEOFError\n", "AssertionError: no such cores"),
        ("    raise NotImplementedError()\nNotImplementedError\nSIGQUIT\nEOFError\n", "NotImplementedError"),
    ],
)
def test_the_reason_in_a_log(log: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)

    assert reason(tmp_path / "log") == sentence

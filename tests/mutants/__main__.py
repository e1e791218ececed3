"""Put each bug of `bugs` into a copy of the tree, run the tests that must find it, and print the score.

PYTHONPATH=tests python -m mutants                 all of them
PYTHONPATH=tests python -m mutants slot edges      those whose names have one of the words
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from mutants.bugs import BUGS
from mutants.seeded import Bug
from support.native import compiled

ROOT: Final = Path(__file__).parents[2]
SECONDS: Final = 300  # a bug that makes the tests hang is found
SECONDS_SOUND: Final = 3600  # all of the tests, without a bug
LEFT_OUT: Final = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
TESTS_FAILED: Final = 1  # pytest's exit status; a larger one means that the tests could not run


def failure(copy: Path, tests: tuple[str, ...], seconds: float = SECONDS) -> str | None:
    """How the tests fail in ``copy``, or that they take longer; None if they pass. Raises `RuntimeError` if they cannot
    run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not over after {seconds} s"
    told = f"{run.stdout}{run.stderr}"
    if run.returncode > TESTS_FAILED:
        raise RuntimeError(f"the tests could not run:\n{told}")
    return told if run.returncode else None  # below zero if the bug made the process crash


def found_with(bug: Bug, copy: Path) -> bool:
    """Whether its tests fail with the bug in the copy."""
    file = copy / bug.file
    sound = file.read_text(encoding="utf-8")
    if sound.count(bug.old) != 1:
        raise RuntimeError(f"{bug.name}: {bug.file} has {sound.count(bug.old)} places to put it, not one")
    file.write_text(sound.replace(bug.old, bug.new), encoding="utf-8")
    try:
        compile_again(copy, file)
        return failure(copy, bug.tests) is not None
    finally:
        file.write_text(sound, encoding="utf-8")
        compile_again(copy, file)


def compile_again(copy: Path, file: Path) -> None:
    """What installation compiles, if ``file`` is part of it."""
    if file.suffix in (".c", ".h"):
        allocator = copy / "allocator"
        compiled(allocator, sources=sorted(allocator.glob("*.c"))).replace(allocator / "_native.abi3.so")


def main(words: list[str]) -> int:
    """The number of bugs that were not found."""
    bugs = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
        all_tests = tuple(dict.fromkeys(test for bug in bugs for test in bug.tests))
        if (told := failure(copy, all_tests, SECONDS_SOUND)) is not None:
            raise RuntimeError(f"the tests fail without any bug:\n{told}")
        for bug in bugs:
            start = time.monotonic()
            caught = found_with(bug, copy)
            missed += not caught
            print(f"{'found' if caught else 'MISSED':8}{time.monotonic() - start:6.1f} s  {bug.name}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs found")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

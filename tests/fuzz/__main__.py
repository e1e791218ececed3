"""Coverage-guided fuzzing of one target after another with atheris, from the corpus on.

    python tests/fuzz --runs 1000000              all targets
    python tests/fuzz --runs 1000000 config       one of them

An input that makes a target raise, hang for `SECONDS_EACH`, or take more than `MEGABYTES` ends the run and is kept in
the current directory, as crash-*, timeout-* or oom-*: fix it, and put it into the corpus.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

SECONDS_EACH: Final = 60
MEGABYTES: Final = 2048
LONGEST: Final = 512  # bytes of an input
EVERY: Final = 10_000  # inputs after which the figures are printed
WARM: Final = 1000  # inputs after which a process should not grow any more
TESTS: Final = Path(__file__).parents[1]


def resident_kilobytes() -> int:
    return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmRSS:")[1].split()[0])


def fuzz(name: str, runs: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris  # type: ignore[import-not-found]

    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["vmm_dwdp"]):  # PyYAML is slow enough without it
        from fuzz import targets
    target = targets.TARGETS[name]
    done, start, before = 0, time.monotonic(), (0, 0)

    def one(data: bytes) -> None:
        nonlocal done, before
        target(data)
        done += 1
        if done == WARM:
            gc.collect()
            before = targets.open_descriptors(), resident_kilobytes()
        if done == runs or done % EVERY == 0:
            gc.collect()
            descriptors, kilobytes = targets.open_descriptors() - before[0], resident_kilobytes() - before[1]
            grown = f"grown by {descriptors} descriptors and {kilobytes} kilobytes since input {WARM}"
            print(f"{name}: {done} inputs in {time.monotonic() - start:.0f} s, nothing found; {grown}", flush=True)
        if done == runs:
            targets.forget()
            os._exit(0)

    with tempfile.TemporaryDirectory() as discovered:
        options = [f"-timeout={SECONDS_EACH}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, discovered, str(targets.CORPUS / name)], one)
        atheris.Fuzz()


def main() -> int:
    """The number of targets in which something was found."""
    names = sorted(path.name for path in (Path(__file__).parent / "corpus").iterdir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each target")
    parser.add_argument("targets", nargs="*", choices=[*names, []], help=f"of {', '.join(names)}")
    arguments = parser.parse_args()
    if len(arguments.targets) == 1:
        fuzz(arguments.targets[0], arguments.runs)
    failed = 0
    for name in arguments.targets or names:
        command = [sys.executable, str(Path(__file__).parent), "--runs", str(arguments.runs), name]
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())

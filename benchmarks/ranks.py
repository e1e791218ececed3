"""What benchmarks of several ranks share: where a rank runs, and how a pass is timed that others run beside.

[Note: Clocks]
Copies are given to the driver some time after `release`, and a device that is waited for may be idle before they are.
So a clock that starts when the device is idle may leave out copies that it counts. Here nothing is waited for: passes
follow one another, and the clock runs from the end of a pass, in which all its layers were read, to the end of a later
one. What certainly moved meanwhile is the layers of these passes, without those that may have been in slots before.

A rank begins its clock when all ranks run passes, and goes on with passes until all clocks have ended: so every figure
is of a time in which all of them ran.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vmm_dwdp.allocator import open_driver

AHEAD = 2  # passes that the device is given before it has done the first of them


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        tiny: sizes that show only that everything runs.
    """

    device_type: str
    tiny: bool

    def device(self, rank: int) -> torch.device:
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    def driver(self, rank: int) -> Any:
        return open_driver(self.device(rank), 4096 if self.device_type == "cpu" else None)

    def wait(self) -> None:
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Mark:
        """The moment at which the current stream comes to here."""
        return Mark(self.device_type == "cuda")


class Mark:
    """A moment of the device's, or of the CPU's, which does all its work at once."""

    def __init__(self, on_device: bool) -> None:
        self._event: Any = None
        self._time = 0.0
        if on_device:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def reach(self) -> None:
        """Wait until the device has come to it."""
        if self._event:
            self._event.synchronize()

    def seconds_to(self, later: Mark) -> float:
        """``later`` is reached first."""
        if not self._event:
            return later._time - self._time
        later.reach()
        return float(self._event.elapsed_time(later._event)) * 1e-3


class Together:
    """Ranks of which none stops before all have measured; they tell each other by files in ``folder``."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self._folder = folder
        self._rank = rank
        self._ranks = ranks
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, word: str) -> None:
        (self._folder / f"{word}-{self._rank}").touch()

    def is_said_by_all(self, word: str) -> bool:
        return all((self._folder / f"{word}-{rank}").exists() for rank in range(self._ranks))


def steady(place: Place, run: Callable[[], object], passes: int, together: Together | None = None) -> float:
    """Seconds of a pass, the mean of ``passes`` that follow one another without a stop; see [Note: Clocks].

    Args:
        together: with whom; ``None`` where passes have collectives, so that all ranks run as many.
    """
    marks: list[Mark] = []

    def one() -> None:
        run()
        marks.append(place.mark())
        if len(marks) > AHEAD:
            marks[-1 - AHEAD].reach()

    one()
    if together:
        together.say("begun")
        while not together.is_said_by_all("begun"):
            one()
    first = len(marks) - 1
    for _ in range(passes):
        one()
    seconds = marks[first].seconds_to(marks[-1]) / passes
    if together:
        together.say("done")
        while not together.is_said_by_all("done"):
            one()
    place.wait()
    return seconds


def begin_at_random(rank: int, within: float) -> None:
    """Sleep for a part of ``within`` seconds, another for every rank."""
    time.sleep(random.Random(rank).random() * within)


@contextmanager
def collectives(rank: int, group_size: int, place: Place, folder: str) -> Iterator[None]:
    """NCCL where every rank has a GPU of its own."""
    dist.init_process_group(
        "nccl" if place.device_type == "cuda" and torch.cuda.device_count() >= group_size else "gloo",
        init_method=f"file://{folder}/collectives",
        rank=rank,
        world_size=group_size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def clock_while(place: Place, device: torch.device, run: Callable[[], object]) -> int:
    """MHz of the SMs while ``run`` is repeated; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as asked:
        while asked.poll() is None:
            run()
            place.wait()
        assert asked.stdout is not None
        return int(asked.stdout.read())

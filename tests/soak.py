"""A small group for a long time: passes in any order, copies that stall, ranks that are killed and come back.

    python tests/soak.py --passes 100000 --kills 20
    python tests/soak.py --device cuda                  all ranks on one GPU

Every byte of every pass is compared with the whole model. Rank 0 lives throughout, and what it has grown by since the
first tenth of the passes is printed; so is what the latest of the other processes have grown by.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from support.groups import PAGE, Model, add_layers, check_pass, fill_shards, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode

GROUP_SIZE: Final = 3
CONFIG: Final = DWDPConfig(group_size=GROUP_SIZE, num_local_experts=4, host_experts=2, mode="in_place")
STALLS: Final = 0.01  # the share of copies that stall
STALL_SECONDS: Final = 0.005  # at most
ABANDONED: Final = 0.02  # the share of passes that are given up midway

processes = multiprocessing.get_context("spawn")


class StallingDriver(HostDriver):
    """Some copies wait for a while before they run."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(PAGE)
        self._chance = chance

    def copy(self, prepared: Any, stream: int) -> None:
        if stream and self._chance.random() < STALLS:
            seconds = self._chance.random() * STALL_SECONDS
            self._stream("copy", stream).submit(lambda: time.sleep(seconds))
        super().copy(prepared, stream)


class Usage(NamedTuple):
    """What a process has."""

    kilobytes: int
    descriptors: int
    threads: int
    resources: int  # in the ledger

    def __sub__(self, before: tuple[int, ...]) -> Usage:
        return Usage(*(after - old for after, old in zip(self, before, strict=True)))


@dataclass
class Report:
    """What happened.

    Attributes:
        passes: of all ranks; those of a rank that was killed are counted.
        grown: by rank, what its process has grown by since it was warm.
    """

    passes: int
    kills: int
    seconds: float
    grown: dict[int, Usage]
    left: list[str]  # in ledgers and the rendezvous directory at the end


def _model(device: str) -> Model:
    """Experts that share pages with their neighbours: of 4 KiB, or of the 2 MiB of a GPU."""
    size = 333 if device == "cpu" else 333 * 512
    return random_model({number: {"w": ((12, size), torch.bfloat16)} for number in range(5)})


def _usage(runtime: DWDPRuntime) -> Usage:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    resources = len(runtime.ledger.open())
    return Usage(kilobytes, len(os.listdir("/proc/self/fd")), threading.active_count(), resources)


def _random_pass(runtime: DWDPRuntime, model: Model, chance: random.Random) -> None:
    order = list(model)
    if chance.random() < 0.3:
        order = chance.choices(order, k=len(order))
    mode: Mode = "staged" if chance.random() < 0.8 else "in_place"
    if chance.random() < ABANDONED:
        check_pass(runtime, model, order[:2], mode)
        runtime.acquire(chance.choice(order), mode=mode)
        runtime.reset()
    else:
        check_pass(runtime, model, order, mode)


def _enter(rank: int, rendezvous: Path, device: str, chance: random.Random, rejoins: bool) -> DWDPRuntime:
    model = _model(device)
    driver = StallingDriver(chance) if device == "cpu" else None
    runtime = DWDPRuntime(CONFIG, rank, device, rendezvous, driver=driver)
    add_layers(runtime, model)
    if rejoins:
        runtime.rejoin()
    else:
        fill_shards(runtime, model)
        runtime.publish()
    return runtime


def _run_rank(
    rank: int, rendezvous: Path, device: str, seed: int, rejoins: bool, passes: Any, parent: Connection
) -> None:
    """Passes until the parent says something, or kills this process."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    model = _model(device)
    runtime = _enter(rank, rendezvous, device, chance, rejoins)
    parent.send("here")
    before = None
    done = 0
    while not parent.poll():
        _random_pass(runtime, model, chance)
        passes[rank] += 1
        done += 1
        if done == 100:
            before = _usage(runtime)
    grown = None if before is None else _usage(runtime) - before
    parent.send((grown, runtime.close().open()))


def soak(passes: int, kills: int, seed: int = 0, device: str = "cpu") -> Report:
    """At least ``passes`` passes of a group, and ``kills`` deaths spread evenly over them."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    start = time.monotonic()
    model = _model(device)
    counts = processes.RawArray("L", GROUP_SIZE)
    others: dict[int, tuple[BaseProcess, Connection]] = {}
    with tempfile.TemporaryDirectory() as directory:

        def enter(rank: int, rejoins: bool) -> None:
            ours, theirs = processes.Pipe()
            arguments = (rank, Path(directory), device, chance.randrange(1 << 30), rejoins, counts, theirs)
            process = processes.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            others[rank] = process, ours

        for rank in range(1, GROUP_SIZE):
            enter(rank, rejoins=False)
        runtime = _enter(0, Path(directory), device, chance, rejoins=False)
        for _, connection in others.values():
            assert connection.recv() == "here"
        before: Usage | None = None
        killed = 0
        while sum(counts) < passes or killed < kills:
            _random_pass(runtime, model, chance)
            counts[0] += 1
            if sum(counts) > passes * (killed + 0.5) / max(1, kills) and killed < kills:
                rank = chance.randrange(1, GROUP_SIZE)
                process, connection = others[rank]
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                process.close()
                connection.close()
                check_pass(runtime, model)
                enter(rank, rejoins=True)
                while not others[rank][1].poll():  # rank 0 goes on meanwhile
                    _random_pass(runtime, model, chance)
                    counts[0] += 1
                assert others[rank][1].recv() == "here"
                assert runtime.peers()[rank]
                killed += 1
            if before is None and sum(counts) > passes / 10:
                before = _usage(runtime)
        assert before is not None
        grown = {0: _usage(runtime) - before}
        left = []
        for rank, (process, connection) in others.items():
            connection.send("stop")
            usage, open_ = connection.recv()
            process.join()
            process.close()
            connection.close()
            left += open_
            if usage is not None:
                grown[rank] = usage
        left += runtime.close().open()
        left += os.listdir(directory)
    return Report(sum(counts), killed, time.monotonic() - start, grown, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    report = soak(**vars(parser.parse_args()))
    print(f"{report.passes} passes of {GROUP_SIZE} ranks in {report.seconds:.0f} s, every byte compared")
    print(f"{report.kills} ranks killed, and come back")
    for rank, grown in sorted(report.grown.items()):
        print(
            f"rank {rank} has grown by: " + ", ".join(f"{value:+d} {name}" for name, value in grown._asdict().items())
        )
    print(f"left at the end: {', '.join(report.left) or 'nothing'}")


if __name__ == "__main__":
    main()

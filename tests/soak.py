"""A small group for a long time: passes in any order, copies that stall, updates, ranks that are killed and come back.

    python tests/soak.py --passes 100000 --kills 20
    python tests/soak.py --device cuda --seconds 600    all ranks on one GPU

Every byte of every pass is compared with the whole model, and every now and then a rank checks pages, slots and the
checksums of all shards. Rank 0 lives throughout, and what it has grown by since the first tenth of the time is printed;
so is what the latest of the other processes have grown by.
"""

from __future__ import annotations

import argparse
import ctypes
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
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode

GROUP_SIZE: Final = 3
LAYERS: Final = 5
CONFIG: Final = DWDPConfig(group_size=GROUP_SIZE, num_local_experts=4, host_experts=2, mode="in_place", checksums=True)
STALLS: Final = 0.01  # the share of copies that stall
STALL_SECONDS: Final = 0.005  # at most
ABANDONED: Final = 0.02  # the share of passes that are given up midway
VERIFIED: Final = 0.02  # the share of passes after which a rank checks everything
UPDATED: Final = 0.02  # the share of rank 0's passes before which some layers get new weights
UPDATES_TOGETHER: Final = 5  # after a rank came back

Seeds = dict[int, int]  # by layer, of its weights

_c_library: Final = ctypes.CDLL(None)
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


def _stalling_cuda_driver(chance: random.Random) -> Driver:
    from vmm_dwdp.allocator.cuda_driver import CudaDriver  # only where there is a GPU

    class StallingCudaDriver(CudaDriver):
        """Some copies wait for a kernel that does nothing for a while."""

        def copy(self, prepared: Any, stream: int) -> None:
            if stream and chance.random() < STALLS:
                cycles = chance.random() * STALL_SECONDS * 1.7e9
                with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                    torch.cuda._sleep(int(cycles))
            super().copy(prepared, stream)

    return StallingCudaDriver(torch.device("cuda"))


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
        updates: by all ranks together, each of some layers.
        verifications: by all ranks, of pages, slots and the checksums of all shards.
        grown: by rank, what its process has grown by since it was warm.
    """

    passes: int
    updates: int
    verifications: int
    kills: int
    seconds: float
    grown: dict[int, Usage]
    left: list[str]  # in ledgers and the rendezvous directory at the end


class Counts(NamedTuple):
    """By rank, in memory that all processes share."""

    passes: Any
    verifications: Any


def _model(device: str, seeds: Seeds) -> Model:
    """Experts that share pages with their neighbours: of 4 KiB, or of the 2 MiB of a GPU."""
    size = 850 if device == "cpu" else 850 * 512
    shape = {"w": ((12, size), torch.bfloat16)}
    return {number: random_model({number: shape}, seed)[number] for number, seed in seeds.items()}


def _usage(runtime: DWDPRuntime) -> Usage:
    gc.collect()
    while sum(thread.name == "vmm-dwdp-exchange" for thread in threading.enumerate()) > 1:
        time.sleep(0.001)  # the last moments of requests that others know to be answered
    _c_library.malloc_trim(0)  # what it keeps for later is no growth
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    resources = len(runtime.ledger.open())
    return Usage(kilobytes, len(os.listdir("/proc/self/fd")), threading.active_count(), resources)


def _random_pass(runtime: DWDPRuntime, model: Model, chance: random.Random, counts: Counts) -> None:
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
    counts.passes[runtime.rank] += 1
    if chance.random() < VERIFIED:
        runtime.check_integrity(verify=True)
        counts.verifications[runtime.rank] += 1


def _update(runtime: DWDPRuntime, model: Model, new: Model) -> None:
    """This rank's part in giving some layers of ``model`` ``new`` weights."""
    shards = {}
    for number, weights in new.items():
        for name, tensor in weights.items():
            for owner in runtime.held_owners:
                experts = runtime.local_experts(number, owner)
                shards[number, name, owner] = tensor[experts.start : experts.stop]
    runtime.update(shards)
    model.update(new)


def _enter(rank: int, rendezvous: Path, device: str, model: Model, chance: random.Random, rejoins: bool) -> DWDPRuntime:
    driver = StallingDriver(chance) if device == "cpu" else _stalling_cuda_driver(chance)
    runtime = DWDPRuntime(CONFIG, rank, device, rendezvous, driver=driver)
    add_layers(runtime, model)
    if rejoins:
        runtime.rejoin()
    else:
        fill_shards(runtime, model)
        runtime.publish()
    return runtime


def _run_rank(
    rank: int,
    rendezvous: Path,
    device: str,
    seeds: Seeds,
    chance: random.Random,
    rejoins: bool,
    counts: Counts,
    parent: Connection,
) -> None:
    """Passes until the parent says `None`, or kills this process; an update when it says of which layers."""
    torch.set_num_threads(1)
    model = _model(device, seeds)
    runtime = _enter(rank, rendezvous, device, model, chance, rejoins)
    parent.send("here")
    before = None
    done = 0
    warm = not rejoins  # one that rejoins makes the stream for its edges in its first update
    while True:
        if parent.poll():
            if (told := parent.recv()) is None:
                break
            _update(runtime, model, _model(device, told))
            parent.send("updated")
            warm = True
        _random_pass(runtime, model, chance, counts)
        done += 1
        if warm and before is None and done >= 100:
            before = _usage(runtime)
    assert runtime.stats().fetched_bytes, "shards so small that pages leave nothing to fetch"
    grown = None if before is None else _usage(runtime) - before
    parent.send((grown, runtime.close().open()))


def soak(passes: int, kills: int, seconds: float | None = None, seed: int = 0, device: str = "cpu") -> Report:
    """At least ``passes`` passes of a group, or as many as it makes in ``seconds``; deaths are spread evenly."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    start = time.monotonic()
    seeds: Seeds = {number: number for number in range(LAYERS)}
    model = _model(device, seeds)
    counts = Counts(*(processes.RawArray("L", GROUP_SIZE) for _ in Counts._fields))
    others: dict[int, tuple[BaseProcess, Connection]] = {}

    def progress() -> float:
        return sum(counts.passes) / passes if seconds is None else (time.monotonic() - start) / seconds

    with tempfile.TemporaryDirectory() as directory:

        def enter(rank: int, rejoins: bool) -> None:
            ours, theirs = processes.Pipe()
            its_chance = random.Random(chance.randrange(1 << 30))
            arguments = (rank, Path(directory), device, seeds, its_chance, rejoins, counts, theirs)
            process = processes.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            others[rank] = process, ours

        def tell_all(message: Seeds | None) -> None:
            for _, connection in others.values():
                connection.send(message)

        def hear(rank: int) -> Any:
            return others[rank][1].recv()

        def update() -> None:
            nonlocal updates
            changed = {n: chance.randrange(1 << 30) for n in chance.sample(range(LAYERS), chance.randint(1, LAYERS))}
            seeds.update(changed)
            tell_all(changed)
            _update(runtime, model, _model(device, changed))
            for rank in others:
                assert hear(rank) == "updated"
            updates += 1

        for rank in range(1, GROUP_SIZE):
            enter(rank, rejoins=False)
        runtime = _enter(0, Path(directory), device, model, chance, rejoins=False)
        for rank in others:
            assert hear(rank) == "here"
        before: Usage | None = None
        updates = killed = 0
        while progress() < 1 or killed < kills:
            if chance.random() < UPDATED:
                update()
            _random_pass(runtime, model, chance, counts)
            if progress() > (killed + 0.5) / max(1, kills) and killed < kills:
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
                    _random_pass(runtime, model, chance, counts)
                assert hear(rank) == "here"
                assert runtime.peers()[rank]
                for _ in range(UPDATES_TOGETHER):  # the rank that came back takes part
                    update()
                    _random_pass(runtime, model, chance, counts)
                killed += 1
            if before is None and progress() > 0.1:
                before = _usage(runtime)
        assert before is not None
        assert runtime.stats().fetched_bytes, "shards so small that pages leave nothing to fetch"
        grown = {0: _usage(runtime) - before}
        left = []
        tell_all(None)
        for rank, (process, connection) in others.items():
            usage, open_ = hear(rank)
            process.join()
            process.close()
            connection.close()
            left += open_
            if usage is not None:
                grown[rank] = usage
        left += runtime.close().open()
        left += os.listdir(directory)
    return Report(sum(counts.passes), updates, sum(counts.verifications), killed, time.monotonic() - start, grown, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, help="go on for so long, instead of for so many passes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and there is none here")
    report = soak(**vars(options))
    print(f"{report.passes} passes of {GROUP_SIZE} ranks in {report.seconds:.0f} s, every byte compared")
    print(f"{report.updates} updates, {report.verifications} checks of all pages, slots and checksums")
    print(f"{report.kills} ranks killed, and come back")
    for rank, grown in sorted(report.grown.items()):
        print(
            f"rank {rank} has grown by: " + ", ".join(f"{value:+d} {name}" for name, value in grown._asdict().items())
        )
    print(f"left at the end: {', '.join(report.left) or 'nothing'}")


if __name__ == "__main__":
    main()

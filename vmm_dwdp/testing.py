"""Groups of real processes on one machine, for tests, demonstrations and benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from vmm_dwdp.errors import DWDPError

T = TypeVar("T")


class RankFailed(DWDPError):
    """A rank raised an exception or died; the message has its traceback or its exit code."""


def run_group(function: Callable[[int], T], group_size: int, device: str | torch.device = "cpu") -> list[T]:
    """Call ``function(rank)`` in one new process per rank, and return what each returned, in rank order.

    Args:
        function: picklable; so is what it returns.
        device: ``"cpu"``, or ``"cuda"``: then ranks take the GPUs of this machine in turn as their current device.

    Raises:
        RankFailed: a rank raised or died. The others are ended; no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    processes = []
    results: dict[Connection, int] = {}
    returned: dict[int, T] = {}
    try:
        for rank in range(group_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, function, rank, torch.device(device).type, threads)
            process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
            process.start()
            sender.close()  # so that the receiver sees the end of a rank that dies
            processes.append(process)
            results[receiver] = rank
        while results:
            for ready in wait(list(results)):
                assert isinstance(ready, Connection)
                rank = results.pop(ready)
                try:
                    failure, value = ready.recv()
                except EOFError:
                    processes[rank].join()
                    raise RankFailed(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
                if failure is not None:
                    raise RankFailed(f"rank {rank} failed:\n{failure}")
                returned[rank] = value
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    return [returned[rank] for rank in range(group_size)]


def _end_with_parent() -> None:
    """A parent that is killed cannot end its ranks, so each of them watches it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_rank(sender: Connection, function: Callable[[int], T], rank: int, device_type: str, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if device_type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        result = (None, function(rank))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    else:
        sender.send(result)

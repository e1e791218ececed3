"""Groups of real processes on one machine, for tests, demonstrations and benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, TypeVar

import torch

from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ConfigError, DWDPError

T = TypeVar("T")


class RankFailed(DWDPError):
    """A rank raised an exception or died.

    The message ends with the exception's own sentence, or is the exit code. What was raised by this library is that
    sentence alone, and where the rank raised it is the cause, which Python prints before; of all else the message has
    the traceback.
    """


class _RaisedAt(Exception):
    """Where a rank raised: its traceback without the sentence, which `RankFailed` has."""


class _Failure(NamedTuple):
    sentence: str
    raised_at: str | None  # None: the sentence has it


def run_group(function: Callable[[int], T], group_size: int, device: str | torch.device = "cpu") -> list[T]:
    """Call ``function(rank)`` in one new process per rank, and return what each returned, in rank order.

    Args:
        function: picklable; so is what it returns.
        device: ``"cpu"``, or ``"cuda"``: then ranks take the GPUs of this machine in turn as their current device.

    Ctrl-C interrupts this call, which ends the ranks; they themselves do not see it.

    Raises:
        RankFailed: ranks raised or died: the first, and those whose end was seen with it. The others are ended; no
            process is left behind.
        ConfigError: ``device`` is a GPU, and there is none.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.device_count():
        raise ConfigError("a group cannot run on cuda: torch finds no CUDA device")
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    processes = []
    results: dict[Connection, int] = {}
    returned: dict[int, T] = {}
    resource_tracker.ensure_running()  # which unblocks signals if it is started by a process
    try:
        for rank in range(group_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, function, rank, torch.device(device).type, threads)
            process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
            with uninterrupted(), _ctrl_c_blocked():
                process.start()
                processes.append(process)
            sender.close()  # so that the receiver sees the end of a rank that dies
            results[receiver] = rank
        while results:
            failed: dict[str, str] = {}  # by what they have to say, which may be the same
            cause: _RaisedAt | None = None
            for ready in wait(list(results)):
                assert isinstance(ready, Connection)
                rank = results.pop(ready)
                try:
                    failure, returned[rank] = ready.recv()
                except EOFError:
                    processes[rank].join()
                    failed[str(rank)] = f"rank {rank} died with exit code {processes[rank].exitcode}"
                    continue
                if failure is not None:
                    failed.setdefault(failure.sentence, f"rank {rank} failed: {failure.sentence}")
                    if failure.raised_at is not None and cause is None:
                        cause = _RaisedAt(f"in rank {rank}\n{failure.raised_at}")
            if failed:  # of those that are seen at the same time, one may have failed because of another
                raise RankFailed("\n".join(failed.values())) from cause
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    return [returned[rank] for rank in range(group_size)]


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """For what the body starts, as it would print a traceback while it imports. Not for the caller: another of its
    threads, torch's among them, may be the one that the signal comes to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its ranks, so each of them watches it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_rank(sender: Connection, function: Callable[[int], T], rank: int, device_type: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        if device_type == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        result = (None, function(rank))
    except BaseException as error:
        sender.send((_told(error), None))
    else:
        sender.send(result)


def _told(error: BaseException) -> _Failure:
    """What the parent is to say of it."""
    if not isinstance(error, DWDPError):
        return _Failure("\n" + "".join(traceback.format_exception(error)).rstrip("\n"), None)
    whole, own = traceback.format_exception(error), traceback.format_exception_only(error)
    sentence = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return _Failure(sentence, "".join(whole[: len(whole) - len(own)]).rstrip("\n"))

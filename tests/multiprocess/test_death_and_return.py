"""A rank is killed; the others go on; a new process takes its place and its memory while they run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, Model, add_layers, check_pass, join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

CONFIG = DWDPConfig(group_size=3, num_local_experts=4, host_experts=2, mode="in_place", resident_cache=20 * PAGE)


def _model() -> Model:
    """Experts that share pages with their neighbours, so that edges are part of what is handed over."""
    return random_model({number: {"w": ((12, 1777), torch.bfloat16)} for number in range(4)})


def _serve(rank: int, rendezvous: Path, commands: Connection) -> None:
    """One rank, told what to do: ``pass``, ``stop``."""
    torch.set_num_threads(1)
    model = _model()
    runtime = join(CONFIG, rank, rendezvous, model)
    commands.send("published")
    while commands.recv() == "pass":
        check_pass(runtime, model, mode="staged")
        check_pass(runtime, model)
        _refresh(runtime)
        check_pass(runtime, model)
        commands.send(sorted(peer for peer, alive in runtime.peers().items() if alive))
    commands.send(runtime.close().open())


def _refresh(runtime: DWDPRuntime) -> None:
    """A cache with experts of both other ranks and the host pool, the dead one's too."""
    for number in _model():
        runtime.acquire(number, chosen=torch.arange(12))
        runtime.release(number)
    runtime.refresh_cache()
    cache = runtime.stats().cache
    assert cache is not None
    assert cache.used_bytes > 0


def _rejoined(rendezvous: Path, rank: int) -> DWDPRuntime:
    """A runtime that has read no checkpoint: the model gives it shapes only."""
    runtime = DWDPRuntime(CONFIG, rank, "cpu", rendezvous, driver=HostDriver(PAGE))
    add_layers(runtime, _model())
    runtime.rejoin()
    return runtime


@pytest.fixture
def start(tmp_path: Path) -> Callable[[int], tuple[multiprocessing.process.BaseProcess, Connection]]:
    def start(rank: int) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    return start


@pytest.mark.parametrize("dead", [0, 1])  # rank 0 had created the pool of host memory
def test_a_new_process_takes_the_place_of_a_dead_rank(
    dead: int,
    tmp_path: Path,
    start: Callable[[int], tuple[multiprocessing.process.BaseProcess, Connection]],
) -> None:
    ranks = [start(rank) for rank in range(3)]
    assert [commands.recv() for _, commands in ranks] == ["published"] * 3
    victim, _ = ranks.pop(dead)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()

    def pass_on_survivors() -> list[list[int]]:
        for _, commands in ranks:
            commands.send("pass")
        return [commands.recv() for _, commands in ranks]

    survivors = [rank for rank in range(3) if rank != dead]
    assert pass_on_survivors() == [[other] for other in reversed(survivors)]
    for _ in range(2):  # and it can come back more than once
        runtime = _rejoined(tmp_path, dead)
        for mode in ("staged", "in_place"):
            check_pass(runtime, _model(), mode=mode)  # type: ignore[arg-type]
        _refresh(runtime)
        check_pass(runtime, _model())
        assert pass_on_survivors() == [sorted({*survivors, dead} - {rank}) for rank in survivors]
        assert runtime.close().open() == []
    assert pass_on_survivors() == [[other] for other in reversed(survivors)]
    for process, commands in ranks:
        commands.send("stop")
        assert commands.recv() == []
        process.join()


def test_a_rank_that_is_alive_cannot_be_replaced(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=3)
    with join(config, 0, tmp_path / "rendezvous", _model()) as runtime:
        other = DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE))
        add_layers(other, _model())
        with pytest.raises(StateError, match="rank 0 is alive"):
            other.rejoin()
        assert other.ledger.open() == []
        assert (tmp_path / "rendezvous" / "rank-0").is_socket(), "and its door stays where it is"
        check_pass(runtime, _model())


def test_nobody_left_to_hand_it_over(tmp_path: Path) -> None:
    runtime = DWDPRuntime(CONFIG, 1, "cpu", tmp_path, driver=HostDriver(PAGE))
    add_layers(runtime, _model())
    with pytest.raises(ExchangeError, match="no other rank is alive"):
        runtime.rejoin()
    assert runtime.ledger.open() == []

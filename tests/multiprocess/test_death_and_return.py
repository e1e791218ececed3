"""A rank is killed; the others go on; a new process takes its place and its memory while they run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.banks import check_looked_up
from support.groups import PAGE, Model, add_layers, check_pass, join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

CONFIG = DWDPConfig(group_size=3, num_local_experts=4, host_experts=2, mode="in_place", resident_cache=20 * PAGE)
BANK = replace(CONFIG, resident_cache=0, expert_bank=4 * 3 * PAGE, checksums=True)  # three experts of each layer


def _model() -> Model:
    """Experts that share pages with their neighbours, so that edges are part of what is handed over."""
    return random_model({number: {"w": ((12, 1777), torch.bfloat16)} for number in range(4)})


def _serve(config: DWDPConfig, rank: int, rendezvous: Path, commands: Connection) -> None:
    """One rank, told what to do: ``pass``, ``stop``."""
    torch.set_num_threads(1)
    model = _model()
    runtime = join(config, rank, rendezvous, model)
    commands.send("published")
    while commands.recv() == "pass":
        check_pass(runtime, model, mode="staged")
        check_pass(runtime, model)
        _fill(runtime)
        check_pass(runtime, model)
        commands.send(sorted(peer for peer, alive in runtime.peers().items() if alive))
    commands.send(runtime.close().open())


def _fill(runtime: DWDPRuntime) -> None:
    """A cache or a bank with experts of both other ranks and the host pool, the dead one's too."""
    if runtime.config.expert_bank:
        for experts in ((0, 4, 11), (8, 3, 11), (5, 4, 0)):
            check_looked_up(runtime, _model(), *experts)
        runtime.check_integrity(verify=True)
        assert all(counts.hits > 0 for counts in runtime.bank_counts().values())
        return
    for number in _model():
        runtime.acquire(number, chosen=torch.arange(12))
        runtime.release(number)
    runtime.refresh_cache()
    cache = runtime.stats().cache
    assert cache is not None
    assert cache.used_bytes > 0


def _rejoined(config: DWDPConfig, rendezvous: Path, rank: int) -> DWDPRuntime:
    """A runtime that has read no checkpoint: the model gives it shapes only."""
    runtime = DWDPRuntime(config, rank, "cpu", rendezvous, driver=HostDriver(PAGE))
    add_layers(runtime, _model())
    runtime.rejoin()
    return runtime


def _start(config: DWDPConfig, rendezvous: Path, rank: int) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(config, rank, rendezvous, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.parametrize("dead", [0, 1])  # rank 0 had created the pool of host memory
@pytest.mark.parametrize("config", [CONFIG, BANK], ids=["cache", "bank"])
def test_a_new_process_takes_the_place_of_a_dead_rank(config: DWDPConfig, dead: int, tmp_path: Path) -> None:
    ranks = [_start(config, tmp_path, rank) for rank in range(3)]
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
        runtime = _rejoined(config, tmp_path, dead)
        for mode in ("staged", "in_place"):
            check_pass(runtime, _model(), mode=mode)  # type: ignore[arg-type]
        _fill(runtime)
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

"""Groups of real processes: real descriptors cross real sockets."""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import signal
import subprocess
import sys
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.banks import look_up_and_check, models_of, some_experts
from support.groups import PAGE, Model, add_layers, check_pass, fill_shards, join, random_model

import vmm_dwdp
from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, testing
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.testing import RankFailed, run_group


def _model() -> Model:
    """Two weights whose experts are no multiple of a page, over an odd number of layers."""
    shapes = {"w13": ((10, 3000), torch.bfloat16), "w2": ((10, 777), torch.float8_e4m3fn)}
    return random_model(dict.fromkeys(range(5), shapes))


def _passes(config: DWDPConfig, rendezvous: Path, rank: int) -> dict[str, int]:
    torch.set_num_threads(1)
    with join(config, rank, rendezvous, _model()) as runtime:
        for _ in range(3):
            check_pass(runtime, _model())
        stats = runtime.stats()
    assert runtime.ledger.open() == []
    return {"hits": stats.hits, "misses": stats.misses, "fetched": stats.fetched_bytes}


@pytest.mark.parametrize(
    "config",
    [
        DWDPConfig(group_size=4),
        DWDPConfig(group_size=3, num_local_experts=5, prefetch_depth=3, slice_bytes=4096),
        DWDPConfig(group_size=2, host_experts=3, prefetch_depth=1, slice_bytes=1024),
        DWDPConfig(group_size=4, assembly="tensor_list"),
    ],
    ids=["four", "three-overlapping", "two-and-the-host", "tensor-list"],
)
def test_every_byte_in_every_process(config: DWDPConfig, tmp_path: Path) -> None:
    told = run_group(partial(_passes, config, tmp_path), config.group_size)
    assert [counts["misses"] for counts in told] == [0] * config.group_size
    assert all(counts["fetched"] > 0 for counts in told)
    assert list(tmp_path.iterdir()) == []


def _in_a_process_group(store: Path, rank: int) -> str:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    world = dist.group.WORLD
    assert world is not None
    try:
        driver = HostDriver(PAGE)
        with DWDPRuntime(DWDPConfig(group_size=2), rank, driver.device, world, driver=driver) as runtime:
            add_layers(runtime, _model())
            fill_shards(runtime, _model())
            runtime.publish()
            check_pass(runtime, _model())
            return runtime._membership._door.place
    finally:
        dist.destroy_process_group()


def test_ranks_of_a_process_group_meet_in_a_directory_of_their_own(tmp_path: Path) -> None:
    first, second = run_group(partial(_in_a_process_group, tmp_path / "store"), 2)
    assert first == second
    assert not Path(first).exists(), "it was made for the group"


def _cached_passes(rendezvous: Path, rank: int) -> int:
    """Every expert's pages are handles of their own: more than this process may have files open, at first."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    model = random_model({0: {"w": ((200, 1500), torch.float32)}})
    config = DWDPConfig(group_size=2, host_experts=100, mode="in_place", resident_cache=30 * PAGE)
    with join(config, rank, rendezvous, model) as runtime:
        remote = [expert for expert in range(200) if expert not in runtime.local_experts(0)]
        for chosen in (remote, remote[::7], remote[::-5]):
            runtime.acquire(0, chosen=torch.tensor(chosen)[:, None])
            runtime.release(0)
            runtime.refresh_cache()
            runtime.check_integrity()
            check_pass(runtime, model)
            check_pass(runtime, model, mode="staged")
        cache = runtime.stats().cache
    assert runtime.ledger.open() == []
    return 0 if cache is None else cache.used_bytes


def test_ranks_cache_experts_of_each_other_and_of_host_memory(tmp_path: Path) -> None:
    assert run_group(partial(_cached_passes, tmp_path), 2) == [30 * PAGE] * 2


def _banked_passes(rendezvous: Path, rank: int) -> bool:
    """Each rank routes in its own way; whether experts of the other were in its banks."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(rank)
    config = DWDPConfig(group_size=2, host_experts=2, mode="in_place", expert_bank=5 * 6 * PAGE, checksums=True)
    model = _model()
    with join(config, rank, rendezvous, model) as runtime:
        banks = models_of(runtime, model)
        for tokens in (1, 3, 2, 40, 3, 1):
            for number in model:
                look_up_and_check(runtime, model, number, some_experts(10, tokens, 2, generator), banks)
            runtime.check_integrity(verify=True)
            check_pass(runtime, model, mode="staged")
        others = set(range(8)) - set(runtime.local_experts(0))
        assert all(counts.hits > 0 for counts in runtime.bank_counts().values())
    assert runtime.ledger.open() == []
    return any(others & bank.row_of.keys() for bank in banks.values())


def test_ranks_have_experts_of_each_other_in_their_banks(tmp_path: Path) -> None:
    assert run_group(partial(_banked_passes, tmp_path), 2) == [True] * 2


def _pass_after_a_death(config: DWDPConfig, rendezvous: Path, dead: int, rank: int) -> None:
    torch.set_num_threads(1)
    model = _model()
    runtime = join(config, rank, rendezvous, model)
    check_pass(runtime, model)
    if rank == dead:
        (rendezvous / "dead").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    while runtime.peers()[dead]:
        pass
    for _ in range(3):
        check_pass(runtime, model)
    assert runtime.close().open() == []
    (rendezvous / f"survived-{rank}").touch()


@pytest.mark.parametrize(("host_experts", "dead"), [(0, 1), (4, 0)], ids=["a rank", "the one that made the host pool"])
def test_a_rank_that_dies_takes_no_other_rank_down(host_experts: int, dead: int, tmp_path: Path) -> None:
    config = DWDPConfig(group_size=3, host_experts=host_experts)
    run_group(partial(_ignoring_death, partial(_pass_after_a_death, config, tmp_path, dead), dead), 3)
    survived = {path.name for path in tmp_path.iterdir() if path.name.startswith("survived")}
    assert survived == {f"survived-{rank}" for rank in range(3) if rank != dead}


def _ignoring_death(function: partial[None], dead: int, rank: int) -> None:
    """Run one rank in a process of its own, so that its death is not the death of what reports to `run_group`."""
    child = os.fork() if rank == dead else 0
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    function(rank)


def _mismatched(rendezvous: Path, rank: int) -> None:
    join(DWDPConfig(group_size=2, prefetch_depth=1 + rank), rank, rendezvous, _model())


def test_ranks_with_different_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="the configs or the layers of the two ranks differ"):
        run_group(partial(_mismatched, tmp_path), 2)


def _fail(rank: int) -> int:
    if rank == 1:
        raise ValueError("this rank has a reason")
    return rank


def _die(rank: int) -> int:
    if rank == 1:
        os._exit(7)
    return rank


def test_run_group_returns_in_rank_order() -> None:
    assert run_group(abs, 3) == [0, 1, 2]


def test_run_group_raises_the_traceback_of_a_rank() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed.*ValueError: this rank has a reason"):
        run_group(_fail, 2)


REFUSED = """
from vmm_dwdp import ConfigError
from vmm_dwdp.testing import run_group

def refuse(rank):
    try:
        int("x")
    except ValueError as error:
        raise ConfigError("the weather is bad") from error

if __name__ == "__main__":
    run_group(refuse, 2)
"""


def test_what_a_rank_says_is_the_last_line_of_the_program_and_is_there_once(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(REFUSED)
    ended = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(vmm_dwdp.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("vmm_dwdp.testing.RankFailed: rank ")
    assert last.endswith(" failed: the weather is bad")
    assert ended.stderr.count("the weather is bad\n") == 1
    assert ", in refuse" in ended.stderr, "where the rank raised it"
    assert "invalid literal" in ended.stderr, "and why"


def _fail_as_another_has(rank: int) -> None:
    if rank == 2:
        os._exit(7)
    raise ConfigError("the others are gone" if rank else "the weather is bad")


def test_run_group_tells_of_all_whose_end_is_seen_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for_all(ends: list[Any]) -> list[Any]:
        for end in ends:
            connection.wait([end])
        return ends

    monkeypatch.setattr(testing, "wait", wait_for_all)
    with pytest.raises(RankFailed) as failed:
        run_group(_fail_as_another_has, 4)
    assert str(failed.value).splitlines() == [
        "rank 0 failed: the weather is bad",
        "rank 1 failed: the others are gone",
        "rank 2 died with exit code 7",
    ]


def test_run_group_tells_of_a_rank_that_died() -> None:
    with pytest.raises(RankFailed, match="rank 1 died with exit code 7"):
        run_group(_die, 2)


class _SentOnce:
    """Waits in rank 0; cannot be sent to another."""

    def __init__(self) -> None:
        self.sent = 0

    def __call__(self, rank: int) -> None:
        signal.pause()

    def __reduce__(self) -> tuple[type[_SentOnce], tuple[()]]:
        self.sent += 1
        if self.sent > 1:
            raise ValueError("cannot be sent again")
        return _SentOnce, ()


def test_run_group_ends_the_ranks_that_run_if_another_cannot_start() -> None:
    with pytest.raises(ValueError, match="cannot be sent again"):
        run_group(_SentOnce(), 2)
    assert multiprocessing.active_children() == []


def _tell_and_wait(folder: Path, rank: int) -> None:
    (folder / f"rank-{rank}").write_text(str(os.getpid()))
    signal.pause()


def _start_group(folder: Path) -> None:
    run_group(partial(_tell_and_wait, folder), 2)


def test_no_rank_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_start_group, args=(tmp_path,))
    parent.start()
    ranks = [tmp_path / "rank-0", tmp_path / "rank-1"]
    while not all(path.exists() and path.read_text() for path in ranks):
        assert parent.is_alive()
    descriptors = [os.pidfd_open(int(path.read_text())) for path in ranks]
    parent.kill()
    parent.join()
    for descriptor in descriptors:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)  # readable once the process has ended
        assert poll.poll(60_000)
        os.close(descriptor)

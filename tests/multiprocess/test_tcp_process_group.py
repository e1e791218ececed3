"""A process group that tells its ranks where the others listen, and a secret: or all of them what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from support.groups import PAGE, add_layers, check_pass, fill_shards, random_model
from support.ranks import processes, start_server

from vmm_dwdp import DWDPConfig, DWDPError, DWDPRuntime, TCPRendezvous
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group import rendezvous
from vmm_dwdp.group.doors import Where

MODEL = random_model({number: {"w": ((5, 1777), torch.bfloat16)} for number in range(2)})


def _in_a_process_group(store: Path, secrets: list[Path | None], interfaces: list[str], rank: int) -> list[str]:
    """What comes of each way to state it, one after another in one group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    world = dist.group.WORLD
    assert world is not None
    told = []
    try:
        ways = (
            lambda: TCPRendezvous(world, interface="lo"),
            lambda: TCPRendezvous(world, interface=interfaces[rank]),
            lambda: TCPRendezvous(world, interface="127.0.0.3", secret_file=secrets[0]),
            lambda: TCPRendezvous(world, interface="lo", secret_file=secrets[rank]),
            lambda: TCPRendezvous(world),
        )
        swapped = 1 - rank  # whose order is not the process group's
        told += [_life(way, DWDPConfig(group_size=2), swapped) for way in ways]
        told.append(_life(lambda: TCPRendezvous(world, interface="lo"), DWDPConfig(group_size=3), rank))
        rendezvous.machine_id = lambda: bytes([rank])
        told.append(_life(lambda: world, DWDPConfig(group_size=2), rank))
    finally:
        dist.destroy_process_group()
    return told


def _life(stated: Callable[[], Where], config: DWDPConfig, rank: int) -> str:
    try:
        driver = HostDriver(PAGE)
        with DWDPRuntime(config, rank, driver.device, stated(), driver=driver) as runtime:
            add_layers(runtime, MODEL)
            fill_shards(runtime, MODEL)
            runtime.publish()
            check_pass(runtime, MODEL)
            place = runtime._membership._door.place
        assert runtime.ledger.open() == []
    except DWDPError as error:
        return str(error)
    return place


def test_ranks_are_told_by_a_process_group_where_to_meet_or_what_is_wrong(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("a secret of the ranks")
    function = partial(_in_a_process_group, tmp_path / "store", [secret, None], ["127.0.0.2", "eth77"])
    start_server()
    with ProcessPoolExecutor(2, processes) as pool:
        first, second = pool.map(function, range(2))
    assert first == second
    lo, no_interface, other, some_secrets, unstated, three, hosts = first
    assert first == second
    assert lo.count("127.0.0.1:") == 2
    assert no_interface.startswith("rank 0: there is no IPv4 address of an interface 'eth77'")
    assert other.count("127.0.0.3:") == 2
    assert some_secrets == "TCPRendezvous has a secret_file on some ranks, and on others none"
    assert unstated == "TCPRendezvous of a process group needs the interface to listen at"
    assert three == "the process group has the ranks 0, 1, but the group 3 ranks"
    assert hosts.startswith("the ranks of the process group are on 2 hosts, between which no file descriptor goes:")

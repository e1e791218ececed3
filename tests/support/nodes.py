"""Several nodes of several ranks on one machine: each rank a process, joined by rails over gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from support.ranks import processes, start_server
from vmm_dwdp.nodes.rail import TorchRail


class Shape(NamedTuple):
    nodes: int
    ranks: int  # of a node

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


Rank = Callable[[Shape, int, int], Any]  # shape, node, rank in it


def run(shape: Shape, function: Rank) -> list[Any]:
    """What ``function`` returns for each rank of each node, each in a process; ``None`` if it dies."""
    start_server()
    started = []
    for place in range(shape.world):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=_send, args=(theirs, function, shape, place), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    results = []
    for process, ours in started:
        try:
            results.append(ours.recv())
        except EOFError:
            results.append(None)
        process.join()
        process.close()
        ours.close()
    return results


def _send(connection: Connection, function: Rank, shape: Shape, place: int) -> None:
    torch.set_num_threads(1)
    connection.send(function(shape, *divmod(place, shape.ranks)))


def rail_of(store: Path, shape: Shape, node: int, rank: int) -> TorchRail:
    """Of this process; ``store`` is a file that all of the world name."""
    place = node * shape.ranks + rank
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store.as_uri(), rank=place, world_size=shape.world, timeout=timeout)
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("node", "rank"))
    return TorchRail(mesh.get_group("node"))

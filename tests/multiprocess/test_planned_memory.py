"""The memory that a plan promises, against what a running group takes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.planning.memory import expert_memory
from vmm_dwdp.testing import run_group

PAGE, LAYERS = 4096, 5
WEIGHTS = {
    "w13": WeightSpec((7, 3, 1000), torch.bfloat16),
    "w2": WeightSpec((7, 1500), torch.float8_e4m3fn),
    "scale": WeightSpec((7, 5), torch.float32),
}


def take(config: DWDPConfig, rendezvous: Path, rank: int) -> tuple[int, int]:
    """Run one rank, and say what it took: resident and staged bytes."""
    driver = open_driver(torch.device("cpu"), granularity=PAGE)
    with DWDPRuntime(config, rank, "cpu", rendezvous, driver=driver) as runtime:
        for layer in range(LAYERS):
            runtime.add_layer(layer, WEIGHTS)
        runtime.publish()
        stats = runtime.stats()
        return stats.resident_bytes, stats.staged_bytes


@pytest.mark.parametrize(
    "config",
    [
        DWDPConfig(group_size=2),
        DWDPConfig(group_size=3, prefetch_depth=3, num_local_experts=4),
        DWDPConfig(group_size=2, host_experts=3, prefetch_depth=1),
    ],
    ids=["two", "overlapping", "with-the-host"],
)
def test_a_group_takes_what_was_planned(config: DWDPConfig, tmp_path: Path) -> None:
    rendezvous = tmp_path / "group"
    taken = run_group(partial(take, config, rendezvous), config.group_size)

    for rank, (resident, staged) in enumerate(taken):
        layer = describe_layer(0, WEIGHTS, config, rank, PAGE)
        planned = expert_memory(layer, LAYERS, rank, config.prefetch_depth)
        assert staged == planned.staged
        assert resident == planned.resident + (planned.host if rank == 0 else 0)

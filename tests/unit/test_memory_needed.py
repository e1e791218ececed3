"""What a rank says that it needs is what it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, add_layers, fill_shards, in_threads, random_model

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.layout.needs import MemoryNeeded

UNLIKE = random_model(
    {
        0: {"w": ((7, 3000), torch.bfloat16), "scales": ((7, 5), torch.float32)},
        1: {"w": ((9, 1000), torch.float32)},
        2: {"w": ((5, 777), torch.uint8), "more": ((5, 4096), torch.uint8)},
    }
)
CONFIGS = [
    DWDPConfig(group_size=1),
    DWDPConfig(group_size=1, host_experts=3),
    DWDPConfig(group_size=2),
    DWDPConfig(group_size=2, host_experts=4, prefetch_depth=1),
    DWDPConfig(group_size=3, num_local_experts=4, prefetch_depth=5),
    DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0, host_experts=1),
    DWDPConfig(group_size=2, assembly="tensor_list"),
    DWDPConfig(group_size=3, assembly="tensor_list", prefetch_depth=1),
]


def in_pages(last: int, weight: torch.Tensor) -> int:
    """Bytes of the pages in which the last experts of ``weight`` lie."""
    begin = (len(weight) - last) * weight[0].nbytes // PAGE
    return (-(-weight.nbytes // PAGE) - begin) * PAGE


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_rank_takes_what_it_says_and_knows_it_of_other_configs(config: DWDPConfig, tmp_path: Path) -> None:
    """What it takes is counted as it is taken; rank 0 takes the pool of host memory, too."""
    weights = [weight for weights in UNLIKE.values() for weight in weights.values()]
    host = sum(in_pages(config.host_experts, weight) for weight in weights) if config.host_experts else 0

    def rank_of(rank: int) -> MemoryNeeded:
        with DWDPRuntime(config, rank, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
            add_layers(runtime, UNLIKE)
            said = runtime.memory_needed()
            fill_shards(runtime, UNLIKE)
            runtime.publish()
            stats = runtime.stats()
        assert stats.resident_bytes == said.resident + (host if rank == 0 else 0)
        assert stats.staged_bytes == said.staged
        return said

    for rank, said in enumerate(in_threads(rank_of, config.group_size)):
        assert said.host == host
        assert said.on_device == said.resident + said.staged
        other = replace(config, mode="staged", prefetch_depth=2, host_experts=0)
        with DWDPRuntime(other, rank, "cpu", tmp_path / "other", driver=HostDriver(PAGE)) as runtime:
            add_layers(runtime, UNLIKE)
            assert runtime.memory_needed(config) == said


def test_a_config_that_cannot_spread_the_layers(tmp_path: Path) -> None:
    with DWDPRuntime(CONFIGS[0], 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        add_layers(runtime, UNLIKE)
        with pytest.raises(ConfigError, match="host_experts is 6"):
            runtime.memory_needed(DWDPConfig(group_size=1, host_experts=6))

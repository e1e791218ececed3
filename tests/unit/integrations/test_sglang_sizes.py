"""Which experts a rank of SGLang loads, where they go, and how many there are where memory was stated instead."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fused_moe import fused_moe, weight
from support.groups import PAGE

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.group.settle import least_of
from vmm_dwdp.integrations.sglang.expert_layer import ExpertLayer
from vmm_dwdp.integrations.sglang.settings import Stated
from vmm_dwdp.integrations.sglang.sizes import beside, settled

EXPERTS = 8
CONFIGS = {  # and what each of two ranks loads
    "equal shares": (DWDPConfig(group_size=2), [(0, 1, 2, 3), (4, 5, 6, 7)]),
    "overlap": (DWDPConfig(group_size=2, num_local_experts=5), [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7)]),
    "host memory": (DWDPConfig(group_size=2, host_experts=4), [(0, 1, 4, 5, 6, 7), (2, 3)]),
    "nothing on ranks": (DWDPConfig(group_size=2, host_experts=8), [(0, 1, 2, 3, 4, 5, 6, 7), (0,)]),
}


@contextmanager
def loading(config: DWDPConfig, rank: int, folder: Path) -> Iterator[tuple[Any, ExpertLayer, DWDPRuntime]]:
    """A layer that SGLang's constructor has filled with ones, and that is about to be loaded."""
    module = fused_moe(EXPERTS, EXPERTS // 2, w13_weight=weight(4) + 1, w2_weight=weight(4) + 1)
    layer = ExpertLayer(module, PAGE)
    with DWDPRuntime(config, rank, "cpu", folder / "group", driver=HostDriver(PAGE)) as runtime:
        layer.load(runtime)
        yield module, layer, runtime
        layer.restore()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_expert_is_loaded_into_its_place(name: str, rank: int, tmp_path: Path) -> None:
    """By SGLang's loader, which offers every expert to every rank, and asks the layer for its place."""
    config, loads = CONFIGS[name]
    with loading(config, rank, tmp_path) as (module, layer, runtime):
        assert layer.loads == loads[rank]
        assert module.num_local_experts == module.moe_runner_config.num_local_experts == len(loads[rank])
        for parameter in (module.w13_weight, module.w2_weight):
            assert parameter.shape[0] == len(loads[rank])
            assert bool((parameter == 1).all())
            for expert in range(EXPERTS):
                place = module._map_global_expert_id_to_local_expert_id(expert)
                assert (place >= 0) == (expert in loads[rank])
                if place >= 0:
                    parameter.data[place] = 10 + expert

        layer.finish()

        for owner in runtime.held_owners:
            held = runtime.local_experts(3, owner)
            for name in ("w13_weight", "w2_weight"):
                shard = runtime.local_shard(3, name, owner).view(torch.bfloat16)
                assert [set(expert.tolist()) for expert in shard] == [{10.0 + expert} for expert in held]
                del shard
    assert "_map_global_expert_id_to_local_expert_id" not in vars(module)
    assert module.num_local_experts == EXPERTS // 2


def test_until_then_a_layer_keeps_the_memory_of_one_expert() -> None:
    module = fused_moe(EXPERTS, EXPERTS // 2, w13_weight=weight(4) + 1, w2_weight=weight(4) + 1)
    layer = ExpertLayer(module, PAGE)
    assert module.w13_weight.untyped_storage().nbytes() == weight(1).nbytes

    layer.give_back(torch.device("cpu"))

    assert torch.equal(module.w13_weight, weight(4) + 1)


def test_what_post_processing_replaces_is_freed(tmp_path: Path) -> None:
    with loading(DWDPConfig(group_size=2), 0, tmp_path) as (module, _, _):
        before = weakref.ref(module.w13_weight)
        module.w13_weight = torch.nn.Parameter(weight(4), requires_grad=False)
        gc.collect()
        assert before() is None


# -- numbers ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def numbers(pages: int, group: Any) -> tuple[int, int]:
    """Of three layers of experts of a page each, with two slots: on the GPU, and in host memory."""
    config = DWDPConfig(group_size=1, num_local_experts="auto", memory_bytes=pages * PAGE)
    layers = {number: {"w": WeightSpec((EXPERTS, PAGE), torch.uint8)} for number in range(3)}
    found = settled(Stated(config, spills=True), layers, 0, PAGE, torch.device("cpu"), 1.0, group)
    assert found.memory_bytes is None
    return EXPERTS - found.host_experts, found.host_experts


def test_what_does_not_fit_goes_to_host_memory(alone: Any) -> None:
    """With n experts on the GPU, shards take 3 n pages and the two slots 2 (8 - n)."""
    assert [numbers(pages, alone) for pages in (16, 19, 23, 24, 100)] == [(0, 8), (3, 5), (7, 1), (8, 0), (8, 0)]


def test_room_that_is_not_enough_for_slots_is_refused(alone: Any) -> None:
    with pytest.raises(ConfigError, match=r"rank 0 needs .* for experts .*prefetch_depth: 1 .* would fit"):
        numbers(15, alone)


def test_one_rank_without_room_refuses_for_all() -> None:
    assert least_of([5, 3, 4]) == 3
    with pytest.raises(ConfigError, match="does not fit on rank 1, which says more"):
        least_of([5, None, 4])


def test_experts_take_what_activations_and_the_kv_cache_leave() -> None:
    assert beside(20, free=90, total=100, static_fraction=0.8) == 50
    assert beside(20, free=30, total=100, static_fraction=0.8) == 1  # refused, by what it lacks


def test_a_stated_kv_cache_is_subtracted(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm_dwdp.integrations.sglang.sizes.memory_of", lambda *_: (30 * PAGE, 40 * PAGE))
    config = DWDPConfig(group_size=1, num_local_experts="auto")
    layers = {number: {"w": WeightSpec((EXPERTS, PAGE), torch.uint8)} for number in range(3)}
    stated = Stated(config, spills=True, kv_cache=2 * PAGE)
    found = settled(stated, layers, 0, PAGE, torch.device("cpu"), 0.75, alone)
    assert found.host_experts == 6  # 30 pages less 10 of activations, less 2: 18 are 16 and one for each expert here

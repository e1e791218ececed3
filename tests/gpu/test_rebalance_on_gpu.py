"""Experts that change places on a GPU: graphs that were captured before read and count them where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.groups import Model, add_layers, fill_shards, in_threads, random_model
from support.moved import ask_for_tables, check_experts, check_held, rebalance, route, write_all

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.config import Mode

pytestmark = pytest.mark.gpu

EXPERTS, SIZE, LAYERS = 8, 1024, 3  # 2 MiB an expert and a bit: page borders inside of experts
SHAPES = {n: {"w": ((EXPERTS, SIZE + 1, SIZE), torch.bfloat16)} for n in range(LAYERS)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)
CONFIG = DWDPConfig(group_size=2, mode="in_place", movable_experts=True, checksums=True)


def join(rank: int, rendezvous: Path, config: DWDPConfig) -> DWDPRuntime:
    """On one GPU with the others of its group, in this process."""
    runtime = DWDPRuntime(config, rank, "cuda", rendezvous)
    add_layers(runtime, OLD)
    fill_shards(runtime, OLD)
    runtime.publish()
    ask_for_tables(runtime, OLD)
    return runtime


@pytest.mark.parametrize("cached", [0, 8 << 20])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_graphs_replay_after_swaps_and_updates(mode: Mode, cached: int, tmp_path: Path) -> None:
    config = DWDPConfig(**{**vars(CONFIG), "resident_cache": cached, "mode": "auto" if cached else "in_place"})
    runtimes = in_threads(lambda rank: join(rank, tmp_path, config), 2)
    runtime = runtimes[0]
    chosen = torch.zeros(64, 1, dtype=torch.int64, device="cuda")

    def forward() -> list[torch.Tensor]:
        """Each layer's experts in the model's order."""
        found = []
        for number in OLD:
            with runtime.layer(number, mode=mode, tokens=4, chosen=chosen) as weights:
                whole = weights["w"]
                assert isinstance(whole, torch.Tensor)
                found.append(whole.view(torch.int16).index_select(0, runtime.logical_to_physical(number)))
        return found

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()

    def check(model: Model) -> None:
        for output in outputs:
            output.zero_()
        graph.replay()
        for number, output in enumerate(outputs):
            assert torch.equal(output.cpu(), model[number]["w"].view(torch.int16))
        for each in runtimes:
            for way in ("staged", "in_place"):
                check_experts(each, model, way)  # type: ignore[arg-type]
            each.check_integrity(verify=True)
        check_held(runtimes, model)

    model, moved = OLD, 0
    for step in range(6):
        chosen.fill_(7 - step)
        for _ in range(3):
            graph.replay()
        if step == 3:
            model = NEW
            torch.cuda.synchronize()
            in_threads(lambda rank: write_all(runtimes[rank], NEW), 2)
        for each in runtimes:
            route(each, {number: [(step + 4) % 8, (step + 5) % 8] for number in OLD})
        torch.cuda.synchronize()
        moved += rebalance(runtimes)
        if cached:
            for each in runtimes:
                each.refresh_cache()
        check(model)
    assert moved
    if mode == "in_place":  # a replay alone is counted: what this rank reads of the other comes here
        far = next(expert for expert in runtimes[1].held_experts(0) if expert not in runtime.held_experts(0))
        chosen.fill_(far)
        for _ in range(50):
            graph.replay()
        torch.cuda.synchronize()
        assert rebalance(runtimes) > 0
        assert far in runtime.held_experts(0)
        check(model)
    outputs.clear()
    graph.reset()
    assert [each.close().open() for each in runtimes] == [[], []]

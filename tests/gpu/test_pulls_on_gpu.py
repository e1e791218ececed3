"""Runs that are chosen one by one, on a GPU: many of each owner, by ranks that are processes of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.groups import check_pass, join, random_model, same_bytes

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.layout import turns
from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.gpu

LAYERS, PASSES = 5, 6
MODEL = {
    number: {
        "w13": ((10, 1024, 1024 + number), torch.bfloat16),
        "w2": ((10, 512, 1024), torch.float32),
        "s": ((10, 7), torch.float32),
    }
    for number in range(LAYERS)
}


def _eager(config: DWDPConfig, rendezvous: Path, rank: int) -> None:
    model = random_model(MODEL, seed=3)
    with patch.object(turns, "SHORTEST_RUN", 1 << 20):
        runtime = join(config, rank, rendezvous, model, open_driver(torch.device("cuda")))
    with runtime:
        path = runtime.stats().copy_path
        assert path is not None
        assert (path.plan, path.issued_by) == ("runs", "native thread")
        for _ in range(PASSES):
            check_pass(runtime, model)
        runtime.reset()
        check_pass(runtime, model)
    assert runtime.close().open() == []


def _replayed(config: DWDPConfig, rendezvous: Path, rank: int) -> None:
    """Eager passes and replays in turn: the first layers' fetches are given whole from the capture on."""
    model = random_model(MODEL, seed=4)
    with patch.object(turns, "SHORTEST_RUN", 1 << 20):
        runtime = join(config, rank, rendezvous, model, open_driver(torch.device("cuda")))
    with runtime:
        check_pass(runtime, model)
        found: dict[int, torch.Tensor] = {}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in model:
                weights = runtime.acquire(number)
                found[number] = weights["w13"].clone()  # type: ignore[union-attr]
                runtime.release(number)
        for _ in range(3):
            for copied in found.values():
                copied.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for number, copied in found.items():
                assert same_bytes(copied, model[number]["w13"])
            check_pass(runtime, model)
        del graph, found, weights
    assert runtime.close().open() == []


@pytest.mark.parametrize("group_size", [3, 4])
@pytest.mark.parametrize("run", [_eager, _replayed])
def test_every_byte_is_right(run: object, group_size: int, tmp_path: Path) -> None:
    config = DWDPConfig(group_size=group_size, host_experts=2 if group_size == 3 else 0)
    run_group(partial(run, config, tmp_path), group_size, "cuda")  # type: ignore[arg-type]

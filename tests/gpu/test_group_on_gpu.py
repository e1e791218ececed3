"""Groups of processes that share one GPU, with pages of the real size: every byte, both modes, both assemblies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.groups import Model, check_pass, join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.config import Mode
from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.gpu


def _model() -> Model:
    """Experts of 1.4 and 0.3 MB: page borders fall inside experts, and shards meet within pages."""
    shapes = {"w13": ((10, 700_001), torch.bfloat16), "w2": ((10, 300_007), torch.float8_e4m3fn)}
    return random_model(dict.fromkeys(range(5), shapes))


def _passes(config: DWDPConfig, rendezvous: Path, rank: int) -> None:
    model = _model()
    modes: list[Mode] = ["staged", "in_place"] if config.mode == "in_place" else ["staged"]
    with join(config, rank, rendezvous, model, open_driver(torch.device("cuda"))) as runtime:
        for mode in modes * 2:
            check_pass(runtime, model, mode=mode)
        check_pass(runtime, model, [3, 0, 4, 4, 1])
        runtime.reset()
        check_pass(runtime, model)
        for favourite in (0, 9, 4) if config.resident_cache else ():
            _refresh(runtime, favourite)
            for mode in modes:
                check_pass(runtime, model, mode=mode)
        stats = runtime.stats()
    assert runtime.ledger.open() == []
    assert stats.hits > 0
    assert stats.fetched_bytes > 0
    if config.resident_cache:
        assert stats.cache is not None
        assert stats.cache.used_bytes == stats.cache.nbytes > 0


def _refresh(runtime: DWDPRuntime, favourite: int) -> None:
    """After tokens that use all experts, one of them much more than the others."""
    chosen = torch.cat([torch.arange(10), torch.full((50,), favourite)]).to(runtime.device)
    for number in range(5):
        runtime.acquire(number, chosen=chosen[:, None])
        runtime.release(number)
    runtime.refresh_cache()
    runtime.check_integrity(verify=True)


CONFIGS = {
    "four": DWDPConfig(group_size=4, mode="in_place"),
    "three-overlapping": DWDPConfig(group_size=3, num_local_experts=5, prefetch_depth=3, slice_bytes=1 << 20),
    "two-and-the-host": DWDPConfig(group_size=2, host_experts=3, prefetch_depth=1, mode="in_place"),
    "two-with-caches": DWDPConfig(
        group_size=2, host_experts=3, mode="in_place", resident_cache=12 << 20, checksums=True
    ),
    "alone-with-the-host": DWDPConfig(group_size=1, host_experts=10, mode="in_place"),
    "tensor-list": DWDPConfig(group_size=3, assembly="tensor_list"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_byte_on_every_rank(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    run_group(partial(_passes, config, tmp_path), config.group_size, "cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_grouped_gemm_cannot_tell_the_difference(mode: Mode, tmp_path: Path) -> None:
    """An unmodified kernel on assembled memory, over many passes without a pause, against torch's own memory."""
    config = replace(CONFIGS["alone-with-the-host"], host_experts=6)
    torch.manual_seed(0)
    model: Model = {number: {"w": torch.randn(8, 512, 1024, dtype=torch.bfloat16)} for number in range(5)}
    own = {number: weights["w"].cuda() for number, weights in model.items()}
    x = torch.randn(256, 1024, dtype=torch.bfloat16, device="cuda")
    ends = torch.arange(32, 257, 32, dtype=torch.int32, device="cuda")
    with join(config, 0, tmp_path / "rendezvous", model, open_driver(torch.device("cuda"))) as runtime:
        results = []
        for _ in range(20):
            for number in model:
                with runtime.layer(number, mode=mode) as weights:
                    assert isinstance(weights["w"], torch.Tensor)
                    results.append(torch._grouped_mm(x, weights["w"].transpose(-2, -1), offs=ends))
        del weights
    for index, result in enumerate(results):
        expected = torch._grouped_mm(x, own[index % len(model)].transpose(-2, -1), offs=ends)
        assert torch.equal(result, expected), index

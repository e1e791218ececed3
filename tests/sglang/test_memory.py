"""The formulas of benchmarks/memory_versus_sglang.py are those of SGLang's own classes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory_versus_sglang")


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("model", ["DeepSeek-R1, NVFP4", "gpt-oss-120b, MXFP4"])
def test_memory_of_a_rank_of_sglang(benchmark_module: Any, model: str, group_size: int) -> None:
    from sglang.srt.layers.moe.dwdp.layout import DwdpExpertLayout, PageAlignedLayout

    num_layers, specs = benchmark_module.MODELS[model]
    for rank in range(group_size):
        shard = slot = whole = 0
        for name, spec in specs.items():
            if name not in benchmark_module.SPREAD_BY_SGLANG:
                whole += spec.num_experts * spec.expert_nbytes
                continue
            held = DwdpExpertLayout(spec.num_experts, group_size, rank)
            layout = PageAlignedLayout.compute(
                expert_bytes=spec.expert_nbytes,
                num_experts=spec.num_experts,
                local_start=held.local_expert_start,
                local_end=held.local_expert_end,
                granularity=benchmark_module.GRANULARITY,
                handle_phys_size=1 << 62,
                pool_granularity=benchmark_module.POOL_PAGE,
            )
            shard += layout.mnnvl_size
            slot += layout.pre_size + layout.post_size
        expected = num_layers * (shard + whole) + 2 * slot
        assert benchmark_module.sglang_nbytes(num_layers, specs, group_size, rank) == expected

"""Every byte of every assembled tensor, for any group, against the unsharded model."""

from __future__ import annotations

import random
import tempfile
from typing import get_args

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.groups import Shapes, check_pass, published, random_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.config import Mode, ModeSetting

DTYPES = [
    torch.float4_e2m1fn_x2,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
]


@st.composite
def groups(draw: st.DrawFn) -> tuple[DWDPConfig, Shapes]:
    num_experts = draw(st.integers(1, 300))
    group_size = draw(st.integers(1, 16))
    assembly = draw(st.sampled_from(["vmm", "vmm", "tensor_list"]))
    host_experts = draw(st.one_of(st.just(0), st.integers(0, num_experts))) if assembly == "vmm" else 0
    on_ranks = num_experts - host_experts
    least = -(-on_ranks // group_size)
    most = on_ranks if group_size <= 6 else min(on_ranks, least + 1)  # all ranks share this process's descriptors
    mode = draw(st.sampled_from(get_args(ModeSetting))) if assembly == "vmm" else "staged"
    config = DWDPConfig(
        group_size=group_size,
        num_local_experts=draw(st.one_of(st.none(), st.integers(least, most))),
        host_experts=host_experts,
        prefetch_depth=draw(st.integers(0 if mode == "in_place" else 1, 5)),
        slice_bytes=draw(st.sampled_from(["auto", "streams", 1024, 8192])),
        assembly=assembly,
        mode=mode,
    )
    # About 100 kB a weight at most, so that many groups can be tried; odd sizes meet page borders at every offset.
    largest = max(1, min(2000, 100_000 // num_experts))
    weight = st.tuples(st.integers(1, largest), st.sampled_from(DTYPES))
    weights = draw(st.lists(weight, min_size=1, max_size=3 if group_size < 8 else 1))
    growth = draw(st.sampled_from([0, 97]))  # whether all layers have the same shapes
    layers: Shapes = {}
    for layer in range(draw(st.integers(1, 6 if group_size < 8 else 3))):
        shapes = [((num_experts, size + growth * layer), dtype) for size, dtype in weights]
        layers[3 * layer + 1] = {f"weight{i}": shape for i, shape in enumerate(shapes)}
    return config, layers


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups(), st.integers(0, 2**32 - 1))
def test_every_byte_on_every_rank_in_passes_in_and_out_of_order(group: tuple[DWDPConfig, Shapes], seed: int) -> None:
    config, layers = group
    model = random_model(layers, seed)
    shuffled = random.Random(seed)
    with tempfile.TemporaryDirectory() as rendezvous, published(config, rendezvous, model) as runtimes:
        for runtime in runtimes:
            modes: list[Mode] = ["staged"] * bool(config.prefetch_depth) + ["in_place"] * config.reads_in_place
            for mode in modes * 2:
                check_pass(runtime, model, mode=mode)
            for tokens in shuffled.choices([1, 20, 400], k=4 if config.mode == "auto" else 0):
                check_pass(runtime, model, tokens=tokens)
            check_pass(runtime, model, shuffled.choices(list(model), k=2 * len(model)), tokens=1)
            runtime.reset()
            for mode in modes:
                check_pass(runtime, model, mode=mode)

"""The forward pass of real `FusedMoE` layers over assembled weights equals that over ordinary weights, bit for bit.

On a GPU these are SGLang's Triton and Marlin kernels, and the ranks share the GPU; elsewhere its plain PyTorch path,
for bf16.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import engine_process
import experts
import numpy as np
import pytest
import test_loading
import torch
from ports import free_port

from vmm_dwdp.testing import run_group

ON_A_GPU = ("bf16", "fp8 block", "wna16", "awq")
KINDS = {kind: test_loading.KINDS[kind] for kind in (ON_A_GPU if torch.cuda.is_available() else ON_A_GPU[:1])}
NUM_TOKENS = (1, 33, 200)
NUM_EXPERTS, TOP_K = 16, 4
CONFIGS = (
    "host_experts: 5",
    f"host_experts: {NUM_EXPERTS}",
    f"host_experts: {NUM_EXPERTS}\nmode: in_place\nprefetch_depth: 0",
    f"host_experts: {NUM_EXPERTS}\nmode: auto",
)

Outputs = dict[str, list[np.ndarray]]  # by kind of weights


def forward(rank: int, *, size: int, port: int, configs: list[str | None]) -> list[Outputs]:
    """For each config, two passes with every number of tokens."""
    engine_process.start(rank, size, port)
    found = []
    for config in configs:
        if config is not None:
            os.environ["VMM_DWDP_CONFIG"] = config
        found.append({kind: outputs(kind, rank, size) for kind in KINDS})
    return found


def outputs(kind: str, rank: int, size: int) -> list[np.ndarray]:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    engine_process.use_runner(KINDS[kind], rank, size)
    model = experts.model(kind, NUM_EXPERTS, TOP_K)
    experts.load(model)
    manager = engine_process.init_dwdp(model)
    generator = torch.Generator(device="cpu").manual_seed(1)
    found = []
    for num_tokens in NUM_TOKENS * 2:
        hidden = torch.randn(num_tokens, experts.HIDDEN, generator=generator, device="cpu")
        logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator, device="cpu")
        hidden, logits = hidden.to(engine_process.DEVICE, torch.bfloat16), logits.to(engine_process.DEVICE)
        weights, chosen = logits.softmax(dim=-1).topk(TOP_K)
        if manager is not None:
            manager.prefetch_first_layers()
        for layer in model.layers:
            routed = StandardTopKOutput(weights.float(), chosen.to(torch.int32), logits)
            hidden = hidden + layer.forward_impl(hidden.clone(), routed)
        found.append(hidden.float().cpu().numpy())
    if manager is not None:
        mode, counts = manager.runtime.config.mode, manager.runtime.stats().layers.values()
        if mode == "staged":
            assert all(layer.hits == len(found) + 1 for layer in counts)
        if mode == "auto":  # one token is read in place, and one layer was when it was bound; more are staged
            assert all((layer.hits + layer.misses, layer.in_place) == (4, 1 + 2) for layer in counts)
        engine_process.shut_down()
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[Outputs]:
    """Without DWDP, then with each config."""
    paths: list[str | None] = [None]
    for config in CONFIGS:
        path = Path(tmp_path_factory.mktemp("config"), "dwdp.yaml")
        path.write_text(f"group_size: 1\n{config}\n")
        paths.append(str(path))
    [found] = run_group(partial(forward, size=1, port=free_port(), configs=paths), 1, engine_process.DEVICE)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_host_memory(kind: str, one_process: list[Outputs]) -> None:
    ordinary, *in_host_memory = one_process
    assert all(output.std() > 0.1 for output in ordinary[kind])
    for found in in_host_memory:
        assert all(map(np.array_equal, found[kind], ordinary[kind]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; elsewhere test_engine.py has two ranks")
def test_experts_spread_over_two_ranks(one_process: list[Outputs], tmp_path: Path) -> None:
    """In equal shares; then in shares that overlap, and host memory."""
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 2\nnum_local_experts: 7\nhost_experts: 5\n")
    run = partial(forward, size=2, port=free_port(), configs=[None, str(config)])
    for rank in run_group(run, 2, engine_process.DEVICE):
        for found in rank:
            for kind in KINDS:
                assert all(map(np.array_equal, found[kind], one_process[0][kind]))

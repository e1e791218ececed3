"""torch.compile leaves acquire and release where the program has them, around what reads the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime

MODEL = random_model({number: {"w": ((4, 64, 64), torch.bfloat16)} for number in range(5)}, seed=3)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    for weights in MODEL.values():
        weights["w"].copy_(torch.randn(weights["w"].shape))
    runtime = join(DWDPConfig(group_size=1, host_experts=3), 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    torch._dynamo.reset()  # compiled code holds the tensors that it saw
    assert runtime.close().open() == []


def forward(runtime: DWDPRuntime, x: torch.Tensor) -> torch.Tensor:
    for number in MODEL:
        w: Any = runtime.acquire(number)["w"]
        alone = w.float().sum(0)  # reads the weight and nothing else: what a scheduler would like to move
        x = torch.tanh(torch.einsum("th,ehi->ti", x, w.float())) + x @ alone
        runtime.release(number)
    return x


def test_a_compiled_model_reads_each_layer_between_its_acquire_and_its_release(runtime: DWDPRuntime) -> None:
    x = torch.randn(3, 64)
    whole = x
    for weights in MODEL.values():
        w = weights["w"].float()
        whole = torch.tanh(torch.einsum("th,ehi->ti", whole, w)) + whole @ w.sum(0)
    compiled = torch.compile(forward, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(runtime, x), whole)
    assert runtime.stats().hits == 3 * len(MODEL)


def test_one_graph_of_a_whole_model_is_refused_with_the_reason(runtime: DWDPRuntime) -> None:
    with pytest.raises(RuntimeError, match="acquire and release stand between compiled regions"):
        torch.compile(forward, backend="aot_eager", fullgraph=True)(runtime, torch.randn(3, 64))

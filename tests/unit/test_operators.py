"""Acquire and release as operators: one graph of a whole model, which reads every layer between its two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import join, random_model
from torch.fx.passes.split_module import split_module

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError, operators
from vmm_dwdp.allocator.host_driver import HostDriver

SIZE = 64
MODEL = random_model({number: {"w": ((4, SIZE, SIZE), torch.float32)} for number in range(5)}, seed=3)
SPLITTING = {"vmm_dwdp::acquire", "vmm_dwdp::release"}


class Layer(torch.nn.Module):
    """Reads a slot's tensor, which has the layer's bytes from its acquire to its release alone."""

    def __init__(self, runtime: DWDPRuntime, layer: int) -> None:
        super().__init__()
        with runtime.layer(layer) as weights:
            self.w: Any = weights["w"]
        self.number = operators.number(runtime)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch.ops.vmm_dwdp.acquire(x, self.number, self.layer)
        alone = self.w.sum(0)  # reads the weight and nothing else: what a scheduler would like to move
        y = torch.tanh(torch.einsum("th,ehi->ti", x, self.w)) + x @ alone
        torch.ops.vmm_dwdp.release(y, self.number, self.layer)
        return y + 1


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    for weights in MODEL.values():
        weights["w"].copy_(torch.randn(4, SIZE, SIZE))
    runtime = join(DWDPConfig(group_size=1, host_experts=3), 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    torch._dynamo.reset()  # compiled code holds the tensors that it saw
    assert runtime.close().open() == []


def whole(x: torch.Tensor) -> torch.Tensor:
    """The same with ordinary tensors."""
    for weights in MODEL.values():
        x = x * 2
        x = torch.tanh(torch.einsum("th,ehi->ti", x, weights["w"])) + x @ weights["w"].sum(0) + 1
    return x


def in_pieces(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """A backend that cuts a graph at the operators, as engines do that capture what is between them."""
    part, parts = 0, {}
    for node in module.graph.nodes:
        cut = str(node.target).removesuffix(".default").replace(".", "::") in SPLITTING
        part += cut
        parts[node] = part
        part += cut
    split = split_module(module, module, lambda node: parts[node], keep_original_order=True)
    pieces = [name for name, _ in split.named_children()]
    assert len(pieces) == 4 * len(MODEL) + 1, pieces
    return split


@pytest.mark.parametrize("backend", ["aot_eager", in_pieces])  # inductor: tests/gpu, as its C++ takes minutes
def test_one_graph_of_a_whole_model(runtime: DWDPRuntime, backend: Any) -> None:
    model = torch.nn.Sequential(*(Layer(runtime, number) for number in MODEL))
    runtime.reset()
    before = runtime.stats()
    x = torch.randn(3, SIZE)
    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), whole(x), rtol=1e-5, atol=1e-5)
    stats = runtime.stats()
    assert stats.hits - before.hits == 3 * len(MODEL)
    assert stats.misses == before.misses
    del model, compiled


def test_a_runtime_has_one_number_while_it_lives(runtime: DWDPRuntime, tmp_path: Path) -> None:
    number = operators.number(runtime)
    assert operators.number(runtime) == number
    other = DWDPRuntime(DWDPConfig(group_size=1), 0, "cpu", tmp_path / "other", driver=HostDriver())
    gone = operators.number(other)
    assert gone != number
    other.close()
    del other
    with pytest.raises(StateError, match=f"no runtime of this process has the number {gone}"):
        torch.ops.vmm_dwdp.acquire(torch.zeros(1), gone, 0)

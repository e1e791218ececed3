"""torch.compile leaves acquire and release where the program has them, around what reads the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.schedule.compiled_models import between_regions

MODEL = random_model({number: {"w": ((4, 64, 64), torch.bfloat16)} for number in range(5)}, seed=3)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    for weights in MODEL.values():
        weights["w"].copy_(torch.randn(weights["w"].shape))
    runtime = join(DWDPConfig(group_size=1, host_experts=3), 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    torch._dynamo.reset()  # compiled code holds the tensors that it saw
    assert runtime.close().open() == []


def layer(runtime: DWDPRuntime, number: int, x: torch.Tensor) -> torch.Tensor:
    w: Any = runtime.acquire(number)["w"]
    alone = w.float().sum(0)  # reads the weight and nothing else: what a scheduler would like to move
    x = torch.tanh(torch.einsum("th,ehi->ti", x, w.float())) + x @ alone
    runtime.release(number)
    return x


def forward(runtime: DWDPRuntime, x: torch.Tensor) -> torch.Tensor:
    """Without a loop, of which torch compiles nothing if a region would end in it."""
    x = layer(runtime, 0, x)
    x = layer(runtime, 1, x)
    x = layer(runtime, 2, x)
    x = layer(runtime, 3, x)
    return layer(runtime, 4, x)


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


def test_one_graph_of_a_whole_model_is_refused_where_a_layer_is_acquired(runtime: DWDPRuntime) -> None:
    reason = r"HitPath\.acquire" if HAS_NATIVE else "acquire and release stand between compiled regions"
    with pytest.raises(RuntimeError, match=reason):
        torch.compile(forward, backend="aot_eager", fullgraph=True)(runtime, torch.randn(3, 64))


def test_regions_end_at_acquire_and_release_and_nothing_in_them_is_compiled(runtime: DWDPRuntime) -> None:
    told = torch._dynamo.explain(forward)(runtime, torch.randn(3, 64))
    assert told.graph_count >= 1
    assert {frame.filename for reason in told.break_reasons for frame in reason.user_stack} == {__file__}


def with_block(runtime: DWDPRuntime, x: torch.Tensor) -> torch.Tensor:
    with runtime.layer(0) as weights:
        w: Any = weights["w"]
        x = torch.tanh(x @ w[0].float())
    return torch.sin(x)


def test_a_with_block_that_turns_compilation_off_says_so(runtime: DWDPRuntime) -> None:
    x = torch.randn(3, 64)
    wanted = torch.sin(torch.tanh(x @ MODEL[0]["w"][0].float()))
    with pytest.warns(UserWarning, match="call acquire and release there") as told:
        assert torch.equal(torch.compile(with_block, backend="aot_eager")(runtime, x), wanted)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(with_block(runtime, x), wanted)


def test_the_exception_of_a_with_block_is_not_replaced(runtime: DWDPRuntime) -> None:
    def release_and_raise() -> None:
        runtime.release(0)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as raised, runtime.layer(0):
        release_and_raise()
    assert raised.value.__notes__ == ["and then: layer 0 is released, but was not acquired"]


def test_a_torch_without_these_marks_gets_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: object, x: int, *, y: int = 2) -> int:
        return x + y

    assert between_regions(call) is call
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    wrapper = between_regions(call)
    assert wrapper is not call
    assert wrapper(None, 1, y=3) == 4

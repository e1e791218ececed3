"""A step of decoding in a CUDA graph, with transformers' static cache: every bit of transformers' own model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.banked_models import with_rows
from support.moe_models import NUM_EXPERTS, tiny_model
from support.static_decoding import Decoding, require_same_logits
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.integrations.transformers import attach

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 768, "intermediate_size": 768}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 128},
    "deepseek_v3": {},
    "gpt_oss": {"head_dim": 128, "sliding_window": 16},
}
IN_PLACE = DWDPConfig(group_size=1, host_experts=NUM_EXPERTS - 1, mode="auto", prefetch_depth=1)
PAGE = 2 << 20


def sized(family: str, implementation: str) -> PreTrainedModel:
    model = tiny_model(family, **SIZES, **OF_FAMILY[family]).to(torch.bfloat16)
    model.set_experts_implementation(implementation)
    return model


CASES = [*((family, "grouped_mm") for family in OF_FAMILY), ("qwen3_moe", "batched_mm")]


@contextmanager
def spread(model: PreTrainedModel, config: DWDPConfig, place: Path) -> Iterator[DWDPRuntime]:
    runtime = DWDPRuntime(config, 0, "cuda", place)
    attach(model, runtime)
    model.to("cuda")
    yield runtime
    assert runtime.close().open() == []


def captured(runtime: DWDPRuntime, decoding: Decoding) -> Callable[[], Tensor]:
    """A step that is replayed, as transformers.md shows it."""
    graph = torch.cuda.CUDAGraph()
    with runtime.forward_pass(mode="in_place"), torch.cuda.graph(graph):
        logits = decoding.step()

    def replayed() -> Tensor:
        graph.replay()
        return logits

    return replayed


@pytest.mark.parametrize("rows", [0, 3], ids=["in place", "bank"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_replays_for_changing_tokens_have_the_bits_of_the_whole_model(
    family: str, implementation: str, rows: int, tmp_path: Path
) -> None:
    """Of several sequences, each after a prompt that was read eagerly."""
    if family == "gpt_oss" and "torch.tensor(0.0" in inspect.getsource(masking_utils.eager_mask):
        pytest.skip("this transformers' mask for eager attention takes a number from the host")
    whole, model = sized(family, implementation).to("cuda"), sized(family, implementation)
    config = with_rows(IN_PLACE, model, rows, PAGE) if rows else IN_PLACE
    with spread(model, config, tmp_path / "group") as runtime:
        decoding, expected = Decoding(model), Decoding(whole)
        require_same_logits(decoding.run(0), expected.run(0))  # loads and compiles whatever a capture could not
        step = captured(runtime, decoding)
        runtime.update({})  # which empties the bank, so that replays copy
        before = runtime.bank_counts()
        for seed in range(1, 4):
            require_same_logits(decoding.run(seed, step), expected.run(seed))
        if rows:
            after = runtime.bank_counts()
            assert all(before[layer].hits < counts.hits < counts.uses for layer, counts in after.items())
            assert any(before[layer].copied < counts.copied for layer, counts in after.items())
            runtime.check_integrity(verify=True)


def test_an_exception_in_a_capture_costs_that_capture_only(tmp_path: Path) -> None:
    whole, model = sized("qwen3_moe", "grouped_mm").to("cuda"), sized("qwen3_moe", "grouped_mm")
    with spread(model, IN_PLACE, tmp_path / "group") as runtime:
        decoding, expected = Decoding(model), Decoding(whole)
        require_same_logits(decoding.run(0), expected.run(0))
        experts = model.get_submodule("model.layers.1.mlp.experts")
        with (
            mock.patch.object(experts.act_fn, "forward", side_effect=ZeroDivisionError),
            pytest.raises((ZeroDivisionError, RuntimeError)),  # torch may find the capture broken before it raises ours
        ):
            captured(runtime, decoding)
        require_same_logits(decoding.run(1, captured(runtime, decoding)), expected.run(1))
        require_same_logits(decoding.run(2), expected.run(2))

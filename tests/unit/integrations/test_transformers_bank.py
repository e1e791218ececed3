"""Models whose experts are looked up in a bank: every bit of transformers' own model, in prefill and in decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.banked_models import decoded, require_same_bits, with_rows
from support.groups import PAGE, in_threads
from support.moe_models import NUM_EXPERTS, logits, prompt, tiny_model
from support.mxfp4_kernels import keeping_mxfp4
from support.quantised_models import keeping_fp8, save, whole_model
from transformers import PreTrainedModel

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach, from_pretrained
from vmm_dwdp.integrations.transformers.experts import align_experts

IN_PLACE = DWDPConfig(group_size=1, host_experts=NUM_EXPERTS - 1, mode="in_place", prefetch_depth=0)
ROWS = 3  # fewer experts than two sequences use in a step
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "lfm2_moe")


@contextmanager
def spread(model: PreTrainedModel, place: Path, config: DWDPConfig = IN_PLACE) -> Iterator[DWDPRuntime]:
    runtime = DWDPRuntime(with_rows(config, model, ROWS, PAGE), 0, "cpu", place, driver=HostDriver(PAGE))
    attach(model, runtime, timeout=30)
    yield runtime
    runtime.check_integrity(verify=True)
    assert runtime.close().open() == []


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_has_the_bits_of_the_whole_model(
    family: str, dtype: torch.dtype, implementation: str, tmp_path: Path
) -> None:
    whole, model = (tiny_model(family).to(dtype) for _ in range(2))
    for each in (whole, model):
        align_experts(each)
        each.set_experts_implementation(implementation)
    expected = decoded(whole, prompt())
    with spread(model, tmp_path / "group"):
        require_same_bits(model, prompt(), expected)


def test_prefill_may_be_staged_and_decoding_in_place(tmp_path: Path) -> None:
    whole, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    with spread(model, tmp_path / "group", replace(IN_PLACE, mode="auto", prefetch_depth=1)) as runtime:
        with torch.no_grad():
            many = torch.arange(64)[None]
            assert torch.equal(model(many).logits, whole(many).logits)
            assert runtime.stats().in_place == 0
            assert {each.uses for each in runtime.bank_counts().values()} == {0}
            for number in range(3, 20):
                one = torch.tensor([[number]])
                assert torch.equal(model(one).logits, whole(one).logits)
        assert all(0 < each.hits < each.uses for each in runtime.bank_counts().values())


def test_ranks_of_a_group_each_have_a_bank(tmp_path: Path) -> None:
    """Of experts of the other rank and of host memory, read from a checkpoint."""
    saved = tmp_path / "model"
    whole = tiny_model("qwen3_moe")
    whole.save_pretrained(saved)
    expected = decoded(whole, prompt())
    config = with_rows(DWDPConfig(group_size=2, host_experts=3, mode="in_place", prefetch_depth=0), whole, ROWS, PAGE)

    def run(rank: int) -> None:
        place: dict[str, Any] = {"device": "cpu", "rendezvous": tmp_path / "group", "driver": HostDriver(PAGE)}
        model = from_pretrained(saved, config, rank=rank, **place)
        with model.dwdp:
            require_same_bits(model, prompt(), expected)

    in_threads(run, 2)


def test_block_scales_are_in_the_bank_beside_their_experts(tmp_path: Path) -> None:
    folder = save("qwen3_moe fp8", tmp_path / "model")
    with keeping_fp8():
        whole = whole_model(folder, experts_implementation="grouped_mm")
        expected = decoded(whole, prompt())
        config = with_rows(IN_PLACE, whole, ROWS, PAGE)
        place: dict[str, Any] = {"device": "cpu", "rendezvous": tmp_path / "group", "driver": HostDriver(PAGE)}
        stated: dict[str, Any] = {"dtype": "auto", "experts_implementation": "grouped_mm"}
        model = from_pretrained(folder, config, rank=0, **place, **stated)
        with model.dwdp as runtime:
            with runtime.layer(1):
                found, _ = runtime.look_up(1, torch.tensor([[4, 5]]))
                assert {name for name in found if name.endswith("scale_inv")} == {
                    "gate_up_proj_scale_inv",
                    "down_proj_scale_inv",
                }
                assert {len(each) for each in found.values()} == {ROWS + NUM_EXPERTS}
                del found
            require_same_bits(model, prompt(), expected)


def test_a_forward_pass_that_raises_leaves_the_count_of_experts(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    expected = logits(model)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    with spread(model, tmp_path / "group"):
        with mock.patch.object(experts.act_fn, "forward", side_effect=KeyError), pytest.raises(KeyError):
            logits(model)
        assert experts.num_experts == NUM_EXPERTS
        assert torch.equal(logits(model), expected)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "implementation", "sentence"),
    [
        ("qwen3_moe", "eager", "runs by the experts implementation 'eager', which would add in another order"),
        ("llama4_text", None, "does not follow transformers' interface of experts"),
        ("jetmoe", None, "does not follow transformers' interface of experts"),
    ],
)
def test_a_module_that_cannot_read_rows_is_refused(
    family: str, implementation: str | None, sentence: str, tmp_path: Path
) -> None:
    """And the model is as it was."""
    model = tiny_model(family)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    expected = logits(model)
    runtime = DWDPRuntime(with_rows(IN_PLACE, model, ROWS, PAGE), 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE))
    with pytest.raises(ConfigError, match=sentence):
        attach(model, runtime)
    assert runtime.ledger.open() == []
    assert torch.equal(logits(model), expected)


def test_an_implementation_that_is_set_later_is_refused_and_may_be_set_back(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    expected = logits(model)
    with spread(model, tmp_path / "group"):
        model.set_experts_implementation("eager")
        with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts runs by the experts implementation 'eager'"):
            logits(model)
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("keeping", "refused"), [(keeping_mxfp4, True), (nullcontext, False)])
def test_mxfp4_in_its_kernels_layout_is_refused_and_dequantised_is_not(
    keeping: Callable[[], AbstractContextManager[None]], refused: bool, tmp_path: Path
) -> None:
    folder = save("gpt_oss mxfp4", tmp_path / "model")
    place: dict[str, Any] = {"device": "cpu", "rendezvous": tmp_path / "group", "driver": HostDriver(PAGE)}
    with keeping():
        whole = whole_model(folder)
        load = lambda: from_pretrained(folder, with_rows(IN_PLACE, whole, ROWS, PAGE), rank=0, dtype="auto", **place)  # noqa: E731
        if refused:
            with pytest.raises(ConfigError, match="in a layout of its kernels, which are told all experts at once"):
                load()
            return
        expected = decoded(whole, prompt())
        model = load()
        with model.dwdp:
            require_same_bits(model, prompt(), expected)

"""Decoding with a static cache, in place: every bit of transformers' own model, step by step and in repetitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.banked_models import with_rows
from support.groups import PAGE
from support.moe_models import NUM_EXPERTS, tiny_model
from support.static_decoding import STEPS, Decoding, Tape, require_same_logits, spread
from transformers import PreTrainedModel

from vmm_dwdp import DriverError, DWDPConfig, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import turns
from vmm_dwdp.integrations.transformers.experts import align_experts

IN_PLACE = DWDPConfig(group_size=1, host_experts=NUM_EXPERTS - 1, mode="in_place", prefetch_depth=0)
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
"""The last has layers whose tokens see a window, here of fewer tokens than there are."""


def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two equal ones."""
    sizes = {"sliding_window": 16} if family == "gpt_oss" else {}
    whole, model = (tiny_model(family, **sizes).to(torch.bfloat16) for _ in range(2))
    for each in (whole, model):
        align_experts(each)
        each.set_experts_implementation("grouped_mm")
    return whole, model


@pytest.mark.parametrize("rows", [0, 3], ids=["in place", "bank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_has_the_bits_of_the_whole_model(family: str, rows: int, tmp_path: Path) -> None:
    whole, model = models(family)
    expected = Decoding(whole).run(0)
    config = with_rows(IN_PLACE, model, rows, PAGE) if rows else IN_PLACE
    with spread(model, tmp_path / "group", config) as runtime:
        require_same_logits(Decoding(model).run(0), expected)
        assert runtime.stats().in_place == (1 + STEPS) * len(runtime.stats().layers)
        if rows:
            assert all(0 < each.hits < each.uses for each in runtime.bank_counts().values())
            runtime.check_integrity(verify=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_was_recorded_is_right_for_every_token_of_every_sequence(family: str, tmp_path: Path) -> None:
    """And asks nothing of the device; the mode is stated as transformers.md states it."""
    whole, model = models(family)
    expected = Decoding(whole)
    auto = replace(IN_PLACE, mode="auto", prefetch_depth=1)
    with spread(model, tmp_path / "group", auto) as runtime:
        decoding = Decoding(model)
        decoding.run(0)
        decoding.begin(torch.arange(3, 8)[None])
        with runtime.forward_pass(mode="in_place"):
            tape = Tape(decoding.step)
        for seed in range(1, 4):
            require_same_logits(decoding.run(seed, tape.replay), expected.run(seed))
        del tape


def test_a_capture_may_follow_one_that_failed(tmp_path: Path) -> None:
    """Without a pass between: a capture has left the slots as they were, and `reset` in one is refused."""
    whole, model = models("qwen3_moe")
    expected = Decoding(whole)
    with spread(model, tmp_path / "group", replace(IN_PLACE, mode="auto", prefetch_depth=1)):
        decoding = Decoding(model)
        require_same_logits(decoding.run(0), expected.run(0))
        experts = model.get_submodule("model.layers.1.mlp.experts")
        with (
            mock.patch.object(HostDriver, "capturing", return_value=True),
            mock.patch.object(turns, "is_captured", return_value=True),
        ):
            with mock.patch.object(experts.act_fn, "forward", side_effect=KeyError), pytest.raises(KeyError):
                decoding.step()
            tape = Tape(decoding.step)
        require_same_logits(decoding.run(1, tape.replay), expected.run(1))
        del tape


def test_no_capture_follows_a_pass_that_could_not_be_given_up(tmp_path: Path) -> None:
    """Until another pass has begun anew."""

    def fail() -> None:
        raise DriverError("wait", "CUDA_ERROR_UNKNOWN", "give up the pass")

    whole, model = models("qwen3_moe")
    expected = Decoding(whole)
    with spread(model, tmp_path / "group", replace(IN_PLACE, mode="auto", prefetch_depth=1)) as runtime:
        decoding = Decoding(model)
        experts = model.get_submodule("model.layers.1.mlp.experts")
        with (
            mock.patch.object(experts.act_fn, "forward", side_effect=KeyError),
            mock.patch.object(runtime, "reset", fail),
            pytest.raises(KeyError),
        ):
            decoding.begin(torch.arange(3, 8)[None])
        for _ in range(2):
            with (
                mock.patch.object(HostDriver, "capturing", return_value=True),
                mock.patch.object(turns, "is_captured", return_value=True),
                pytest.raises(StateError, match="leaves the slots as they are"),
            ):
                decoding.step()
        require_same_logits(decoding.run(1), expected.run(1))


def test_experts_that_ask_the_device_are_found() -> None:
    whole, _ = models("qwen3_moe")
    whole.set_experts_implementation("eager")
    decoding = Decoding(whole)
    decoding.begin(torch.arange(3, 8)[None])
    with pytest.raises(AssertionError, match="waits for the device"):
        Tape(decoding.step)


def test_a_window_that_python_counts_is_wrong_in_replays() -> None:
    """In transformers' own model: why what is cached is not cut to it."""
    whole, _ = models("gpt_oss")
    expected = Decoding(whole).run(1)
    decoding = Decoding(whole, windows=True)
    require_same_logits(decoding.run(1), expected)
    decoding.begin(torch.arange(3, 8)[None])
    tape = Tape(decoding.step)  # of the sixth token
    decoding.begin(torch.arange(3, 15)[None])
    replayed = tape.replay().clone()  # of the thirteenth
    decoding.begin(torch.arange(3, 15)[None])
    assert not torch.equal(replayed, decoding.step())

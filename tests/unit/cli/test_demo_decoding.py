"""How the demo continues a prompt: as transformers' own loop does, and the same bits where a step is replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.banked_models import with_rows
from support.groups import PAGE
from support.moe_models import NUM_EXPERTS, tiny_model
from support.static_decoding import Tape, spread
from transformers import PreTrainedModel

from vmm_dwdp import DWDPConfig, StateError
from vmm_dwdp.cli import demo_group
from vmm_dwdp.cli.demo_decoding import KERNELS, Step
from vmm_dwdp.cli.demo_group import Job
from vmm_dwdp.cli.demo_models import Continuation, Generated, Text
from vmm_dwdp.integrations.transformers.experts import align_experts

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
"""The last has layers whose tokens see a window, here of fewer tokens than there are."""
IN_PLACE = DWDPConfig(group_size=1, host_experts=NUM_EXPERTS - 1, mode="in_place", prefetch_depth=0)
PROMPT, NEW_TOKENS = "My dear sister", 24
TEXT = Text(vocabulary=64, tokenizer=None)


def model_of(family: str, *, sampled: bool = True) -> PreTrainedModel:
    model = tiny_model(family, eos_token_id=None, **({"sliding_window": 16} if family == "gpt_oss" else {}))
    model.generation_config.do_sample = sampled
    model.generation_config.temperature = 0.5 if sampled else None
    align_experts(model)
    return model


def continuation(model: PreTrainedModel) -> Continuation:
    return Continuation(model, TEXT, PROMPT, NEW_TOKENS)


def taped(step: Step) -> Step:
    """What stands for a graph on a CPU."""
    return Tape(step).replay


def broken(step: Step) -> Step:
    raise RuntimeError("no such operation\nin a capture")


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_loop_and_cache_write_the_same(family: str, sampled: bool) -> None:
    """From the same seed; sums over a longer cache round otherwise."""
    model = model_of(family, sampled=sampled)
    prompt = torch.tensor([TEXT.encode(PROMPT)])
    torch.manual_seed(0)
    own = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = continuation(model).generate()

    assert found.text == TEXT.decode(own.sequences[0, prompt.shape[1] :].tolist())
    torch.testing.assert_close(torch.from_numpy(found.logits), torch.cat(own.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_have_the_bits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    expected, model = continuation(model_of(family)).generate(), model_of(family)
    with spread(model, tmp_path / "group", IN_PLACE):
        written = continuation(model)
        written.generate(KERNELS)
        written.capture(taped)
        for _ in range(2):
            assert written.generate().same(expected)
        del written


def test_steps_with_a_bank_have_the_bits_of_the_whole_model(tmp_path: Path) -> None:
    """Eagerly: on a CPU the bank's planner is no graph."""
    expected, model = continuation(model_of("qwen3_moe")).generate(), model_of("qwen3_moe")
    with spread(model, tmp_path / "group", with_rows(IN_PLACE, model, 3, PAGE)) as runtime:
        assert continuation(model).generate().same(expected)
        assert all(0 < each.hits < each.uses for each in runtime.bank_counts().values())


def test_fewer_tokens_are_the_first(tmp_path: Path) -> None:
    written = continuation(model_of("qwen3_moe"))
    whole, first = written.generate(), written.generate(3)

    assert len(first.logits) == 3
    assert first.logits.tobytes() == whole.logits[:3].tobytes()


def test_a_step_that_cannot_be_captured_is_run_as_before() -> None:
    written = continuation(model_of("qwen3_moe"))
    expected = written.generate()

    with pytest.raises(StateError, match=r"a step of \w+ cannot be captured: no such operation$"):
        written.capture(broken)
    assert written.generate().same(expected)


def test_a_model_without_a_static_cache_is_continued_by_transformers() -> None:
    model = model_of("aria_text")
    written = continuation(model)
    expected = written.generate()

    with pytest.raises(StateError, match="transformers has no static cache for AriaTextForCausalLM"):
        written.capture(taped)
    assert len(expected.logits) == NEW_TOKENS
    assert written.generate().same(expected)


def rank_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch, capture: object) -> tuple[Generated | None, str]:
    """What a rank finds that is told of a GPU and has none; its figures are of what was not replayed."""
    monkeypatch.setattr(demo_group, "in_cuda_graph", capture)
    model = model_of("qwen3_moe")
    job = Job(folder, IN_PLACE, "cuda", None, (PROMPT,), NEW_TOKENS, folder)
    with spread(model, folder / "group", IN_PLACE) as runtime:
        generated, stats, replayed, why = demo_group._continued(model, job, 0)
        assert generated.same(continuation(model_of("qwen3_moe")).generate())
        assert stats.in_place == (KERNELS + NEW_TOKENS) * len(runtime.stats().layers)
    return replayed, why


def test_a_rank_on_a_gpu_writes_by_replays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed, why = rank_of_one(tmp_path, monkeypatch, taped)

    assert replayed is not None
    assert replayed.same(continuation(model_of("qwen3_moe")).generate())
    assert why == ""


def test_a_rank_says_why_there_are_no_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_of_one(tmp_path, monkeypatch, broken) == (
        None,
        "a step of Qwen3MoeForCausalLM cannot be captured: no such operation",
    )

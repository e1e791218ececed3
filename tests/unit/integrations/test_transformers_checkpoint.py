"""Experts out of a checkpoint, one at a time, against what transformers makes of the whole checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.moe_models import FAMILIES, NUM_EXPERTS, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)

from vmm_dwdp import ConfigError, WeightSpec
from vmm_dwdp.checkpoint import SINGLE_FILE, Checkpoint
from vmm_dwdp.integrations.transformers import checkpoint as transformers_checkpoint
from vmm_dwdp.integrations.transformers.checkpoint import ExpertSource, expert_sources
from vmm_dwdp.integrations.transformers.experts import find_experts

GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"
STACKED = "model.layers.1.mlp.experts.gate_up_proj"


def sources_of(directory: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, ExpertSource]:
    """The sources for a model of which only shapes exist."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    specs = {
        f"{experts.path}.{name}": spec for experts in find_experts(model) for name, spec in experts.weights.items()
    }
    return expert_sources(model, specs, checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_of_every_family(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with Checkpoint(tmp_path) as checkpoint:
        sources = sources_of(tmp_path, checkpoint, torch.bfloat16)
        assert sources
        for parameter, source in sources.items():
            experts = torch.stack([source.read(expert) for expert in range(NUM_EXPERTS)])
            assert torch.equal(experts, whole.get_parameter(parameter)), parameter


def test_names_of_the_model_itself(tmp_path: Path) -> None:
    """A checkpoint that holds the stacked parameters under the model's own names, which need no conversion."""
    model = tiny_model("qwen3_moe", tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / SINGLE_FILE)
    with Checkpoint(tmp_path) as checkpoint:
        for parameter, source in sources_of(tmp_path, checkpoint).items():
            assert torch.equal(source.read(4), model.get_parameter(parameter)[4])


def test_a_stacked_tensor_with_too_few_experts_is_named(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    save_file({**model.state_dict(), STACKED: torch.zeros(6, 48, 32)}, tmp_path / SINGLE_FILE)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ConfigError, match=r"7 experts.*\[6, 48, 32\]"):
        sources_of(tmp_path, checkpoint)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def without(pattern: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if re.search(pattern, name)]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without(re.escape(GATE.format(5))), [STACKED, GATE.format(5)]),
        (without(re.escape(GATE.format(0))), [STACKED, GATE.format(0)]),
        (without(r"layers\.1\.mlp\.experts\.[1-6]\.gate_proj"), [STACKED, "7 experts", GATE.format(0), "[24, 32]"]),
        (without(r"layers\.1\.mlp\.experts\..*gate_proj"), [f"expert 0 of {STACKED}", "[48, 32]", "[24, 32]"]),
        (without(r"layers\.1\.mlp\.experts\.\d"), ["no tensor", STACKED]),
        (
            lambda tensors: tensors.update({GATE.format(3): torch.zeros(24, 31)}),
            [f"expert 3 of {STACKED}", GATE.format(3), "[24, 31]"],
        ),
        (
            lambda tensors: tensors.update({GATE.format(3): torch.zeros(23, 32)}),
            [f"expert 3 of {STACKED}", "[48, 32]", "[47, 32]", GATE.format(3)],
        ),
    ],
)
def test_a_missing_or_misshapen_expert_is_named(
    saved: Path, change: Callable[[dict[str, Tensor]], Any], named: list[str]
) -> None:
    rewrite(saved, change)
    with Checkpoint(saved) as checkpoint, pytest.raises(ConfigError) as refusal:
        sources_of(saved, checkpoint)
    assert all(part in str(refusal.value) for part in named), refusal.value


# -- conversions that few families use, or none yet: each applied to one expert at a time, and to all at once

E, I, H = 6, 4, 3  # noqa: E741
PER_EXPERT = {f"experts.{e}.{half}.weight": torch.randn(I, H) for half in ("gate", "up") for e in range(E)}
STACKED_PAIR = {"moe.gate.weight": torch.randn(E, I, H), "moe.up.weight": torch.randn(E, I, H)}
CONVERSIONS = {
    "stack, then concatenate": (
        PER_EXPERT,
        WeightConverter(
            ["experts.*.gate.weight", "experts.*.up.weight"], "experts.gu", [MergeModulelist(dim=0), Concatenate(dim=1)]
        ),
        {"experts.gu": (E, 2 * I, H)},
    ),
    "concatenate what is stacked": (
        STACKED_PAIR,
        WeightConverter(["moe.gate.weight", "moe.up.weight"], "experts.gu", [Concatenate(dim=1)]),
        {"experts.gu": (E, 2 * I, H)},
    ),
    "transpose": (
        {"moe.w": torch.randn(E, H, I)},
        WeightConverter("moe.w", "experts.w", [Transpose(1, 2)]),
        {"experts.w": (E, I, H)},
    ),
    "transpose if need be": (
        {"moe.w": torch.randn(E, H, I)},
        WeightConverter("moe.w", "experts.w", [Transpose(1, 2, check_dims=True)]),
        {"experts.w": (E, I, H)},
    ),
    "no need to transpose": (
        {"moe.w": torch.randn(E, I, H)},
        WeightConverter("moe.w", "experts.w", [Transpose(1, 2, check_dims=True)]),
        {"experts.w": (E, I, H)},
    ),
    "one tensor, two parameters": (
        {"moe.gu": torch.randn(E, 2 * I, H)},
        WeightConverter("moe.gu", ["experts.gate", "experts.up"], [Chunk(dim=1)]),
        {"experts.gate": (E, I, H), "experts.up": (E, I, H)},
    ),
    "two kinds of experts in one list": (
        {f"experts.{e}.{half}.weight": torch.randn(I, H) for half in ("gate", "up") for e in range(2 * E)},
        WeightConverter(
            ["experts.*.gate.weight", "experts.*.up.weight"],
            ["text.experts.gu", "vision.experts.gu"],
            [ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)],
        ),
        {"text.experts.gu": (E, 2 * I, H), "vision.experts.gu": (E, 2 * I, H)},
    ),
}


class Model:
    """As much of a model as conversions look at."""

    base_model_prefix = ""
    config = None

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.state_dict = lambda: self.parameters
        self.get_parameter = self.parameters.__getitem__


def sources_with(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, converter: WeightConverter, model: Model
) -> dict[str, ExpertSource]:
    monkeypatch.setattr(
        transformers_checkpoint, "get_model_conversion_mapping", lambda _, **__: [copy.deepcopy(converter)]
    )
    specs = {name: WeightSpec(tuple(tensor.shape), torch.float32) for name, tensor in model.parameters.items()}
    return expert_sources(model, specs, checkpoint)


@pytest.mark.parametrize(("tensors", "converter", "shapes"), CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_conversion_of_one_expert_is_that_experts_part_of_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, Tensor],
    converter: WeightConverter,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    save_file(tensors, tmp_path / SINGLE_FILE)
    model = Model(shapes)
    whole_converter = copy.deepcopy(converter)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = whole_converter.rename_source_key(name)
        whole_converter.add_tensor(target, name, pattern, tensors[name])
    whole = whole_converter.convert(target, model=model)
    with Checkpoint(tmp_path) as checkpoint:
        for parameter, source in sources_with(monkeypatch, checkpoint, converter, model).items():
            experts = torch.stack([source.read(expert) for expert in range(E)])
            assert torch.equal(experts, whole[parameter]), parameter


def test_a_conversion_that_mixes_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"moe.w": torch.randn(E, I, H)}, tmp_path / SINGLE_FILE)
    converter = WeightConverter("moe.w", ["experts.a", "experts.b"], [Chunk(dim=0)])
    model = Model({"experts.a": (E // 2, I, H), "experts.b": (E // 2, I, H)})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ConfigError, match=r"experts\.a"):
        sources_with(monkeypatch, checkpoint, converter, model)

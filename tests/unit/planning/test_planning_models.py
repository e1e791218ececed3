"""Models and GPUs as plans read them, against the published sizes and transformers' own classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.formats import WeightFormat
from vmm_dwdp.planning.gpus import gpu_from_dict, load_gpu
from vmm_dwdp.planning.models import load_model, model_from_config
from vmm_dwdp.planning.presets import load_preset, preset_names
from vmm_dwdp.planning.roofline import Batch
from vmm_dwdp.planning.torch_layer import TorchLayer

# Parameters in billions as the model cards give them: all, and of the routed experts' bits per parameter.
PUBLISHED = {
    "deepseek-r1-fp8": (671, 8),
    "deepseek-r1-nvfp4": (671, 4.5),
    "gpt-oss-120b": (117, 4.25),
    "kimi-k2": (1000, 8),
    "mixtral-8x7b": (46.7, 16),
    "qwen3-235b-a22b": (235, 16),
    "qwen3-30b-a3b": (30.5, 16),
}


def parameters(name: str) -> float:
    """Parameters of everything, from the bytes that a plan counts."""
    model = load_model(name)
    routed = len(model.moe_layers) * model.num_experts * 3 * model.hidden * model.expert_intermediate
    width = {"bf16": 16, "fp8": 8, "nvfp4": 4.5, "mxfp4": 4.25}
    shared = len(model.moe_layers) * 3 * model.hidden * model.shared_intermediate
    dense = (model.num_layers - len(model.moe_layers)) * 3 * model.hidden * model.dense_intermediate
    other = model.num_layers * model.attention.parameters + 2 * model.vocabulary * model.hidden
    assert model.layer_expert_bytes * 8 / (routed / len(model.moe_layers)) == pytest.approx(
        width[model.expert_format.value], rel=0.01
    )
    return (routed + shared + dense + other) / 1e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    assert parameters(name) == pytest.approx(PUBLISHED[name][0], rel=0.03)


def test_published_sizes_cover_every_preset() -> None:
    assert sorted(PUBLISHED) == preset_names("models")


def test_a_plan_counts_the_parameters_of_the_model_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=48, intermediate_size=96, vocab_size=500, mlp_only_layers=[1],
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() * 2 for name, parameter in model.named_parameters() if "norm" not in name}

    spec = model_from_config("tiny", config.to_dict())

    experts = sum(nbytes for name, nbytes in sizes.items() if ".experts." in name)
    assert spec.moe_layers == (0, 2)
    assert len(spec.moe_layers) * spec.layer_expert_bytes == experts
    assert spec.replicated_bytes == sum(sizes.values()) - experts


def test_weights_are_those_of_the_checkpoint() -> None:
    weights = load_model("deepseek-r1-nvfp4").expert_weights

    assert {name: spec.shape for name, spec in weights.items()} == {
        "w13": (256, 4096, 3584),
        "w13_scale": (256, 4096, 448),
        "w2": (256, 7168, 1024),
        "w2_scale": (256, 7168, 128),
    }


def test_a_config_file_or_its_directory_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(load_preset("models", "mixtral-8x7b")["config"]))

    assert load_model(str(tmp_path)).layer_expert_bytes == load_model("mixtral-8x7b").layer_expert_bytes
    assert load_model(str(tmp_path / "config.json")).num_experts == 8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_local_experts": None}, "states no experts"),
        ({"num_hidden_layers": None}, "does not state num_hidden_layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_a_config_that_will_not_do_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        model_from_config("mine", load_preset("models", "mixtral-8x7b")["config"] | change)


def test_an_unknown_preset_is_answered_with_the_list() -> None:
    with pytest.raises(ConfigError, match="qwen3-30b-a3b"):
        load_model("qwen-nine")
    with pytest.raises(ConfigError, match="mi355x"):
        load_gpu("h9000")


@pytest.mark.parametrize("name", preset_names("gpus"))
def test_every_number_of_a_gpu_has_a_source(name: str) -> None:
    values = load_preset("gpus", name)
    sourced = {key for keys in values["sources"] for key in keys.split(", ")}
    stated = set(values) - {"name", "sources", "efficiency", "granularity"}
    stated |= {f"efficiency.{key}" for key in values["efficiency"]} if "efficiency" not in sourced else set()

    assumed = {"efficiency.dense_gemm", "efficiency.memory", "efficiency.elementwise"}
    assert stated - sourced - assumed <= {"peer_bandwidth"}
    assert load_gpu(name).max_group > 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"memory": 1}, "unknown key 'memory'"),
        ({"peak_flops": {"fp8": 1e15}}, "must state bf16"),
        ({"peak_flops": 1e15}, "must state bf16"),
        ({"peak_flops": {"bf16": "fast"}}, "peak_flops of the GPU must be more than 0, not 'fast'"),
        ({"memory_bytes": "80e9"}, "memory_bytes of the GPU must be more than 0, not '80e9'; YAML takes"),
        ({"max_group": 0}, "max_group of the GPU must be more than 0, not 0"),
        ({"efficiency": {"link": 1.2}}, "efficiency.link must be"),
        ({"efficiency": {"luck": 0.5}}, "luck"),
    ],
)
def test_a_gpu_that_cannot_be_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        gpu_from_dict(load_preset("gpus", "h100") | change)


def test_a_gpu_that_states_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="the GPU states no memory_bytes"):
        gpu_from_dict({k: value for k, value in load_preset("gpus", "h100").items() if k != "memory_bytes"})


@pytest.mark.parametrize(("text", "sentence"), [("- h100", "must hold a mapping"), ("{", "cannot read")])
def test_a_file_that_is_no_gpu_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_gpu(str(path))


def test_a_layer_that_torch_does_not_run_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="grouped-query attention, which deepseek-r1-fp8 has not"):
        TorchLayer(load_model("deepseek-r1-fp8"), Batch.of(4), cpu)
    with pytest.raises(ConfigError, match="requests all have one length"):
        TorchLayer(load_model("qwen3-30b-a3b"), Batch((3, 4)), cpu)


@pytest.mark.parametrize("kind", WeightFormat)
def test_formats_count_their_scales(kind: WeightFormat) -> None:
    bits = {"bf16": 16, "fp8": 8 + 32 / 128**2, "nvfp4": 4.5, "mxfp4": 4.25}[kind.value]

    assert kind.nbytes(256, 512) == 256 * 512 * bits / 8

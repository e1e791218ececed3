"""The checkpoints that the benchmarks of SGLang write: what kernels make of them is of the size of a weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import sglang_checkpoint
import sglang_gpt_oss
import sglang_quantised
from sglang_checkpoint import Shape

CPU = torch.device("cpu")
SMALL = Shape(2, 256, 4, 128, heads=2, kv_heads=1, experts_per_token=2, vocabulary=512)
ROWS, COLUMNS = 128, 256
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight numbers of each integer, lowest bits first, in a dimension of their own."""
    return (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15


def awq(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[inputs, outputs]`` of one expert; in which order its kernels take the eight is of no matter to the size."""
    integers, zeros = (nibbles(tensors[name]).flatten(1) for name in ("qweight", "qzeros"))
    return (integers - zeros.repeat_interleave(128, 0)) * tensors["scales"].float().repeat_interleave(128, 0)


def wna16(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[outputs, inputs]`` of one expert."""
    assert tensors["weight_shape"].tolist() == [ROWS, COLUMNS]
    integers = nibbles(tensors["weight_packed"]).flatten(1) - 8
    return integers * tensors["weight_scale"].float().repeat_interleave(32, 1)


@pytest.mark.parametrize(("weights", "unpacked", "shape"), [("awq", awq, (256, 128)), ("wna16", wna16, (128, 256))])
def test_integers_are_of_the_size_of_a_weight(weights: str, unpacked: object, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    made = sglang_quantised.experts(weights, 3, ROWS, COLUMNS, CPU)
    for expert in range(3):
        found = unpacked({name: tensor[expert] for name, tensor in made.items()})  # type: ignore[operator]
        assert found.shape == shape
        assert -0.15 < float(found.mean()) * COLUMNS**0.5 < 0, "they go from -8 to 7"
        assert float(found.std()) == pytest.approx(COLUMNS**-0.5, rel=0.1)


def test_mxfp4_is_of_the_size_of_a_weight(tmp_path: Path) -> None:
    sglang_gpt_oss.write(tmp_path, SMALL._replace(experts=3), CPU)
    tensors = load_file(tmp_path / "model-00002.safetensors")
    experts = "model.layers.1.mlp.experts"
    for name, (rows, columns) in {"gate_up": (256, 256), "down": (256, 128)}.items():
        blocks, scales = (tensors[f"{experts}.{name}_proj_{kind}"] for kind in ("blocks", "scales"))
        assert blocks.shape == (3, rows, columns // 32, 16)
        numbers = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
        values = FP4[numbers & 7] * (1 - 2 * (numbers >> 3)) * torch.exp2(scales.float() - 127).unsqueeze(-1)
        assert 0.6 < float(values.std()) * columns**0.5 < 1.7
        assert tensors[f"{experts}.{name}_proj_bias"].shape == (3, rows)
    assert tensors["model.layers.1.self_attn.sinks"].shape == (2,)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_local_experts"], config["quantization_config"]["quant_method"]) == (3, "mxfp4")


@pytest.mark.parametrize("weights", ["awq", "wna16"])
def test_only_experts_are_integers(weights: str, tmp_path: Path) -> None:
    sglang_checkpoint.write(tmp_path, SMALL, CPU, weights=weights)
    tensors = load_file(tmp_path / "model-00001.safetensors")
    integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
    assert integers
    assert all(".mlp.experts." in name for name in integers)
    assert "model.layers.0.mlp.gate.weight" in tensors
    assert "model.layers.0.mlp.experts.3.down_proj.weight" not in tensors
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == sglang_quantised.CONFIGS[weights]

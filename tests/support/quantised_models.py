"""Small quantised checkpoints as they are published: random weights, quantised here by the formats' own definitions.

Nothing of transformers, of compressed-tensors or of this library quantises them. Their files are two and an index, as
large models have them, and ``config.json`` says what that of a published model of the format says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from support import mxfp4_kernels
from support.moe_models import tiny_model
from vmm_dwdp.checkpoint import INDEX_FILE, SINGLE_FILE
from vmm_dwdp.integrations.transformers.experts import align_experts

BLOCK = 128  # FP8: weights of a square that share a scale
GROUP = 32  # MXFP4 and int4: weights of a row that share a scale
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
}
HEADS: dict[str, Any] = {"head_dim": 64}  # so that attention is of whole blocks, too; not of DeepSeek's latent one
Tensors = dict[str, Tensor]


def in_blocks(name: str, weight: Tensor) -> Tensors:
    """FP8 E4M3 with a scale for each square of 128 by 128, as DeepSeek-V3, Kimi K2, Qwen3 and GLM are published."""
    rows, columns = weight.shape
    squares = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = squares.abs().amax(dim=(1, 3)) / 448
    quantised = (squares / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {name: quantised, f"{name}_scale_inv": scales}


def by_channel(name: str, weight: Tensor) -> Tensors:
    """FP8 E4M3 with a scale for each row, as compressed-tensors' ``float-quantized`` stores it."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / 448
    return {name: (weight.float() / scales).to(torch.float8_e4m3fn), f"{name}_scale": scales.to(weight.dtype)}


def packed(name: str, weight: Tensor) -> Tensors:
    """int4 with a scale for each 32 of a row, eight to an int32, as compressed-tensors' ``pack-quantized`` has it."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // GROUP, GROUP)
    scales = groups.abs().amax(dim=-1, keepdim=True) / 7
    nibbles = ((groups / scales).round() + 8).to(torch.int64).reshape(rows, columns // 8, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(dim=-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor([rows, columns])
    return {
        f"{name}_packed": words,
        f"{name}_scale": scales.squeeze(-1).to(weight.dtype),
        f"{name}_shape": shape,
    }


E2M1 = torch.tensor(mxfp4_kernels.E2M1)


def in_mxfp4(name: str, weight: Tensor) -> Tensors:
    """FP4 E2M1 with a power of two for each 32, two to a byte, ``[E, N, K]``, as gpt-oss is published.

    Args:
        weight: ``[E, K, N]``, as transformers' gpt-oss has it.
    """
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, GROUP))
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=-1, keepdim=True))) - 2
    scaled = groups / 2**exponents
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(dim=-1) + 8 * (scaled < 0)
    low, high = codes[..., 0::2], codes[..., 1::2]
    scales = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return {f"{name}_blocks": (low + 16 * high).to(torch.uint8), f"{name}_scales": scales}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


CHANNELS = compressed(
    "float-quantized",
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
)
INT4 = compressed(
    "pack-quantized",
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False},
    None,
)


def is_projection(name: str, tensor: Tensor) -> bool:
    return name.endswith("proj.weight") and not any(size % BLOCK for size in tensor.shape)


def is_stacked(name: str, tensor: Tensor) -> bool:
    return name.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3


Quantise = Callable[[str, Tensor], Tensors]
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], Quantise, Callable[[str, Tensor], bool]]] = {
    "deepseek_v3 fp8": ("deepseek_v3", FP8, in_blocks, is_projection),
    "qwen3_moe fp8": ("qwen3_moe", FP8, in_blocks, is_projection),
    "glm4_moe fp8": ("glm4_moe", FP8, in_blocks, is_projection),
    "gpt_oss mxfp4": ("gpt_oss", MXFP4, in_mxfp4, is_stacked),
}
COMPRESSED: dict[str, tuple[str, dict[str, Any], Quantise, Callable[[str, Tensor], bool]]] = {
    "qwen3_moe fp8 by channel": ("qwen3_moe", CHANNELS, by_channel, is_projection),
    "qwen3_moe int4": ("qwen3_moe", INT4, packed, is_projection),
}
"""What compressed-tensors' own package reads; that package may not be there."""


def save(name: str, folder: Path) -> Path:
    """Write the checkpoint of this name of `CHECKPOINTS` or `COMPRESSED`."""
    family, stated, quantise, chosen = (CHECKPOINTS | COMPRESSED)[name]
    sizes = SIZES | ({} if family == "deepseek_v3" else HEADS)
    tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(folder)
    whole = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    tensors: Tensors = {}
    for key, tensor in whole.items():
        tensors |= quantise(key, tensor) if chosen(key, tensor) else {key: tensor}
    assert len(tensors) > len(whole)
    names = sorted(tensors)
    weight_map = {key: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, key in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        kept = {key: tensors[key].contiguous() for key in names if weight_map[key] == file}
        save_file(kept, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": stated}))
    return folder


def whole_model(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The model as transformers loads it by itself; of compressed-tensors, as it dequantises all that it loads."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    if stated["quant_method"] == "compressed-tensors":
        kwargs = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs)
    align_experts(model)
    return model


def tensors_of(folder: Path) -> Tensors:
    """All that a checkpoint has."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextlib.contextmanager
def keeping_fp8() -> Iterator[None]:
    """transformers as it is on a GPU, with kernels in torch's operations in the place of those that it downloads."""

    def linear(rows: Tensor, weight: Tensor, scales: Tensor, block_size: Any, *_: Any, **__: Any) -> Tensor:
        spread = scales.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
        return F.linear(rows.float(), weight.float() * spread).to(rows.dtype)

    def grouped(rows: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor, block_size: Any, **_: Any) -> Tensor:
        parts = rows.tensor_split(offsets[:-1].tolist())
        return torch.cat([linear(part, w, s, block_size) for part, w, s in zip(parts, weight, scales, strict=True)])

    def batched(
        rows: Tensor, weight: Tensor, scales: Tensor, block_size: Any, *, expert_ids: Tensor, **_: Any
    ) -> Tensor:
        chosen = expert_ids.tolist()
        parts = zip(rows.split(1), chosen, strict=True)
        return torch.cat([linear(row, weight[expert], scales[expert], block_size) for row, expert in parts])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        patch.setattr(finegrained_fp8, "fp8_linear", linear)
        kernels = finegrained_fp8.FineGrainedFP8(linear, batched, grouped)
        patch.setattr(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernels)
        yield

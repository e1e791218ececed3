"""A gpt-oss checkpoint with random weights, its experts in MXFP4, of any number of layers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang_checkpoint import Shape
from sglang_quantised import Tensors

GPT_OSS_120B = Shape(
    4, 2880, 128, 2880, heads=64, kv_heads=8, head_dim=64, experts_per_token=4, vocabulary=32000, positions=131072
)
BLOCK = 32  # inputs that share a scale, which is a power of two
SPREAD = 2.93  # the standard deviation of random numbers of MXFP4


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.layers,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(shape.layers)],
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    }


def write(folder: Path, shape: Shape, device: torch.device) -> None:
    """Into ``folder``, which exists; random numbers are made on ``device``. The config comes last."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for number, tensors in enumerate(_files(shape, device)):
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / f"model-{number:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(config(shape)))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines will want it


def _files(shape: Shape, device: torch.device) -> Iterator[Tensors]:
    """What is in none of the layers, and then a file per layer."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).div_(columns**0.5).to(torch.bfloat16)

    def small(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device).mul_(0.1).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    yield {
        "model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden) * 30,
        "lm_head.weight": matrix(shape.vocabulary, shape.hidden),
        "model.norm.weight": ones(shape.hidden),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": ones(shape.hidden),
            f"{prefix}.post_attention_layernorm.weight": ones(shape.hidden),
            f"{prefix}.self_attn.sinks": small(shape.heads),
            f"{prefix}.mlp.router.weight": matrix(shape.experts, shape.hidden),
            f"{prefix}.mlp.router.bias": small(shape.experts),
        }
        for name, (rows, columns) in shape.attention.items():
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, columns)
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = small(rows)
        gate_up, down = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        for name, size in {"gate_up": gate_up, "down": down}.items():
            for kind, tensor in _mxfp4(shape.experts, *size, device).items():
                tensors[f"{prefix}.mlp.experts.{name}_proj_{kind}"] = tensor
            tensors[f"{prefix}.mlp.experts.{name}_proj_bias"] = small(shape.experts, size[0])
        yield tensors


def _mxfp4(count: int, rows: int, columns: int, device: torch.device) -> Tensors:
    """Two numbers in a byte, and the exponent of two that a block of them is to be multiplied by, plus 127."""
    exponent = 127 - round(math.log2(SPREAD * columns**0.5))
    blocks = torch.randint(256, (count, rows, columns // BLOCK, BLOCK // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(exponent - 1, exponent + 2, blocks.shape[:3], dtype=torch.uint8, device=device)
    return {"blocks": blocks, "scales": scales}

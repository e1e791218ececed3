"""A Qwen3-MoE checkpoint with random weights, at a scale at which every layer matters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sglang_quantised
import torch
from sglang_quantised import Tensors


class Shape(NamedTuple):
    """Of the model; every layer is an MoE layer."""

    layers: int
    hidden: int
    experts: int
    intermediate: int  # of one expert
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    experts_per_token: int = 8
    vocabulary: int = 32000
    positions: int = 32768

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the projections of a layer's attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }

    @property
    def expert(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the projections of one expert."""
        wide = (self.intermediate, self.hidden)
        return {"gate": wide, "up": wide, "down": wide[::-1]}


TINY = Shape(2, 256, 8, 1024, heads=8, kv_heads=8, head_dim=32, experts_per_token=2, vocabulary=512)


def write(folder: Path, shape: Shape, device: torch.device, *, weights: str = "bf16") -> None:
    """Into ``folder``, which exists; random numbers are made on ``device``. The config comes last.

    Args:
        weights: a key of `sglang_quantised.CONFIGS`.
    """
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for number, tensors in enumerate(_files(shape, device, weights)):
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    write_config(folder, shape, weights=weights)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines will want it


def write_config(folder: Path, shape: Shape, *, weights: str = "bf16") -> None:
    (folder / "config.json").write_text(json.dumps(config(shape, weights=weights)))


def config(shape: Shape, *, weights: str) -> dict[str, Any]:
    stated = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.layers,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    if sglang_quantised.CONFIGS[weights]:
        stated["quantization_config"] = sglang_quantised.CONFIGS[weights]
    return stated


def _files(shape: Shape, device: torch.device, weights: str) -> Iterator[Tensors]:
    """What is in none of the layers, and then a file per layer."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return sglang_quantised.matrices("bf16", 1, rows, columns, device)["weight"][0].cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def named(names: list[str], kinds: Tensors) -> Tensors:
        return {
            f"{name}_proj.{kind}": one
            for kind, stacked in kinds.items()
            for name, one in zip(names, stacked.cpu(), strict=True)
        }

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
            f"{prefix}.self_attn.q_norm.weight": ones(shape.head_dim),
            f"{prefix}.self_attn.k_norm.weight": ones(shape.head_dim),
        }
        for name, size in shape.attention.items():
            tensors |= named([f"{prefix}.self_attn.{name}"], sglang_quantised.matrices(weights, 1, *size, device))
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(shape.experts, shape.hidden)
        for name, size in shape.expert.items():
            names = [f"{prefix}.mlp.experts.{expert}.{name}" for expert in range(shape.experts)]
            tensors |= named(names, sglang_quantised.experts(weights, shape.experts, *size, device))
        yield tensors

"""A Qwen3-MoE checkpoint with random weights in bf16 or FP8 blocks, at a scale at which every layer matters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLOCK = 128  # rows and columns that share a scale
LARGEST = 448.0  # number of float8_e4m3fn
Tensors = dict[str, torch.Tensor]


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


def write(folder: Path, shape: Shape, device: torch.device, *, fp8: bool = False) -> None:
    """Into ``folder``, which exists; random numbers are made on ``device``. The config comes last."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for number, tensors in enumerate(_files(shape, device, fp8)):
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    write_config(folder, shape, fp8=fp8)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines will want it


def write_config(folder: Path, shape: Shape, *, fp8: bool = False) -> None:
    (folder / "config.json").write_text(json.dumps(config(shape, fp8=fp8)))


def config(shape: Shape, *, fp8: bool) -> dict[str, Any]:
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
    if fp8:
        blocks = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
        stated["quantization_config"] = blocks | {"activation_scheme": "dynamic"}
    return stated


def _files(shape: Shape, device: torch.device, fp8: bool) -> Iterator[Tensors]:
    """What is in none of the layers, and then a file per layer."""

    def matrices(count: int, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(count, rows, columns, device=device).div_(columns**0.5)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return matrices(1, rows, columns)[0].to(torch.bfloat16).cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def projections(names: list[str], rows: int, columns: int) -> Tensors:
        made = matrices(len(names), rows, columns)
        kinds = in_blocks(made) if fp8 else {"weight": made.to(torch.bfloat16)}
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
            tensors |= projections([f"{prefix}.self_attn.{name}"], *size)
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(shape.experts, shape.hidden)
        for name, size in shape.expert.items():
            tensors |= projections([f"{prefix}.mlp.experts.{e}.{name}" for e in range(shape.experts)], *size)
        yield tensors


def in_blocks(weights: torch.Tensor) -> Tensors:
    """``[N, rows, columns]`` in FP8, and ``[N, rows / 128, columns / 128]`` what each block is to be multiplied by.

    Rows and columns are multiples of 128.
    """
    count, rows, columns = weights.shape
    blocks = weights.float().view(count, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((2, 4), keepdim=True) / LARGEST
    quantised = (blocks / scales).view(weights.shape).to(torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale_inv": scales.squeeze(4).squeeze(2)}

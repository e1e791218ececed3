"""Checkpoints with random weights, small enough for SGLang's engine on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import engine_process
import torch
from safetensors.torch import save_file

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 8, 256, 1024, 512


def qwen3_moe(folder: Path) -> Path:
    """Write a Qwen3-MoE into ``folder``, at a scale at which every layer matters."""
    config = json.loads((engine_process.MODEL / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    head = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * HIDDEN**0.5,
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for number in range(NUM_LAYERS):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": matrix(queries, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(keys, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(keys, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, queries),
            f"{layer}.self_attn.q_norm.weight": torch.ones(head),
            f"{layer}.self_attn.k_norm.weight": torch.ones(head),
            f"{layer}.mlp.gate.weight": matrix(NUM_EXPERTS, HIDDEN),
        }
        for expert in range(NUM_EXPERTS):
            shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
            for name, shape in shapes.items():
                tensors[f"{layer}.mlp.experts.{expert}.{name}_proj.weight"] = matrix(*shape)
    save_file(tensors, folder / "model.safetensors")
    return folder

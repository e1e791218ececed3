"""Tiny models of many families, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_EXPERTS = 7  # a prime, and with these sizes no expert is a multiple of a page
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

# What each family calls its sizes. Out of the ordinary: gpt_oss (transposed, with biases), llama4_text (transposed,
# with a forward pass of its own), nemotron_h (no gate), jetmoe (experts in attention too, run in another order).
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "head_dim": 8, "tie_word_embeddings": True},
    "qwen2_moe": {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 16},
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, **LATENT_ATTENTION},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": NUM_EXPERTS, "num_key_value_heads": 4},
    "glm4_moe": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "llama4_text": {
        "num_local_experts": NUM_EXPERTS,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },
    "nemotron_h": {
        "n_routed_experts": NUM_EXPERTS,
        "layers_block_type": ["attention", "moe", "moe"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    "granitemoe": {"num_local_experts": NUM_EXPERTS},
    "jetmoe": {"num_local_experts": NUM_EXPERTS, "num_key_value_heads": 4, "kv_channels": 8},
    "phimoe": {"num_local_experts": NUM_EXPERTS},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "aria_text": {"moe_num_experts": NUM_EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
    "lfm2_moe": {"num_experts": NUM_EXPERTS, "num_dense_layers": 1, "layer_types": ["full_attention"] * 3},
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model of ``family`` in fp32 on the CPU, every parameter random; the same in every process."""
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **changes})
    return _random(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def tiny_diffusion() -> PreTrainedModel:
    """A model whose encoder and decoder have the same experts, tied; random as `tiny_model`."""
    text = {
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size")},
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"boi_token_id": 60, "eoi_token_id": 61, "image_token_id": 62}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8, **tokens)
    return _random(transformers.DiffusionGemmaForBlockDiffusion(config).eval())


def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def prompt(device: str | torch.device = "cpu") -> Tensor:
    """Two sequences of token numbers."""
    return torch.arange(3, 27, device=device).view(2, 12)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(prompt(model.device), use_cache=False).logits
    return out

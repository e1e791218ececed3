"""Families of models with random weights, small enough for SGLang's engine on the CPU, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,  # at which every layer matters
    "num_experts_per_tok": 2,
}
_SHARED: Final = {"intermediate_size": 512, "moe_intermediate_size": 1024}
_YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
_LATENT: Final = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}

# By the name of transformers' model without ``ForCausalLM``: what its config says besides. SGLang has no other rotary
# embedding for DeepSeek on the CPU.
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "Glm4Moe": _SHARED
    | {"head_dim": 64, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"routed_scaling_factor": 2.5},
    "DeepseekV2": _SHARED
    | _LATENT
    | {"v_head_dim": 128, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
    | {"num_key_value_heads": 4, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.0}
    | {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1}
    | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    "Qwen2Moe": _SHARED | {"num_experts": 8, "shared_expert_intermediate_size": 1024, "norm_topk_prob": False},
    "Mixtral": {"intermediate_size": 1024, "num_local_experts": 8},
    "Llama4": {"intermediate_size": 1024, "intermediate_size_mlp": 512, "num_local_experts": 8, "head_dim": 64}
    | {"num_experts_per_tok": 1, "attention_chunk_size": 256, "use_qk_norm": False},
}


def config(family: str) -> Any:
    """transformers' config."""
    import transformers

    text = "Text" if family == "Llama4" else ""
    return getattr(transformers, f"{family}{text}Config")(**(_COMMON | FAMILIES[family]))


def write(rank: int, *, family: str, folder: Path) -> None:
    """Write a checkpoint of ``family`` into ``folder``."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_of = getattr(transformers, f"{family}ForCausalLM")
    model_of(config(family)).to(torch.float32).save_pretrained(folder)

"""Every head of transformers that has experts, found in the installed package, and a tiny config of each."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from support.moe_models import LATENT_ATTENTION, NUM_EXPERTS, SIZES

EXPERTS = re.compile(r"^class \w*Experts\w*\(", re.MULTILINE)
WRITES = re.compile(r"(?<!PreTrainedModel)For(CausalLM|ConditionalGeneration|BlockDiffusion)$")

# A config takes of these what it has a field for. Besides, what families call their sizes.
NAMES: dict[str, Any] = {
    **SIZES,
    **{name: size for name, size in LATENT_ATTENTION.items() if name != "num_key_value_heads"},
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_layer_start_index", "decoder_sparse_step", "num_dense_layers"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "d_kv", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_intermediate_size"), 24),
    **dict.fromkeys(("d_model", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_d_head", "sliding_window", "index_head_dim", "index_topk"), 16),
    "unpadded_vocab_size": SIZES["vocab_size"],
    "num_layers": 3,
    "depth": 1,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IN_TEXT = {"text_hidden_size": 32}
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

# What a config wants besides, by the name of its class.
WANTED: dict[str, dict[str, Any]] = {
    "BeamConfig": SPARSE,
    "DbrxConfig": {
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2},
    },
    "DeepseekOcr2TextConfig": SPARSE,
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "Dots3NoteVisionConfig": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "pyramid_num_routed": [0, NUM_EXPERTS, NUM_EXPERTS],
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "vocab_size_per_layer_input": 64,
    },
    "Glm4vMoeTextConfig": {
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0},
    },
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, **SPARSE},
    "HYV4VLTextConfig": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "Inkling2AudioConfig": IN_TEXT,
    "Inkling2LoopAudioConfig": IN_TEXT,
    "Inkling2LoopVisionConfig": IN_TEXT,
    "Inkling2VisionConfig": IN_TEXT,
    "Lfm2MoeConfig": {"layer_types": ["full_attention"] * 3},
    "LongcatFlashConfig": {"zero_expert_num": 0, "head_dim": 8},  # with experts that compute nothing it is refused
    "MuseSparkAudioConfig": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [32, 32],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 32,
    },
    "NemotronHConfig": {"layers_block_type": ["attention", "moe", "moe"]},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
    "Step3p7TextConfig": SPARSE,
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def heads() -> Iterator[tuple[str, type[PreTrainedModel]]]:
    """Family and class of every head that writes tokens; of a family that has none, of every head."""
    for source in sorted(Path(str(transformers.__file__)).parent.glob("models/*/modeling_*.py")):
        if EXPERTS.search(source.read_text(encoding="utf-8")):
            module = importlib.import_module(f"transformers.models.{source.parent.name}.{source.stem}")
            found = [model for name, model in vars(module).items() if _is_head(model, name, module.__name__)]
            for model in [head for head in found if WRITES.search(head.__name__)] or found:
                yield source.parent.name, model


def _is_head(model: object, name: str, module: str) -> bool:
    of_module = inspect.isclass(model) and model.__module__ == module and model.__name__ == name
    return of_module and "For" in name and issubclass(model, PreTrainedModel)


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """With the sizes of `NAMES`, the configs inside it too; raises what transformers raises of sizes that cannot be."""
    defaults = vars(kind())
    fields = defaults.keys() | getattr(kind, "__dataclass_fields__", {}).keys()
    sizes = {name: size for name, size in NAMES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention: a head is as large as its parts are together
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    for name in kind.sub_configs:
        if defaults.get(name) is not None:
            sizes[name] = tiny_config(type(defaults[name]))
    return kind(**sizes | WANTED.get(kind.__name__, {}))

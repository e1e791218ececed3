"""What a plan needs to know of a Mixture-of-Experts model, read from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.planning.formats import WeightFormat, attention_format, expert_format
from vmm_dwdp.planning.presets import load_preset, read_mapping


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention of one layer, during prefill.

    Attributes:
        heads: query heads.
        key_dim, value_dim: per head.
        projections: ``(columns, rows)`` of each weight matrix, that of the output last.
        cached_values: values that the KV cache keeps of one token.
    """

    heads: int
    key_dim: int
    value_dim: int
    projections: tuple[tuple[int, int], ...]
    cached_values: int

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations for one query and one key it attends to: scores and values, all heads."""
        return 2 * self.heads * (self.key_dim + self.value_dim)

    @property
    def parameters(self) -> int:
        return sum(columns * rows for columns, rows in self.projections)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes of a model whose MoE layers are all alike.

    Attributes:
        moe_layers: the layers with experts, in the order of the forward pass.
        windows: per layer, how many tokens back it attends to; ``None``: all.
        shared_intermediate: width of the experts that every token passes; 0 without them.
        dense_intermediate: width of the feed-forward part of layers without experts.
        expert_format: of routed and shared experts. ``attention_format``: of the attention's projections.
        kv_value_bytes: bytes of a value in the KV cache.
    """

    name: str
    hidden: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_intermediate: int
    shared_intermediate: int
    dense_intermediate: int
    vocabulary: int
    tied_embeddings: bool
    attention: AttentionSpec
    windows: tuple[int | None, ...]
    expert_format: WeightFormat
    attention_format: WeightFormat
    expert_bias: bool
    kv_value_bytes: int

    def stored_as(self, weights: WeightFormat) -> ModelSpec:
        """The same model with its weights in another format."""
        return replace(self, expert_format=weights, attention_format=attention_format(weights))

    @cached_property
    def expert_weights(self) -> dict[str, WeightSpec]:
        """The weights of one MoE layer as the runtime is told of them, gate and up projection as one."""
        experts, hidden, width = self.num_experts, self.hidden, self.expert_intermediate
        weights = self.expert_format.weights("w13", experts, 2 * width, hidden)
        if self.expert_bias:
            weights["w13_bias"] = WeightSpec((experts, 2 * width), torch.bfloat16)
        weights |= self.expert_format.weights("w2", experts, hidden, width)
        if self.expert_bias:
            weights["w2_bias"] = WeightSpec((experts, hidden), torch.bfloat16)
        return weights

    @property
    def layer_expert_bytes(self) -> int:
        """Bytes of all experts of one layer."""
        return sum(spec.num_experts * spec.expert_nbytes for spec in self.expert_weights.values())

    @property
    def attention_bytes(self) -> int:
        """Bytes of one layer's attention projections."""
        return sum(self.attention_format.nbytes(rows, columns) for columns, rows in self.attention.projections)

    def feed_forward_bytes(self, width: int, weights: WeightFormat) -> int:
        """Bytes of one gated feed-forward part."""
        return weights.nbytes(2 * width, self.hidden) + weights.nbytes(self.hidden, width) if width else 0

    @property
    def replicated_bytes(self) -> int:
        """Bytes of everything but the routed experts: each GPU holds all of it."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocabulary * self.hidden * 2
        num_moe, num_dense = len(self.moe_layers), self.num_layers - len(self.moe_layers)
        router = self.num_experts * self.hidden * 2
        shared = self.feed_forward_bytes(self.shared_intermediate, self.expert_format)
        dense = self.feed_forward_bytes(self.dense_intermediate, self.expert_format)
        return embeddings + self.num_layers * self.attention_bytes + num_moe * (router + shared) + num_dense * dense

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes, windows not taken off."""
        return self.num_layers * self.attention.cached_values * self.kv_value_bytes


def load_model(name: str) -> ModelSpec:
    """A preset's name, a Hugging Face ``config.json``, or a directory with one.

    Raises:
        ConfigError: none of these, or a config that states no experts or lacks a size.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return model_from_config(name, read_mapping(path))
    preset = load_preset("models", name)
    return model_from_config(name.lower(), preset["config"])


def model_from_config(name: str, config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Hugging Face config describes; raises `ConfigError` for one without experts or sizes."""
    config = config.get("text_config", config)
    experts = next(filter(None, map(config.get, ("n_routed_experts", "num_experts", "num_local_experts"))), 0)
    if not experts:
        raise ConfigError(f"the config of {name} states no experts, so there is nothing to spread over a group")

    def size(key: str) -> int:
        if not isinstance(config.get(key), int):
            raise ConfigError(f"the config of {name} does not state {key}")
        return int(config[key])

    width = size("moe_intermediate_size") if "moe_intermediate_size" in config else size("intermediate_size")
    shared = config.get("shared_expert_intermediate_size")
    quantization = config.get("quantization_config")
    weights = expert_format(quantization)
    num_layers = size("num_hidden_layers")
    return ModelSpec(
        name=name,
        hidden=size("hidden_size"),
        num_layers=num_layers,
        moe_layers=_moe_layers(config, num_layers),
        num_experts=experts,
        top_k=size("num_experts_per_tok"),
        expert_intermediate=width,
        shared_intermediate=shared or width * (config.get("n_shared_experts") or 0),
        dense_intermediate=size("intermediate_size"),
        vocabulary=size("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention=_attention(config, size),
        windows=_windows(config, num_layers),
        expert_format=weights,
        attention_format=attention_format(weights),
        expert_bias=config.get("model_type") == "gpt_oss",
        kv_value_bytes=1 if (quantization or {}).get("kv_cache_quant_algo") == "FP8" else 2,
    )


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    first, step = config.get("first_k_dense_replace", 0), config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(i for i in range(first, num_layers) if i not in dense and (i + 1) % step == 0)


def _windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window, types = config.get("sliding_window"), config.get("layer_types") or ["full_attention"]
    kinds = [types[i % len(types)] for i in range(num_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _attention(config: Mapping[str, Any], size: Any) -> AttentionSpec:
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if config.get("kv_lora_rank"):  # multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434), section 2.1
        nope, rope, value = size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim")
        latent, query = size("kv_lora_rank"), config.get("q_lora_rank")
        to_query = ((hidden, query), (query, heads * (nope + rope))) if query else ((hidden, heads * (nope + rope)),)
        return AttentionSpec(
            heads=heads,
            key_dim=nope + rope,
            value_dim=value,
            projections=(*to_query, (hidden, latent + rope), (latent, heads * (nope + value)), (heads * value, hidden)),
            cached_values=latent + rope,
        )
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    query, key = (hidden, heads * head), (hidden, kv_heads * head)
    return AttentionSpec(
        heads=heads,
        key_dim=head,
        value_dim=head,
        projections=(query, key, key, (heads * head, hidden)),
        cached_values=2 * kv_heads * head,
    )

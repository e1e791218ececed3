"""Families of models besides Qwen3-MoE, which test_engine.py has: the same tokens with their experts spread as without.

Their checkpoints are written by transformers, with random weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from answers import TWO_RANKS, generate

from vmm_dwdp.testing import run_group

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]  # engines start slowly beside other tests

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,  # at which every layer matters
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 1024, "num_local_experts": 8},
    "glm4_moe": {
        "intermediate_size": 512,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}


def write(rank: int, *, family: str, folder: Path) -> None:
    """A checkpoint as transformers saves it: an expert a tensor."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**COMMON | FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    """On two ranks, which hold 3 of 8 experts each, from 0 and 2 on, and host memory the others."""
    folder = tmp_path / family
    run_group(partial(write, family=family, folder=folder), 1)
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 2\nnum_local_experts: 3\nhost_experts: 3\n")

    [(ordinary, spread)] = run_group(partial(generate, checkpoint=folder, size=1, environment={}), 1)
    assert spread == 0
    assert len({token for answer in ordinary for token in answer}) > 8
    environment = TWO_RANKS | {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=folder, size=2, environment=environment, dwdp_size=2)

    assert run_group(run, 1) == [(ordinary, 2)]

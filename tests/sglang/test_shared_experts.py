"""A model with a shared expert beside those that are spread: GLM-4-MoE, of a checkpoint that transformers writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from answers import TWO_RANKS, generate

from vmm_dwdp.testing import RankFailed, run_group

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]  # engines start slowly beside other tests


def write(rank: int, *, folder: Path) -> None:
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=1024,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.06,  # at which every layer matters
    )
    Glm4MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)


def test_whole_it_gives_the_same_tokens_and_in_parts_it_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, config = tmp_path / "glm", tmp_path / "dwdp.yaml"
    run_group(partial(write, folder=folder), 1)
    config.write_text("group_size: 1\nhost_experts: 3\n")
    ask = partial(generate, checkpoint=folder)

    [(ordinary, _)] = run_group(partial(ask, size=1, environment={}), 1)
    assert len({token for answer in ordinary for token in answer}) > 8
    hosted = run_group(partial(ask, size=1, environment={"VMM_DWDP_CONFIG": str(config)}), 1)
    assert hosted == [(ordinary, 1)]
    with pytest.raises(RankFailed):
        run_group(partial(ask, size=2, environment=TWO_RANKS, dwdp_size=2), 1)
    told = capfd.readouterr()
    assert "Glm4MoeForCausalLM cuts model.layers.1.mlp.shared_experts.down_proj over --tp-size" in told.out + told.err

"""Decoding with models of transformers whose experts are looked up in a bank."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from vmm_dwdp import DWDPConfig
from vmm_dwdp.integrations.transformers.experts import find_experts
from vmm_dwdp.layout.bank import bank_nbytes
from vmm_dwdp.layout.layer import describe_layer

STEPS = 30


def with_rows(config: DWDPConfig, model: PreTrainedModel, rows: int, page: int) -> DWDPConfig:
    """``config`` with a bank that has room for so many rows of each layer of a whole model."""
    found = enumerate(find_experts(model))
    layers = [describe_layer(layer, experts.weights, config, 0, page) for layer, experts in found]
    return replace(config, expert_bank=bank_nbytes(layers, rows), checksums=True)


def decoded(model: PreTrainedModel, prompt: Tensor) -> list[Tensor]:
    """Logits of the prefill and of each of 30 steps of decoding, of tokens that are drawn."""
    generator = torch.Generator().manual_seed(1)

    def drawn(tokens: Tensor, scores: Tensor) -> Tensor:
        none_ends = torch.tensor([0, 1, 2])
        return torch.rand(scores.shape, generator=generator).index_fill(1, none_ends, 0).to(scores.device)

    out = model.generate(
        prompt,
        max_new_tokens=1 + STEPS,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList([drawn]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(out.logits) == 1 + STEPS
    return list(out.logits)


def require_same_bits(model: PreTrainedModel, prompt: Tensor, expected: list[Tensor], *, leave: bool = True) -> None:
    """As `decoded` gives; with routing that changes: experts came into the bank, were found there, and, where there is
    not room for all, left it."""
    for step, (each, wanted) in enumerate(zip(decoded(model, prompt), expected, strict=True)):
        assert torch.equal(each, wanted), f"step {step}"
    rows, counts = model.dwdp.stats().bank.rows, model.dwdp.bank_counts()
    assert all(0 < each.hits < each.uses for each in counts.values())
    assert leave == any(each.copied > rows[layer] for layer, each in counts.items())
    model.dwdp.check_integrity(verify=True)

"""Experts that are lists of tensors (``assembly: tensor_list``), as one more of transformers' experts functions.

A module that follows transformers' experts interface keeps its own gate, activation and norm; this function puts the
grouped GEMM over lists between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vmm_dwdp.kernels import tensor_list_grouped_gemm

IMPLEMENTATION = "vmm_dwdp_tensor_list"


def takes_lists(module: Module) -> bool:
    """Whether the experts of ``module`` may be lists: it follows the interface, with weights ``[E, N, K]`` that are not
    quantised."""
    whole = all(parameter.element_size() > 1 for parameter in module.parameters(recurse=False))
    return whole and getattr(module, "is_transposed", None) is False


def tensor_list_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output ``[T, H]`` for ``hidden_states`` ``[T, H]`` routed by ``top_k_index`` ``[T, k]``.

    ``top_k_weights`` ``[T, k]`` weigh the chosen experts. ``module``'s parameters are lists of tensors ``[E_i, ...]``.
    Where the GEMM gives the same bits as torch's on the whole weights, this gives the same as "grouped_mm".
    """
    num_tokens, top_k = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1))  # a row: one token at one of its experts
    experts = torch.arange(module.num_experts, device=expert_of_row.device)
    ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)

    def linear(rows: Tensor, name: str) -> Tensor:
        weights = getattr(module, name)
        out = tensor_list_grouped_gemm(rows.to(weights[0].dtype), weights, ends)
        if module.has_bias:
            out += torch.cat(getattr(module, f"{name}_bias"))[expert_of_row]
        return out

    rows = hidden_states[order // top_k]
    rows = (
        module._apply_gate(linear(rows, "gate_up_proj")) if module.has_gate else module.act_fn(linear(rows, "up_proj"))
    )
    rows = linear(rows, "down_proj")
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.12 knows none
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    of_token = torch.empty_like(rows)
    of_token[order] = rows
    return of_token.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, tensor_list_experts)

"""The product of tokens and their experts as two grouped GEMMs, with gradients, for training with transformers."""

import torch
import torch.nn.functional as F


def spread(tokens: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[tokens, hidden]`` -> ``[tokens * top_k, hidden]``: each token once for each of its experts, in that order."""
    return tokens[order // top_k]


def gathered(rows: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    """The transpose of ``spread``: each token's rows, added."""
    return rows[inverse].view(-1, top_k, rows.shape[-1]).sum(1)


class Spread(torch.autograd.Function):
    """``spread`` whose gradient is a gather: by itself torch adds rows one at a time, by atomics."""

    @staticmethod
    def forward(ctx, tokens, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return spread(tokens, order, top_k)

    @staticmethod
    def backward(ctx, gradient):
        return gathered(gradient, *ctx.saved_tensors, ctx.top_k), None, None, None


class Gathered(torch.autograd.Function):
    """``gathered``, likewise."""

    @staticmethod
    def forward(ctx, rows, order, inverse, top_k):
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return gathered(rows, inverse, top_k)

    @staticmethod
    def backward(ctx, gradient):
        return spread(gradient, *ctx.saved_tensors, ctx.top_k), None, None, None


def grouped_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum over each token's experts, ``[tokens, hidden]`` in the dtype of ``hidden``.

    Computed in bfloat16, rows sorted by expert. The weights are applied between the products, where rows are short.
    """
    top_k = top_k_index.shape[1]
    chosen, order = top_k_index.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(experts.num_experts, device=order.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)
    rows = Spread.apply(hidden.to(torch.bfloat16), order, inverse, top_k)
    up = experts.gate_up_proj.to(torch.bfloat16).transpose(1, 2)
    down = experts.down_proj.to(torch.bfloat16).transpose(1, 2)
    gate, inner = F.grouped_mm(rows, up, offs=ends).chunk(2, dim=-1)
    weights = top_k_weights.flatten().gather(0, order).unsqueeze(-1)
    inner = (experts.act_fn(gate) * inner * weights).to(torch.bfloat16)
    out = F.grouped_mm(inner, down, offs=ends)
    return Gathered.apply(out, order, inverse, top_k).to(hidden.dtype)

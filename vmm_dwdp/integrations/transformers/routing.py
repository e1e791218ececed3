"""What an experts module is told of the routing of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def routing_of(args: Any, kwargs: Any, counted: bool) -> tuple[int, int | None, Tensor | None]:
    """How many tokens an experts module is given, how many experts each of them uses, and which, as far as it is told.

    Which they are is left out where it is not at hand, unless it is ``counted``.

    transformers' experts take hidden states ``[T, H]`` first, and most take the chosen experts ``[T, k]`` beside them.
    Its MXFP4 experts take what their kernels want instead: the pairs of a token and an expert sorted by expert, how
    many each expert has, and the place of each pair in that order.
    """
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tokens = tensors[0].shape[:-1].numel()
    of_kernels = next((leaf for leaf in leaves if hasattr(leaf, "expt_hist")), None)
    if of_kernels is not None:
        top_k: int = of_kernels.n_expts_act
        if not counted:
            return tokens, top_k, None
        places = next(leaf.dst_indx for leaf in leaves if hasattr(leaf, "dst_indx"))  # of T * k pairs
        ends = of_kernels.expt_hist.cumsum(0)
        return tokens, top_k, torch.searchsorted(ends, places.to(ends.dtype), right=True).view(tokens, top_k)
    chosen = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
    return tokens, None if chosen is None else chosen.shape[-1], chosen

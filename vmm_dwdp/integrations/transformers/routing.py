"""What an experts module is told of the routing of its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class Routed(NamedTuple):
    """What an experts module is given: ``[..., H]``, ``[T, K]`` and ``[T, K]``."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


def routed_tokens(args: Any, kwargs: Any) -> Routed | None:
    """Tokens, the experts of each, and their weights; ``None``, if an experts module is given anything else."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    floats = [each for each in tensors if each.is_floating_point()]
    whole = [each for each in tensors if not each.is_floating_point()]
    if len(floats) == 2 and len(whole) == 1:
        routed = Routed(floats[0], whole[0], floats[1])
        if routed.chosen.shape == routed.weights.shape == (routed.hidden.shape[:-1].numel(), *whole[0].shape[1:]):
            return routed
    return None


def with_choice(args: Any, kwargs: Any, routed: Routed, chosen: Tensor) -> tuple[Any, Any]:
    """The arguments in which ``routed`` was found, with ``chosen`` in the place of its own."""
    changed: tuple[Any, Any] = tree_map_only(
        Tensor, lambda each: chosen if each is routed.chosen else each, (args, kwargs)
    )
    return changed


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

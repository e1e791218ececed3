"""Experts that every token uses, beside those that are spread: each rank has them whole.

With ``--dwdp-size`` every rank has tokens of its own, and SGLang skips the sum over ranks that follows a MoE block. Its
models cut a shared expert over ``--tp-size`` all the same, and would go on with the output of a part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang import contract

_NAME: Final = "shared_expert"  # in the name of its every weight: ``shared_expert.`` or ``shared_experts.``


def construct_linear(original: Callable[..., None], module: Any, *args: Any, **kwargs: Any) -> None:
    """Around the constructors of linear layers that are cut over ranks: those of a shared expert are not.

    As where tokens travel to experts, with which SGLang states the same of most models itself.
    """
    stated = inspect.signature(original).bind(module, *args, **kwargs).arguments
    if _NAME in stated.get("prefix", "") and _each_has_its_tokens():
        kwargs |= contract.whole(original) or {}
    original(module, *args, **kwargs)


def sum_over_ranks(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Around the sum over ``--tp-size`` that a model makes itself.

    Raises:
        ConfigError: with ``--dwdp-size``, where it would add up different tokens, or wait for a rank that has none.
    """
    if _each_has_its_tokens():
        raise ConfigError(
            "the model adds up over --tp-size, but with --dwdp-size each rank has tokens of its own, and its output "
            "would be wrong; start without --dwdp-size"
        )
    return original(*args, **kwargs)


def _each_has_its_tokens() -> bool:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dwdp_size) > 1


def require_whole(model: torch.nn.Module) -> None:
    """Raise `ConfigError` if a rank has a part of something that its tokens go through, beside the experts.

    Only what stands beside MoE layers is looked at: an encoder of images may add up its parts in its own way.
    """
    named = dict(model.named_modules())
    decoders = {_list_of(name) for name, module in named.items() if hasattr(module, "_dwdp_bound")}  # a `FusedMoE`
    for name, module in named.items():
        # What `RowParallelLinear` keeps; see `contract`.
        part, whole = (getattr(module, each, None) for each in ("input_size_per_partition", "input_size"))
        if part is not None and part != whole and _list_of(name) in decoders:
            raise ConfigError(
                f"{type(model).__name__} cuts {name} over --tp-size, but with --dwdp-size each rank has tokens of its "
                "own, and its output would be wrong; start without --dwdp-size"
            )


def _list_of(name: str) -> str:
    """The name of the list of layers that a module is in: what stands before the first number."""
    parts = name.split(".")
    return ".".join(parts[: next((place for place, part in enumerate(parts) if part.isdigit()), None)])

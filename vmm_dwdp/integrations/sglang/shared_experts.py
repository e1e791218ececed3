"""Experts that every token uses, beside those that are spread: whether each rank has them whole."""

from __future__ import annotations

import torch

from vmm_dwdp.errors import ConfigError


def require_whole(model: torch.nn.Module) -> None:
    """Raise `ConfigError` if a rank has a part of a shared expert.

    With ``--dwdp-size`` every rank has tokens of its own, and SGLang skips the sum that follows a MoE block. Some of
    its models cut the shared expert over ``--tp-size`` all the same, and would go on with the output of a part.
    """
    for name, module in model.named_modules():
        # What `RowParallelLinear` keeps; see `contract`.
        if "shared_expert" not in name or getattr(module, "reduce_results", True):
            continue
        if module.input_size_per_partition != module.input_size:
            raise ConfigError(
                f"{type(model).__name__} cuts {name} over --tp-size, and with --dwdp-size nothing adds up the parts: "
                "its output would be wrong; start without --dwdp-size"
            )

"""A plugin for SGLang: weights of ``--load-format dummy`` that take seconds where experts are in host memory.

There SGLang's own loader makes them on one core of the CPU, about half a gigabyte a second. Here the GPU makes a block
of random numbers, and every weight is filled with copies of it.
"""

from __future__ import annotations

import torch

BLOCK = 1 << 26  # numbers


def register() -> None:
    """SGLang calls it once in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_loader.loader.initialize_dummy_weights", fill, HookType.REPLACE)


def fill(model: torch.nn.Module, low: float = -1e-3, high: float = 1e-3, seed: int = 1234) -> None:
    """In place of SGLang's function of the same arguments."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = torch.empty(BLOCK, dtype=torch.bfloat16, device=device)
    block.uniform_(low, high, generator=torch.Generator(device).manual_seed(seed))
    for weight in model.state_dict().values():
        if weight.is_floating_point():
            for part in weight.view(-1).split(BLOCK):
                part.copy_(block[: part.numel()])

"""Which experts each token chose, recorded from a model and kept small."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch


class Recorder:
    """While entered, keeps what every router of a transformers MoE model returns, in the order of its layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self._chosen: list[list[torch.Tensor]] = [[] for _ in self._routers]  # by layer, then by forward pass
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        for router, chosen in zip(self._routers, self._chosen, strict=True):
            self._hooks.append(
                router.register_forward_hook(lambda _, __, output, chosen=chosen: chosen.append(output[-1].byte()))
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def phases(self, sequences: int, length: int) -> dict[str, np.ndarray]:
        """``prefill`` and ``decode``, each uint8 ``[sequences, tokens, layers, top_k]``: the first pass of one
        ``generate``, whose prompts were ``length`` tokens long, and the others."""
        prefill = [passes[0].view(sequences, length, -1) for passes in self._chosen]
        decode = [torch.stack(passes[1:], 1) for passes in self._chosen]
        return {
            name: torch.stack(layers, 2).cpu().numpy() for name, layers in (("prefill", prefill), ("decode", decode))
        }


def save_trace(path: Path, phases: dict[str, np.ndarray], kinds: list[str], facts: dict[str, Any]) -> None:
    """Writes what ``Recorder.phases`` gives, the kind of text of each sequence, and what else is known of the model."""
    np.savez_compressed(path, kinds=np.array(kinds), facts=np.array(json.dumps(facts)), **phases)

"""Which experts each token chose, recorded from a transformers model."""

from types import TracebackType

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel


class Recorder:
    """While entered, keeps what every router of a transformers MoE model returns, in the order of its layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        if not self._routers:
            raise ValueError(f"{type(model).__name__} has no module that is a top-k router")
        self._chosen: list[list[torch.Tensor]] = [[] for _ in self._routers]  # by layer, then by forward pass
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        for router, chosen in zip(self._routers, self._chosen, strict=True):
            self._hooks.append(
                router.register_forward_hook(lambda _, __, output, chosen=chosen: chosen.append(output[-1].short()))
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def phases(self, sequences: int, length: int) -> dict[str, np.ndarray]:
        """``prefill`` and ``decode``, each unsigned ``[sequences, tokens, layers, top_k]``: the first pass of one
        ``generate``, whose prompts were ``length`` tokens long, and the others."""
        prefill = [passes[0].view(sequences, length, -1) for passes in self._chosen]
        decode = [torch.stack(passes[1:], 1) for passes in self._chosen]
        return {"prefill": _small(torch.stack(prefill, 2)), "decode": _small(torch.stack(decode, 2))}


def _small(chosen: torch.Tensor) -> np.ndarray:
    """In the smallest unsigned integers that name every expert."""
    return chosen.cpu().numpy().astype(np.uint8 if chosen.max() < 256 else np.uint16)


def windows(text: torch.Tensor, count: int, length: int, random: torch.Generator) -> torch.Tensor:
    """``count`` random runs of ``length`` tokens, int64 ``[count, length]``."""
    starts = torch.randint(len(text) - length, (count, 1), generator=random, device=text.device)
    return text[starts + torch.arange(length, device=text.device)].long()


@torch.no_grad()
def record(
    model: PreTrainedModel, unseen: dict[str, torch.Tensor], sequences: int, length: int, temperature: float
) -> tuple[dict[str, np.ndarray], list[str], torch.Tensor]:
    """Of each kind of text so many prompts of ``length`` tokens, and what the model writes after them, as long again.

    Returns the choices in prefill and decode, each sequence's kind, and the tokens, ``[sequences, 2 * length + 1]``.
    """
    random = torch.Generator(model.device).manual_seed(1)
    torch.manual_seed(1)  # of the sampling
    kinds = [kind for kind in unseen for _ in range(sequences)]
    prompts = torch.cat([windows(text, sequences, length, random) for text in unseen.values()])
    settings = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=length + 1)
    with Recorder(model) as recorder:
        written = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    return recorder.phases(len(prompts), length), kinds, written

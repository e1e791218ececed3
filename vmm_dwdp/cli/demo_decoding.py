"""How the demo continues a prompt: a step a token, with a static cache, eagerly or in replays of one captured graph.

[Note: A step that can be replayed]
    A graph does again what was launched while it was captured, on the same tensors; no Python runs. So the token that a
    step is given, the logits that it gives and the cache stay where they are, and the cache counts its tokens on the
    device: a `StaticCache`. What is sampled depends on its length, by the rounding of sums: whoever is compared has one
    as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""Of a step, what does it again; it may run the step, or not."""

KERNELS: Final = 2  # tokens after which every kernel of a prompt and of a step has been loaded


class Decoding:
    """A loop for ``custom_generate`` of transformers' `generate`: one sequence at a time, sampled as its config says.

    See [Note: A step that can be replayed].

    Args:
        model: one for which transformers has a static cache, by `has_static_cache`.
        max_tokens: of a prompt and of all that follows it.
    """

    def __init__(self, model: Any, max_tokens: int) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self._model = model
        self._cache = StaticCache(model.config, max_cache_len=max_tokens)
        for place, layer in enumerate(self._cache.layers):
            if getattr(layer, "is_sliding", False):  # cut to a window, which is counted in Python; masks keep to it too
                self._cache.layers[place] = StaticLayer(max_tokens)
        self._token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._step: Step = self._run_step

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits ``[1, vocabulary]`` after the last of ``tokens`` ``[1, T]``, which follow what is cached."""
        logits: Tensor = self._model(tokens, past_key_values=self._cache).logits
        return logits[:, -1]

    def _run_step(self) -> Tensor:
        return self._read(self._token)

    @torch.no_grad()
    def capture(self, capture: Capture) -> None:
        """Let every step from now on be what ``capture`` makes of one.

        Some prompt must have been continued by `KERNELS` tokens: a capture can neither load kernels nor take memory for
        the cache. Where it raises, steps are as they were.
        """
        self._step = capture(self._run_step)

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **_: Any) -> Any:
        """Continue ``input_ids`` ``[1, T]`` up to the config's ``max_length``, as `generate` calls it."""
        from transformers.generation import GenerateDecoderOnlyOutput

        self._cache.reset()
        logits = []
        found = self._read(input_ids)
        while True:
            logits.append(found.to(torch.float32, copy=True))  # the next step writes where this one did
            scores = logits_processor(input_ids, logits[-1])
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], -1)
            if input_ids.shape[1] == generation_config.max_length:
                return GenerateDecoderOnlyOutput(sequences=input_ids, logits=tuple(logits))
            self._token.copy_(token)
            found = self._step()


def has_static_cache(model: Any) -> bool:
    """Whether transformers says of a model that a step can be one graph, which it does of those with a static cache."""
    return bool(model._can_compile_fullgraph)


def in_cuda_graph(step: Step) -> Step:
    """``step``, captured on the current device; each call replays it on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay

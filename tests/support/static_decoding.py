"""Decoding with a static cache, one token a step, as transformers.md shows it; and on a CPU what stands for a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from support.groups import PAGE
from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach

LENGTH = 48  # of the cache
PROMPT = 12
STEPS = 30


class Decoding:
    """One sequence of a model, which is told each token; what a step reads and writes stays where it is.

    Unless with ``windows``, what a layer caches is not cut to the window that its tokens see, which Python would count.
    """

    def __init__(self, model: PreTrainedModel, *, windows: bool = False) -> None:
        self.model = model
        self.cache = StaticCache(model.config, max_cache_len=LENGTH)
        if not windows:
            self.cache.layers = [StaticLayer(LENGTH) if each.is_sliding else each for each in self.cache.layers]
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits ``[1, 1, V]`` after ``token``."""
        logits: Tensor = self.model(self.token, past_key_values=self.cache).logits
        return logits

    @torch.no_grad()
    def begin(self, prompt: Tensor) -> Tensor:
        """Logits ``[1, T, V]`` of a prompt ``[1, T]`` of a new sequence."""
        self.cache.reset()
        logits: Tensor = self.model(prompt, past_key_values=self.cache).logits
        return logits

    def run(self, seed: int, step: Callable[[], Tensor] | None = None) -> list[Tensor]:
        """Logits of a prompt and of 30 drawn tokens; ``step`` stands for `step`."""
        draws = torch.randint(3, 64, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(seed))
        found = [self.begin(draws[None, :PROMPT].to(self.token.device))]
        for token in draws[PROMPT:]:
            self.token.fill_(token)
            found.append((step or self.step)().clone())
        return found


def require_same_logits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 1 + STEPS
    for number, (each, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(each, wanted), f"step {number}"


WAITS: Final = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a step, on a CPU: operations, and the tensors that they read and write.

    A replay does them again with the same tensors; what Python worked out of them is as it was. An operation for which
    a GPU would have to wait is refused. Other than by a capture, the step is run when it is recorded.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        super().__init__()
        self._done: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True), self:
            self.output = step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().partition(".")[0] not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self) -> Tensor:
        """The step's result, in the tensor that it was recorded in."""
        for func, args, kwargs, before in self._done:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.output


@contextmanager
def spread(model: PreTrainedModel, place: Path, config: DWDPConfig) -> Iterator[DWDPRuntime]:
    """``model`` over a runtime of one rank without a GPU, which leaves nothing open."""
    runtime = DWDPRuntime(config, 0, "cpu", place, driver=HostDriver(PAGE))
    attach(model, runtime, timeout=30)
    yield runtime
    assert runtime.close().open() == []

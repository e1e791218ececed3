"""What ranks of several nodes compute together, by one process: a model in a thread for each, which meet in each layer.

Nothing here is the library's: loops over tokens say who gets what, and whole models have all experts.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from support.nodes import Shape
from vmm_dwdp.integrations.transformers.experts import align_experts, find_experts

T = TypeVar("T")


class Lockstep:
    """The ranks of ``shape``, of which each calls `models` once and then runs as many passes as the others."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._barrier = threading.Barrier(shape.world, timeout=60)
        self._said: dict[Any, Any] = {}  # by what it is, layer, node and rank
        self.without_tokens: set[tuple[int, int]] = set()  # nodes and ranks whose pass is of none of their own

    def run(self, function: Callable[[int, int], T]) -> list[T]:
        """What ``function`` gives for each node and rank, each in a thread."""
        places = [divmod(place, self._shape.ranks) for place in range(self._shape.world)]
        with ThreadPoolExecutor(self._shape.world) as pool:
            return list(pool.map(lambda place: function(*place), places))

    def spread(self, model: PreTrainedModel, node: int, rank: int) -> None:
        """Let the experts of ``model``, which is whole, compute as those of this rank."""
        align_experts(model)
        for layer, found in enumerate(find_experts(model)):
            count = next(iter(found.weights.values())).num_experts
            own = range(count * node // self._shape.nodes, count * (node + 1) // self._shape.nodes)
            part = _part(found.module, set(found.weights), own)
            found.module.forward = lambda *given, layer=layer, part=part, own=own: self._forward(
                layer, node, rank, part, own, *given
            )

    def _all_said(self, what: str, layer: int, node: int, rank: int, value: Any) -> list[Any]:
        """Of the ranks of this number, node after node."""
        self._said[what, layer, node, rank] = value
        self._barrier.wait()
        every = [self._said[what, layer, each, rank] for each in range(self._shape.nodes)]
        self._barrier.wait()
        return every

    def _forward(
        self, layer: int, node: int, rank: int, part: Any, own: range, hidden: Tensor, chosen: Tensor, weights: Tensor
    ) -> Tensor:
        if (node, rank) in self.without_tokens:
            chosen = torch.full_like(chosen, -1)
        tokens = [
            (sender, row, experts, factors)
            for sender, batch in enumerate(self._all_said("tokens", layer, node, rank, (hidden, chosen, weights)))
            for row, experts, factors in zip(batch[0], batch[1].tolist(), batch[2], strict=True)
        ]
        pairs = [
            (number, choice)
            for choice in range(chosen.shape[1])
            for number, (_, _, experts, _) in enumerate(tokens)
            if experts[choice] in own
        ]
        sums: dict[int, Tensor] = {}
        if pairs:
            rows = torch.stack([tokens[number][1] for number, _ in pairs])
            experts = torch.tensor([[tokens[number][2][choice] - own.start] for number, choice in pairs])
            factors = torch.stack([tokens[number][3][choice : choice + 1] for number, choice in pairs])
            for (number, _), output in zip(pairs, part(rows, experts, factors), strict=True):
                sums[number] = sums.get(number, torch.zeros(hidden.shape[-1])) + output.float()
        by_sender: list[list[Tensor | None]] = [[] for _ in range(self._shape.nodes)]
        for number, (sender, *_) in enumerate(tokens):
            by_sender[sender].append(sums[number].to(hidden.dtype) if number in sums else None)
        total = torch.zeros(hidden.shape)
        for answered in self._all_said("sums", layer, node, rank, by_sender):
            for token, summand in enumerate(answered[node]):
                if summand is not None:
                    total[token] += summand.float()
        return total.to(hidden.dtype)


def _part(module: Any, stacked: set[str], own: range) -> nn.Module:
    """``module`` with the experts ``own`` alone."""
    part: nn.Module = copy.deepcopy(module)
    for name in stacked:
        whole = module.get_parameter(name).detach()
        part.register_parameter(name, nn.Parameter(whole[own.start : own.stop].clone()))
    part.num_experts = len(own)  # type: ignore[assignment]
    return part

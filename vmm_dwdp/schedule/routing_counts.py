"""How many tokens were routed to each expert, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class RoutingCounts:
    """Counts of every layer, for readers of which each sees what is new to it.

    Counting is work for the current stream, which waits for nothing, and may be captured into a graph: then every
    replay counts what it finds in the captured tensor.
    """

    def __init__(self, num_experts: Mapping[int, int], device: torch.device) -> None:
        """``num_experts``: by layer."""
        with torch.inference_mode(False):  # what is made in that mode can be counted up only in that mode
            self._one = torch.ones(1, dtype=torch.int64, device=device)
            self._counts = {
                layer: torch.zeros(count + 1, dtype=torch.int64, device=device) for layer, count in num_experts.items()
            }
        self._total = {layer: [0] * count for layer, count in num_experts.items()}  # when it was last looked at
        self._seen: dict[str, dict[int, list[int]]] = {}  # by reader

    def add(self, layer: int, chosen: torch.Tensor) -> None:
        """Count ``chosen``, whole numbers of any shape on the device: experts of ``layer``.

        What is no expert is not counted. By the remainder it falls on the last count, as -1 does, or on another: an
        index that is out of bounds would cost the process its device.
        """
        counts = self._counts[layer]
        experts = chosen.reshape(-1).long().remainder(len(counts))
        counts.scatter_add_(0, experts, self._one.expand(len(experts)))

    def look(self, reader: str) -> dict[int, list[int]]:
        """For each layer, the count of each expert since `take` of the same reader. Waits for the current stream."""
        self._total = {layer: counts.tolist()[:-1] for layer, counts in self._counts.items()}
        seen = self._seen.get(reader)
        if seen is None:
            return self._total
        return {
            layer: [now - before for now, before in zip(counts, seen[layer], strict=True)]
            for layer, counts in self._total.items()
        }

    def take(self, reader: str) -> None:
        """What there was at the latest `look`, of whomever, is not new to ``reader`` any more."""
        self._seen[reader] = self._total

"""How many tokens were routed to each expert, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class RoutingCounts:
    """Counts of every layer since the last `take`.

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

    def add(self, layer: int, chosen: torch.Tensor) -> None:
        """Count ``chosen``, whole numbers of any shape on the device: experts of ``layer``.

        What is no expert is not counted. By the remainder it falls on the last count, as -1 does, or on another: an
        index that is out of bounds would cost the process its device.
        """
        counts = self._counts[layer]
        experts = chosen.reshape(-1).long().remainder(len(counts))
        counts.scatter_add_(0, experts, self._one.expand(len(experts)))

    def take(self) -> dict[int, list[int]]:
        """For each layer, the count of each expert; they begin again at zero. Waits for the current stream."""
        taken = {layer: counts.tolist()[:-1] for layer, counts in self._counts.items()}
        for counts in self._counts.values():
            counts.zero_()
        return taken

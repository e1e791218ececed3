"""Layers in torch's own profiler: a span of the launching thread from acquire to release, named by the layer.

[Note: Spans]
Whether a profiler runs is looked at when a pass begins. If so, the whole pass goes through Python, so that its layers
have spans; otherwise nobody asks again until the next one.
"""

from __future__ import annotations

import torch
from torch.autograd.profiler import record_function


class Spans:
    """Those that are open, by the layer's number."""

    def __init__(self) -> None:
        self._open: dict[int, record_function] = {}

    @staticmethod
    def are_wanted() -> bool:
        """Whether a profiler of torch's runs."""
        return getattr(torch.autograd.profiler, "_is_profiler_enabled", False)

    def begin(self, layer: int) -> None:
        """The layer is about to be acquired."""
        self.end(layer)
        self._open[layer] = record_function(f"vmm-dwdp layer {layer}")
        self._open[layer].__enter__()  # type: ignore[no-untyped-call]

    def end(self, layer: int) -> None:
        """The layer was released, or will not be acquired."""
        if (span := self._open.pop(layer, None)) is not None:
            span.__exit__(None, None, None)

    def end_all(self) -> None:
        """The pass is given up."""
        for layer in list(self._open):
            self.end(layer)

"""What a caller states of a whole pass."""

from __future__ import annotations

from typing import NamedTuple

from vmm_dwdp.config import ModeSetting


class Stated(NamedTuple):
    """What is the same for all layers of a pass; `DWDPRuntime.acquire` tells what each is."""

    mode: ModeSetting | None
    tokens: int | None
    top_k: int | None

    def unless(self, mode: ModeSetting | None, tokens: int | None, top_k: int | None) -> Stated:
        """This, where the arguments do not say otherwise."""
        tokens = self.tokens if tokens is None else tokens
        return Stated(mode or self.mode, tokens, self.top_k if top_k is None else top_k)

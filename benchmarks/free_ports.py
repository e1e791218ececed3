"""TCP ports for SGLang's engines and servers, which take more than the one that they are told."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

DERIVED = (0, 13, *range(233, 240))
"""SGLang 0.5.17 to 0.5.23 adds these to the port that it is told where attention is data parallel, as with DWDP."""
FIRST, END, APART = 10000, 20000, 250
"""Below those that the kernel gives to connections, and that SGLang 0.5.23 takes by itself (22,000 to 30,000)."""


def ports() -> Iterator[int]:
    """Each of which SGLang may be told: what it derives from one is free now, and not derived from another of these.

    Raises:
        SystemExit: with a sentence, instead of the next one where there is none.
    """
    places = range(FIRST, END, APART)
    for port in random.sample(places, len(places)):  # beside another benchmark that has taken none of its own yet
        if all(_is_free(port + more) for more in DERIVED):
            yield port
    raise SystemExit(f"no ports are free from {FIRST} to {END}")


def _is_free(port: int) -> bool:
    """On all addresses."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True

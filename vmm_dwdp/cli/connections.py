"""The hardware queues that a process has for copies: streams that share one wait for each other.

CUDA gives a process 1 to 32 connections to a GPU, 8 unless told otherwise; it advises to have as many as there are
active streams, as work of different streams in one queue depends on what is before it there.
CUDA_DEVICE_MAX_CONNECTIONS says how many there are for kernels and how many for copies,
CUDA_DEVICE_MAX_COPY_CONNECTIONS those for copies alone
(https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html, 5.2.3.2 and 5.2.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

BOTH: Final = "CUDA_DEVICE_MAX_CONNECTIONS"
COPIES: Final = "CUDA_DEVICE_MAX_COPY_CONNECTIONS"
_USUAL: Final = 8
_MOST: Final = 32


@dataclass(frozen=True)
class Connections:
    """Of this process to a GPU, for copies.

    Attributes:
        why_not: None where each copy stream of a group can have its own, else the sentence that says why not.
        stated: what the environment says, by variable.
        for_copies: how many there are; None where the environment says what CUDA does not know.
        streams: that a rank copies on, if all GPUs of this machine are one group: one for each other, and one for host
            memory; no more than there can be connections.
    """

    why_not: str | None
    stated: dict[str, str]
    for_copies: int | None
    streams: int


def connections(environment: Mapping[str, str], num_gpus: int) -> Connections:
    """What ``environment`` asks for, on a machine with ``num_gpus``."""
    stated = {name: environment[name] for name in (BOTH, COPIES) if name in environment}
    streams = min(max(1, num_gpus - 1) + 1, _MOST)
    for name, text in stated.items():
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST):
            return Connections(f"{name} is {text!r}, which is not a number from 1 to {_MOST}", stated, None, streams)
    name = COPIES if COPIES in stated else BOTH
    there = int(stated.get(name, _USUAL))
    why_not = None
    if there < streams:
        said = f"{name} is {there}" if stated else f"{BOTH} is not set, which is {there}"
        why_not = (
            f"{said}: a rank copies on up to {streams} streams, and those that share a connection wait for each other; "
            f"set {COPIES} to {streams} or more"
        )
    return Connections(why_not, stated, there, streams)

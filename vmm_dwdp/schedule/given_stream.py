"""The streams that callers name: torch's, any other library's, or the number that the driver knows one by."""

from __future__ import annotations

from typing import Protocol

import torch

from vmm_dwdp.allocator.driver import Driver, StreamId
from vmm_dwdp.errors import ConfigError, StateError


class CudaStream(Protocol):
    """What cuda.core, CuPy, Numba and others give for a stream."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol's version, 0, and the stream as the driver knows it."""


StreamLike = torch.cuda.Stream | CudaStream | int


def given_stream(stream: StreamLike | None, driver: Driver) -> StreamId:
    """As the driver knows it; ``None`` is the current one.

    Raises:
        ConfigError: it is no stream.
        StateError: it is of another device; or it is captured and the current one, by which captures are told, is not.
    """
    if stream is None:
        return driver.current_stream()
    if (device := getattr(stream, "device", None)) is not None and hasattr(stream, "cuda_stream"):  # torch's
        if device != driver.device:
            raise StateError(f"the stream is of {device}, but the weights are on {driver.device}")
        at = StreamId(stream.cuda_stream)
    else:
        at = StreamId(stream if isinstance(stream, int) else _asked(stream))
        if not driver.owns(at):
            raise StateError(f"stream {at:#x} is of another device than {driver.device}, where the weights are")
    if driver.capture(at) and not driver.capturing():
        raise StateError(f"stream {at:#x} is captured into a graph: make it the current stream")
    return at


def _asked(stream: CudaStream) -> int:
    if not hasattr(stream, "__cuda_stream__"):
        raise ConfigError(f"a stream is torch's, a number, or has __cuda_stream__, unlike {stream!r}")
    version, number = stream.__cuda_stream__()
    if version != 0:
        raise ConfigError(f"{stream!r} speaks version {version} of __cuda_stream__, not 0")
    return number

"""Results of ``cuda.bindings``, as values or as errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda

from vmm_dwdp.errors import DriverError


def check(attempt: str, call: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Make the call; its value, or a tuple where there is not one. Raises `DriverError` unless it returns success."""
    result, *values = call(*arguments)
    if result != cuda.CUresult.CUDA_SUCCESS:
        raise DriverError(call.__name__, result.name, attempt)
    return values[0] if len(values) == 1 else tuple(values)

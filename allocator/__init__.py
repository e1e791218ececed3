"""Virtual memory of a device: physical pages, address ranges, and what maps one to the other."""

from __future__ import annotations

import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import ConfigError


def open_driver(device: torch.device, granularity: int | None = None) -> Driver:
    """The driver of ``device``: a CUDA device, or the CPU for the host driver.

    ``granularity`` in bytes can be chosen for the host driver only; a GPU has its own. Raises `ConfigError` for a
    device or granularity that cannot be, and `DriverError` where the device cannot be used.
    """
    if device.type == "cpu":
        return HostDriver() if granularity is None else HostDriver(granularity)
    if device.type != "cuda":
        raise ConfigError(f"there is no driver for the device {device}: it must be a CUDA device or the CPU")
    if granularity is not None:
        raise ConfigError(f"the granularity of {device} is given by its driver: it cannot be set to {granularity}")
    from vmm_dwdp.allocator.cuda_driver import CudaDriver  # the host driver needs no cuda-bindings

    return CudaDriver(device)

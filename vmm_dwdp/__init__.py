"""Distributed Weight Data Parallelism over CUDA virtual memory.

Every rank of a group sees the expert weights of each MoE layer as ordinary tensors ``[E, ...]`` while it holds only its
share of them. `DWDPRuntime` is where to begin.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from vmm_dwdp.version import __version__ as __version__

if TYPE_CHECKING:
    from vmm_dwdp.config import DWDPConfig
    from vmm_dwdp.errors import ConfigError, DriverError, DWDPError, ExchangeError, StateError
    from vmm_dwdp.group.addresses import TCPRendezvous
    from vmm_dwdp.layout.placement import HOST, ExpertPlacement
    from vmm_dwdp.layout.weight_spec import WeightSpec
    from vmm_dwdp.observe.stats import LayerStats, Stats
    from vmm_dwdp.runtime import DWDPRuntime

__all__ = [
    "HOST",
    "ConfigError",
    "DWDPConfig",
    "DWDPError",
    "DWDPRuntime",
    "DriverError",
    "ExchangeError",
    "ExpertPlacement",
    "LayerStats",
    "StateError",
    "Stats",
    "TCPRendezvous",
    "WeightSpec",
]

_MODULES = {
    "config": ("DWDPConfig",),
    "errors": ("ConfigError", "DWDPError", "DriverError", "ExchangeError", "StateError"),
    "group.addresses": ("TCPRendezvous",),
    "layout.placement": ("HOST", "ExpertPlacement"),
    "layout.weight_spec": ("WeightSpec",),
    "observe.stats": ("LayerStats", "Stats"),
    "runtime": ("DWDPRuntime",),
}

logging.getLogger("vmm_dwdp").addHandler(logging.NullHandler())  # silent unless the program that imports us asks


if not TYPE_CHECKING:  # to which any name would be one

    def __getattr__(name: str) -> object:
        """What users import, once they ask for it: it needs torch, which takes seconds; the command line may not."""
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return globals()[name]

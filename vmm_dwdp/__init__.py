"""Distributed Weight Data Parallelism over CUDA virtual memory.

Every rank of a group sees the expert weights of each MoE layer as ordinary tensors ``[E, ...]`` while it holds only its
share of them. `DWDPRuntime` is where to begin.
"""

import logging

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DriverError, DWDPError, ExchangeError, StateError
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
    "WeightSpec",
]

logging.getLogger("vmm_dwdp").addHandler(logging.NullHandler())  # silent unless the program that imports us asks

"""Distributed Weight Data Parallelism over CUDA virtual memory."""

from vmm_dwdp.errors import ConfigError, DriverError, DWDPError, ExchangeError, StateError

__all__ = ["ConfigError", "DWDPError", "DriverError", "ExchangeError", "StateError"]

"""The parts of `vmm_dwdp.Stats` that have no name at the top: public names, by the module that users have them from."""

from vmm_dwdp.layout.needs import MemoryNeeded
from vmm_dwdp.observe.stats import BankCounts, BankStats, CacheStats, CopyPath

__all__ = ["BankCounts", "BankStats", "CacheStats", "CopyPath", "MemoryNeeded"]

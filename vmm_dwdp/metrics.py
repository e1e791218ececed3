"""Prometheus metrics of a runtime; needs prometheus-client: public names, by the module that users have them from."""

from vmm_dwdp.observe.metrics import StatsCollector

__all__ = ["StatsCollector"]

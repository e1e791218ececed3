"""A rank's figures beside SGLang's own at its ``/metrics``, with ``--enable-metrics``.

SGLang's server answers for all processes of an engine, by prometheus_client's multiprocess mode: from what each has
written into a folder, and not from collectors, whose registry is that of their process. So this is imported by ranks
alone, where SGLang has named that folder to prometheus_client.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import Counter, Gauge
from prometheus_client.core import Metric

from vmm_dwdp.observe.metrics import StatsCollector
from vmm_dwdp.observe.stats import Stats

EVERY_S: Final = 1.0  # to write them takes a while, several to a layer


class Metrics:
    """What `StatsCollector` shows of one rank, in instruments.

    Args:
        rank: the label.
        stats: of its runtime.
        clock: seconds.
    """

    def __init__(self, rank: int, stats: Callable[[], Stats], clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = StatsCollector(rank)
        self._stats = stats
        self._clock = clock
        self._written_at = -float("inf")
        self._instruments: dict[str, Counter | Gauge] = {}
        self._counted: dict[tuple[str, ...], float] = {}  # by metric and labels

    def write(self) -> None:
        """Write what is now, unless that was done within the last second. Called between passes."""
        now = self._clock()
        if now - self._written_at < EVERY_S:
            return
        self._written_at = now
        self._collector.observe(self._stats())
        for metric in self._collector.collect():
            self._write(metric)

    def _write(self, metric: Metric) -> None:
        for sample in metric.samples:
            instrument = self._instruments.get(metric.name)
            if instrument is None:
                instrument = self._instruments[metric.name] = _instrument(metric, list(sample.labels))
            child = instrument.labels(**sample.labels)
            if isinstance(child, Gauge):
                child.set(sample.value)
            else:
                series = (metric.name, *sample.labels.values())
                child.inc(sample.value - self._counted.get(series, 0))
                self._counted[series] = sample.value


def _instrument(metric: Metric, labels: list[str]) -> Counter | Gauge:
    """In no registry: a process may have one model after another, and of its folder all is shown."""
    if metric.type == "counter":
        return Counter(metric.name, metric.documentation, labels, registry=None)
    return Gauge(metric.name, metric.documentation, labels, registry=None, multiprocess_mode="mostrecent")

"""`Stats` as Prometheus metrics; needs the extra ``prometheus``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vmm_dwdp.observe.stats import CacheStats, Stats

_NO_CACHE = CacheStats(nbytes=0, used_bytes=0, refreshes=0, served=None)


class StatsCollector:
    """The latest `Stats` of one rank, for a Prometheus registry.

    A scrape comes from a thread of its own at any time, and reads what `observe` was given last; it never touches the
    runtime. All metrics have the label ``rank``, those of a layer also ``layer``. Bytes and seconds are the units.

        collector = StatsCollector(runtime.rank)
        prometheus_client.REGISTRY.register(collector)
        ...
        collector.observe(runtime.stats())
    """

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self._latest: Stats | None = None

    def observe(self, stats: Stats) -> None:
        """Show ``stats`` from now on: call it after a pass, in the thread that runs passes."""
        self._latest = stats

    def collect(self) -> Iterator[Metric]:
        """What a registry asks for; nothing before the first `observe`."""
        stats = self._latest
        if stats is None:
            return
        cache = stats.cache or _NO_CACHE
        gauges: Sequence[tuple[str, str, float | None]] = (
            ("resident_bytes", "Physical memory of the shards that this rank holds.", stats.resident_bytes),
            ("staged_bytes", "Physical memory of the slots.", stats.staged_bytes),
            ("cache_bytes", "Physical memory of the resident cache.", cache.nbytes),
            ("cache_used_bytes", "Of that, what holds copies of remote experts.", cache.used_bytes),
            ("cache_served_ratio", "The part of the remote bytes used that was in the cache.", cache.served),
            ("held_up_by_copies", "1 once passes were held up by their copies.", stats.advice is not None),
            ("held_up_by_nodes", "1 once passes were held up by other nodes.", stats.node_advice is not None),
        )
        for name, documentation, value in gauges:
            if value is not None:
                gauge = GaugeMetricFamily(f"vmm_dwdp_{name}", documentation, labels=["rank"])
                gauge.add_metric([self._rank], value)
                yield gauge
        refreshes = CounterMetricFamily("vmm_dwdp_cache_refreshes", "Refreshes of the resident cache.", labels=["rank"])
        refreshes.add_metric([self._rank], cache.refreshes)
        yield refreshes
        for name, field, documentation in (
            ("hits", "hits", "Acquires of a layer that was in its slot or on its way there."),
            ("misses", "misses", "Acquires of a layer that had to be fetched then."),
            ("fetched_bytes", "fetched_bytes", "Bytes that fetches of a layer moved."),
            ("exposed_wait_seconds", "exposed_wait_s", "Time for which the compute stream waited for a layer."),
            ("in_place", "in_place", "Acquires of a layer to be read in place."),
            ("node_wait_seconds", "node_wait_s", "Time in exchanges with ranks of other nodes."),
        ):
            counter = CounterMetricFamily(f"vmm_dwdp_{name}", documentation, labels=["rank", "layer"])
            for number, layer in stats.layers.items():
                counter.add_metric([self._rank, str(number)], getattr(layer, field))
            yield counter

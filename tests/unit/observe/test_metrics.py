"""What Prometheus is told, against what the runtime counts; and what is logged."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, check_pass, published, random_model

from vmm_dwdp import DWDPConfig, Stats

ROOT = Path(__file__).parents[3]
MODEL = random_model({number: {"w": ((4, 64, 64), torch.bfloat16)} for number in (3, 5)})


@pytest.fixture
def stats(tmp_path: Path) -> Stats:
    """Of rank 1, after two staged passes and two in place, each followed by a refresh of the cache."""
    config = DWDPConfig(group_size=2, mode="auto", resident_cache=3 * PAGE)
    with published(config, tmp_path / "group", MODEL) as runtimes:
        for _ in range(2):
            check_pass(runtimes[1], MODEL, mode="staged")
        for _ in range(2):
            for number in MODEL:
                with runtimes[1].layer(number, mode="in_place", chosen=torch.tensor([[0], [1]])):
                    pass
            with runtimes[1].exchange(3):
                pass
            runtimes[1].refresh_cache()
        return runtimes[1].stats()


def scraped(stats: Stats) -> dict[tuple[str, str | None], float]:
    """By metric and layer, as a scrape parses it."""
    client = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from vmm_dwdp.observe.metrics import StatsCollector

    registry = client.CollectorRegistry()
    collector = StatsCollector(rank=1)
    registry.register(collector)
    assert client.generate_latest(registry) == b""
    collector.observe(stats)
    families = text_string_to_metric_families(client.generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["rank"] for sample in samples} == {"1"}
    return {(sample.name, sample.labels.get("layer")): sample.value for sample in samples}


def test_a_scrape_gives_what_stats_says(stats: Stats) -> None:
    assert stats.hits == 4
    assert stats.fetched_bytes > 0
    assert stats.cache is not None
    assert stats.cache.served
    assert stats.node_wait_s > 0
    layers = {
        (f"vmm_dwdp_{name}_total", str(number)): value
        for number, layer in stats.layers.items()
        for name, value in (
            ("hits", layer.hits),
            ("misses", layer.misses),
            ("fetched_bytes", layer.fetched_bytes),
            ("exposed_wait_seconds", layer.exposed_wait_s),
            ("in_place", layer.in_place),
            ("node_wait_seconds", layer.node_wait_s),
        )
    }
    assert scraped(stats) == layers | {
        ("vmm_dwdp_resident_bytes", None): stats.resident_bytes,
        ("vmm_dwdp_staged_bytes", None): stats.staged_bytes,
        ("vmm_dwdp_cache_bytes", None): stats.cache.nbytes,
        ("vmm_dwdp_cache_used_bytes", None): stats.cache.used_bytes,
        ("vmm_dwdp_cache_served_ratio", None): stats.cache.served,
        ("vmm_dwdp_cache_refreshes_total", None): 2,
        ("vmm_dwdp_held_up_by_copies", None): 0,
        ("vmm_dwdp_held_up_by_nodes", None): 0,
    }


def test_without_a_cache_nothing_is_said_to_be_served(stats: Stats) -> None:
    cached = {name: value for (name, _), value in scraped(replace(stats, cache=None)).items() if "cache" in name}

    assert cached == dict.fromkeys((f"vmm_dwdp_cache_{what}" for what in ("bytes", "used_bytes", "refreshes_total")), 0)


def test_the_page_has_a_query_for_every_metric_and_for_no_other(stats: Stats) -> None:
    queries = re.findall(r"```promql\n(.*?)```", (ROOT / "docs/observing.md").read_text(), re.DOTALL)

    named = set(re.findall(r"vmm_dwdp_\w+", " ".join(queries)))
    assert named == {name for name, _ in scraped(stats)}


def test_publish_is_logged_at_info_and_nothing_is_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = random_model({0: {"w": ((4, 1024, 512), torch.bfloat16)}})  # 1 MiB an expert
    with (
        caplog.at_level(logging.INFO, "vmm_dwdp"),
        published(DWDPConfig(group_size=1, host_experts=3), tmp_path / "group", model),
    ):
        pass

    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["rank 0: 1 layers ready, 4 MiB resident, 3 MiB staged"]
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("vmm_dwdp").handlers)

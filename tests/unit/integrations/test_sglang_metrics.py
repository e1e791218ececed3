"""What ranks write for an engine's ``/metrics``, read as its server reads it: in multiprocess mode."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmm_dwdp.integrations.sglang import arguments
from vmm_dwdp.observe.stats import LayerStats, Stats
from vmm_dwdp.testing import run_group


class Model:
    """The figures of one that a rank has, and the clock."""

    def __init__(self, rank: int, resident_bytes: int) -> None:
        self.now, self.hits, self.asked = 100.0, 0, 0
        self._rank = rank
        self._resident_bytes = resident_bytes

    def stats(self) -> Stats:
        self.asked += 1
        first = LayerStats(hits=self.hits, fetched_bytes=1000 * self._rank)
        second = LayerStats(in_place=2, exposed_wait_s=0.5)
        return Stats(self._resident_bytes, 0, {3: first, 5: second}, None, None, None)


def write(rank: int, *, folder: Path) -> list[int]:
    """Two models one after another; returns how often the figures of each were asked for."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    from vmm_dwdp.integrations.sglang.metrics import Metrics

    models = [Model(rank, 4096), Model(rank, 8192)]
    for model in models:
        metrics = Metrics(7 + rank, model.stats, partial(getattr, model, "now"))
        for model.now, model.hits in ((100.0, 1), (100.5, 2), (101.0, 4), (101.9, 8)):
            metrics.write()
    return [model.asked for model in models]


def scraped(folder: Path) -> dict[tuple[str, str, str | None], float]:
    """By metric, rank and layer."""
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.labels.keys() <= {"rank", "layer"} for sample in samples)
    return {(each.name, each.labels["rank"], each.labels.get("layer")): each.value for each in samples}


def test_a_server_shows_what_its_ranks_have_written(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")  # not sooner: ranks import it once the folder is named
    assert run_group(partial(write, folder=tmp_path), 2) == [[2, 2]] * 2  # once a second

    found = scraped(tmp_path)

    for rank in (0, 1):
        name = str(7 + rank)
        expected: dict[tuple[str, str | None], float] = {
            ("hits_total", "3"): 4 + 4,  # counters go on with the next model
            ("hits_total", "5"): 0,
            ("fetched_bytes_total", "3"): 2 * 1000 * rank,
            ("in_place_total", "5"): 2 + 2,
            ("exposed_wait_seconds_total", "5"): 0.5 + 0.5,
            ("resident_bytes", None): 8192,
            ("held_up_by_copies", None): 0,
        }
        assert {key: found[f"vmm_dwdp_{key[0]}", name, key[1]] for key in expected} == expected


def test_only_who_asked_for_metrics_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "view", lambda given: given)
    stated: list[Any] = [SimpleNamespace(enable_metrics=each) for each in (False, True)]
    assert [arguments.shows_metrics(each) for each in stated] == [False, True]

"""What a rank says while it loads a model: what it needs and what is free, how far it is, and what would fit."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.faults import FaultyDriver
from support.groups import PAGE, in_threads
from support.moe_models import NUM_EXPERTS, tiny_model
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from vmm_dwdp import ConfigError, DriverError, DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import from_pretrained, room
from vmm_dwdp.integrations.transformers.experts import find_experts
from vmm_dwdp.memory import room as memory_room

CONFIG = DWDPConfig(group_size=2, num_local_experts=5, prefetch_depth=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def load(folder: Path, meeting: Path, config: DWDPConfig, rank: int, driver: HostDriver) -> PreTrainedModel:
    place: dict[str, Any] = {"rendezvous": meeting, "device": "cpu", "driver": driver}
    return from_pretrained(folder, config, rank=rank, **place)


def has_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """The device, as far as anybody asks."""
    for module in (room, memory_room):
        monkeypatch.setattr(module, "free_bytes", lambda device: nbytes)


def taken(meeting: Path, config: DWDPConfig) -> list[int]:
    """The bytes that each rank of a group has on its device, as it counts them when it has taken them.

    Rank 0 counts the pool of host memory, too.
    """
    layers = find_experts(tiny_model("qwen3_moe"))
    experts = [spec for found in layers for spec in found.weights.values()]
    begins = [(NUM_EXPERTS - config.host_experts) * spec.expert_nbytes // PAGE for spec in experts]
    ends = [-(-NUM_EXPERTS * spec.expert_nbytes // PAGE) for spec in experts]
    pool = (sum(ends) - sum(begins)) * PAGE if config.host_experts else 0

    def rank_of(rank: int) -> int:
        with DWDPRuntime(config, rank, "cpu", meeting, driver=HostDriver(PAGE)) as runtime:
            for layer, found in enumerate(layers):
                runtime.add_layer(layer, found.weights)
            runtime.publish()
            stats = runtime.stats()
            return stats.resident_bytes + stats.staged_bytes - (pool if rank == 0 else 0)

    return in_threads(rank_of, config.group_size)


def test_a_rank_says_what_it_needs_before_and_how_long_it_took(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_free(monkeypatch, 5_120_000_000)
    config = DWDPConfig(group_size=1, host_experts=3)
    with caplog.at_level(logging.INFO, "vmm_dwdp"):
        load(saved, tmp_path / "group", config, 0, HostDriver(PAGE)).dwdp.close()
    first, second, *_ = [record.getMessage() for record in caplog.records if record.name == "vmm_dwdp"]
    number = r"(\d+\.\d\d) GB"
    said = re.fullmatch(
        f"rank 0 needs {number} for experts \\({number} of its own, {number} in slots\\), "
        f"and 5.12 GB are free on cpu, and {number} of 5.12 GB of host memory",
        first,
    )
    assert said is not None
    assert re.fullmatch(r"rank 0: 0\.00 GB of experts read in \d+\.\d s", second)


class Bar:
    """What draws progress, and what it was told."""

    def __init__(self, **stated: Any) -> None:
        self.stated = stated
        self.updates: list[int] = []

    def update(self, by: int) -> None:
        self.updates.append(by)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None: ...


def test_progress_is_in_bytes_of_own_experts(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    def drawn(*arguments: Any, **stated: Any) -> Bar:
        bars.append(Bar(**stated))
        return bars[-1]

    tqdm = transformers_logging.tqdm
    monkeypatch.setattr(room.transformers_logging, "tqdm", drawn)
    monkeypatch.setattr("transformers.core_model_loading.tqdm", tqdm)
    config = DWDPConfig(group_size=1, host_experts=3)
    load(saved, tmp_path / "group", config, 0, HostDriver(PAGE)).dwdp.close()
    (bar,) = bars
    experts = [p.nbytes for name, p in tiny_model("qwen3_moe").named_parameters() if ".experts." in name]
    assert len(experts) == 6
    assert bar.stated == {"total": sum(experts), "desc": "rank 0: reading experts", "unit": "B", "unit_scale": True}
    assert sum(bar.updates) == sum(experts)
    assert len(bar.updates) == NUM_EXPERTS * len(experts)


class FullDriver(HostDriver):
    """Has no memory for what is mapped after the first ``room`` pages' worth of it."""

    def __init__(self, room: int) -> None:
        super().__init__(PAGE)
        self._room = room

    def create(self, *arguments: Any, **keywords: Any) -> Any:
        if self._room <= 0:
            raise DriverError("memfd_create", "ENOMEM", "take a page")
        self._room -= 1
        return super().create(*arguments, **keywords)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7, 0.5])
def test_what_would_fit_is_said_where_memory_runs_out_and_it_is_true(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    free = int(taken(tmp_path / "first", CONFIG)[0] * share)
    has_free(monkeypatch, free)
    with pytest.raises(DriverError, match="ENOMEM while trying to take a page: rank 0 needs ") as refused:
        load(saved, tmp_path / "second", CONFIG, 0, FullDriver(1))
    said = str(refused.value).partition(" are free on cpu: ")[2]
    assert said.endswith(" would fit")
    alternatives = re.findall(r"((?:\w+: \d+|no num_local_experts)(?: with \w+: \d+)?) \(needs", said)
    assert len(alternatives) == said.count("(needs ") > 0
    for number, words in enumerate(alternatives):
        changes: dict[str, Any] = {"num_local_experts": None} if words[0] in "nh" else {}
        for part in words.split(" with "):
            changes |= yaml.safe_load(part) if ":" in part else {}
        instead = dataclasses.replace(CONFIG, **changes)
        assert taken(tmp_path / f"instead-{number}", instead)[0] <= free, words


def test_as_many_experts_as_fit(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the rank that needs most takes with a number of experts, one byte more or less decides."""
    auto = DWDPConfig(group_size=2, num_local_experts="auto")
    number = NUM_EXPERTS - 1
    most = max(taken(tmp_path / "first", dataclasses.replace(auto, num_local_experts=number)))
    has_free(monkeypatch, 4 * most)
    for spare, expected in ((0, number), (-1, number - 1)):
        place = tmp_path / str(expected)
        config = dataclasses.replace(auto, memory_bytes=most + spare)
        models = in_threads(lambda rank, args=(place, config): load(saved, *args, rank, HostDriver(PAGE)), 2)  # type: ignore[misc]
        for model in models:
            assert len(model.dwdp.local_experts(0)) == model.dwdp.config.num_local_experts == expected
            model.dwdp.close()


def test_where_nothing_fits(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, PAGE)
    with pytest.raises(DriverError, match=r": no config of a group of this size fits$"):
        load(saved, tmp_path / "group", CONFIG, 0, FullDriver(2))


def test_another_failure_says_nothing_of_memory(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"INJECTED while trying to make its use number 3$"):
        load(saved, tmp_path / "group", CONFIG, 0, FaultyDriver("create", 3))


class OnGpu:
    """A runtime that says that its weights are on a GPU."""

    device = torch.device("cuda")

    def __init__(self, runtime: DWDPRuntime) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


@pytest.mark.parametrize("fits", [True, False])
def test_a_gpu_without_room_is_seen_before_any_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    with DWDPRuntime(CONFIG, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        for layer in range(4):
            runtime.add_layer(layer, {"w": WeightSpec((NUM_EXPERTS, PAGE), torch.uint8)})
        needed = PAGE * (4 * 5 + 3 * 2)  # five of its own in four layers, and three slots of two
        has_free(monkeypatch, needed - (not fits))
        if fits:
            room.announce_memory(OnGpu(runtime), NUM_EXPERTS)  # type: ignore[arg-type]
        else:
            with pytest.raises(ConfigError, match=r"are free on cuda: prefetch_depth: 1 \(needs "):
                room.announce_memory(OnGpu(runtime), NUM_EXPERTS)  # type: ignore[arg-type]
        assert runtime.ledger.open() == []


@pytest.mark.parametrize(("at", "least"), [("cpu", 1 << 20)])
def test_some_memory_is_free(at: str, least: int) -> None:
    assert memory_room.free_bytes(torch.device(at)) > least

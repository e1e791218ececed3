"""Where there is no room: what is needed, what is free, and what would fit; and nothing stays allocated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.drivers import SmallDriver
from support.groups import PAGE, add_layers, check_pass, fill_shards, in_threads, join, random_model

from vmm_dwdp import HOST, DriverError, DWDPConfig, DWDPRuntime
from vmm_dwdp.layout.needs import in_gb
from vmm_dwdp.memory import room as memory_room
from vmm_dwdp.memory import sleep as memory_sleep

EXPERTS = 12
MODEL = random_model({number: {"w": ((EXPERTS, 5000), torch.float32)} for number in range(5)})
CONFIG = DWDPConfig(group_size=1, num_local_experts=9, prefetch_depth=3, host_experts=3)


def reports(monkeypatch: pytest.MonkeyPatch, driver: SmallDriver) -> None:
    """What is free is what the driver has."""

    def free(device: torch.device) -> int:
        return driver.room[True]

    monkeypatch.setattr(memory_room, "free_bytes", free)
    monkeypatch.setattr(memory_sleep, "free_bytes", lambda device: driver.room[False])


def needed(config: DWDPConfig, rendezvous: Path) -> int:
    with DWDPRuntime(config, 0, "cpu", rendezvous, driver=SmallDriver(0)) as runtime:
        add_layers(runtime, MODEL)
        return runtime.memory_needed().on_device


@pytest.mark.parametrize("share", [0.99, 0.9, 0.7, 0.4])
def test_publish_says_what_would_fit_and_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    everything = needed(CONFIG, tmp_path)
    has = int(everything * share)
    driver = SmallDriver(has)
    reports(monkeypatch, driver)
    runtime = DWDPRuntime(CONFIG, 0, "cpu", tmp_path, driver=driver)
    add_layers(runtime, MODEL)
    with pytest.raises(DriverError, match=r"^cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY") as raised:
        runtime.publish()
    assert runtime.ledger.open() == []
    assert driver.room[True] == has
    told = str(raised.value)
    assert f": rank 0 needs {in_gb(everything)} for experts (" in told
    fitting = re.findall(r"((?:prefetch_depth|host_experts): \d+(?: with prefetch_depth: 1)?) \(needs ", told)
    assert fitting
    for words in fitting:
        changes = {key: value for part in words.split(" with ") for key, value in yaml.safe_load(part).items()}
        if "host_experts" in changes:
            changes["num_local_experts"] = None
        with join(replace(CONFIG, **changes), 0, tmp_path, MODEL, SmallDriver(has)) as other:
            check_pass(other, MODEL)


def test_a_shard_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SmallDriver(20 * PAGE)
    reports(monkeypatch, driver)
    runtime = DWDPRuntime(CONFIG, 0, "cpu", tmp_path, driver=driver)
    add_layers(runtime, MODEL)
    with pytest.raises(DriverError, match=r"OUT_OF_MEMORY .*: rank 0 needs .*: no config of a group of this size fits"):
        fill_shards(runtime, MODEL)
    assert runtime.ledger.open() == []


def take_pool(runtime: DWDPRuntime) -> None:
    for number in MODEL:
        runtime.local_shard(number, "w", HOST)


def test_a_pool_of_host_memory_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SmallDriver(1 << 40, host_room=60 * PAGE)
    monkeypatch.setattr(memory_room, "free_bytes", lambda device: driver.room[True] if device is driver.device else 0)
    runtime = DWDPRuntime(CONFIG, 0, "cpu", tmp_path, driver=driver)
    add_layers(runtime, MODEL)
    with pytest.raises(DriverError, match=r"on NUMA node 0: .* of host memory: fewer host_experts would fit"):
        take_pool(runtime)
    assert runtime.ledger.open() == []


def test_a_group_that_cannot_wake_sleeps_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has taken the memory meanwhile, of one rank's device; then it is there again."""
    config = DWDPConfig(group_size=2, mode="auto", resident_cache=8 * PAGE)
    drivers = [SmallDriver(1 << 40), SmallDriver(1 << 40)]
    ranks = in_threads(lambda rank: join(config, rank, tmp_path, MODEL, drivers[rank]), 2)
    in_threads(lambda rank: ranks[rank].sleep(timeout=20), 2)
    before = drivers[0].room[True]
    reports(monkeypatch, drivers[0])
    for share in (0.1, 0.9, 1.0):  # of shards and slots; the cache comes last
        needs = ranks[0].memory_needed().on_device
        drivers[0].room[True] = int(needs * share)
        with pytest.raises(Exception, match="CUDA_ERROR_OUT_OF_MEMORY") as raised:
            ranks[0].wake(timeout=20)
        if share < 1:
            assert f": rank 0 needs {in_gb(needs)} for experts (" in str(raised.value)
        else:
            assert "a resident_cache of 32768 bytes does not fit" in str(raised.value)
        assert ranks[0].asleep
        assert ranks[0].ledger.counts()["mappings"] == 0
        assert drivers[0].room[True] == int(needs * share), "it has given back what it had taken"
    drivers[0].room[True] = before
    in_threads(lambda rank: ranks[rank].wake(timeout=20), 2)
    for runtime in ranks:
        for mode in ("staged", "in_place"):
            check_pass(runtime, MODEL, mode=mode, tokens=3)  # type: ignore[arg-type]
        assert runtime.close().open() == []


def test_a_group_that_cannot_be_kept_stays_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SmallDriver(1 << 40, host_room=100 * PAGE)
    reports(monkeypatch, driver)
    with join(DWDPConfig(group_size=1), 0, tmp_path, MODEL, driver) as runtime:
        with pytest.raises(DriverError, match=r"takes .* of host memory: .* free, and sleep\(keep=False\) takes none"):
            runtime.sleep()
        assert not runtime.asleep
        assert driver.room[False] == 100 * PAGE
        check_pass(runtime, MODEL)
        runtime.check_integrity()
        driver.room[False] = 1 << 40
        runtime.sleep()
        runtime.wake()
        check_pass(runtime, MODEL)
    assert runtime.ledger.open() == []

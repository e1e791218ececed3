"""A failure at every use of every driver call, from set-up to close: named, undone, and a retry works."""

from __future__ import annotations

import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.banks import check_looked_up
from support.faults import DOING, UNDOING, FaultyCudaDriver, FaultyDriver
from support.groups import PAGE, Model, add_layers, check_pass, fill_shards, random_model

from vmm_dwdp import DriverError, DWDPConfig, DWDPError, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger


def _model(scale: int) -> Model:
    return random_model({number: {"w": ((5, scale * (1500 + 400 * number)), torch.float32)} for number in range(3)})


MODELS = {"cpu": _model(1), "cuda": _model(128)}  # experts of one to three pages of 4 KiB; two or three in one of 2 MiB
DRIVERS = {"cpu": FaultyDriver, "cuda": FaultyCudaDriver}
SCENARIOS = {
    "host": DWDPConfig(group_size=1, host_experts=3, mode="in_place"),
    "cache": DWDPConfig(group_size=1, host_experts=3, mode="in_place", prefetch_depth=1, resident_cache=4 * PAGE),
    "bank": DWDPConfig(group_size=1, host_experts=3, mode="in_place", prefetch_depth=1, expert_bank=12 * PAGE),
    "pair": DWDPConfig(group_size=2, host_experts=2, slice_bytes=64),  # two other owners, whose slices a thread gives
    "list": DWDPConfig(group_size=2, assembly="tensor_list"),
}
CASES = [
    *(("cpu", scenario) for scenario in SCENARIOS),
    # Legacy CUDA IPC opens no allocation in the process that made it, and here both ranks are threads of one.
    *(pytest.param("cuda", scenario, marks=pytest.mark.gpu) for scenario in ("host", "cache", "bank", "pair")),
]


def _config(device: str, scenario: str) -> DWDPConfig:
    """A cache or a bank of a few pages on either."""
    config = SCENARIOS[scenario]
    if device == "cuda" and config.resident_cache:
        return replace(config, resident_cache=4 << 20)
    return replace(config, expert_bank=12 << 20) if device == "cuda" and config.expert_bank else config


def _life(config: DWDPConfig, rank: int, rendezvous: str, driver: Driver, timeout: float) -> Ledger:
    """Everything that a rank does, and its ledger at the end, however it ended."""
    model = MODELS[driver.device.type]
    try:
        runtime = DWDPRuntime(config, rank, driver.device, rendezvous, driver=driver)
    except DWDPError as error:
        error.ledger = Ledger()  # type: ignore[attr-defined]  # no runtime, nothing to be counted
        raise
    try:
        add_layers(runtime, model)
        fill_shards(runtime, model)
        runtime.publish(timeout)
        check_pass(runtime, model)
        check_pass(runtime, model, [2, 0], "staged")
        if config.resident_cache:
            for favourite in (4, 2):
                _refresh(runtime, favourite)
        if config.expert_bank:
            check_looked_up(runtime, model, 2, 3)
            check_looked_up(runtime, model, 4, 2)
        runtime.close()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # tensors that the loader held would keep their memory
        with suppress(DWDPError):
            runtime.close()
        error.ledger = runtime.ledger  # type: ignore[attr-defined]
        raise
    return runtime.ledger


def _refresh(runtime: DWDPRuntime, favourite: int) -> None:
    """After many tokens that all use one expert, of which every layer has more than the cache can hold."""
    chosen = torch.full((100, 1), favourite, device=runtime.device)
    for number in runtime.stats().layers:
        runtime.acquire(number, chosen=chosen)
        runtime.release(number)
    runtime.refresh_cache()


def _lives(config: DWDPConfig, driver: Driver) -> Ledger:
    """A group whose rank 0 has ``driver``; the other rank, if there is one, comes once rank 0 listens.

    What rank 0 raises has the other's error as a note: where that was refused first, its memory may be gone for rank 0.
    """
    with tempfile.TemporaryDirectory() as rendezvous, ThreadPoolExecutor(1) as pool:
        first = pool.submit(_life, config, 0, rendezvous, driver, 20)
        if config.group_size == 1:
            return first.result()
        while not first.done() and not Path(rendezvous, "rank-0").exists():
            wait([first], timeout=0.005)
        refused = ""
        if not first.done():
            try:
                other = _life(config, 1, rendezvous, DRIVERS[driver.device.type](), 10)
            except (DriverError, ExchangeError) as error:  # it cannot go on without rank 0, or its memory is gone
                other, refused = error.ledger, str(error)  # type: ignore[attr-defined]
            assert other.open() == []
        try:
            return first.result()
        except DWDPError as error:
            error.add_note(refused)
            raise


def _uses(device: str, scenario: str) -> dict[str, int]:
    driver = DRIVERS[device]()
    assert _lives(_config(device, scenario), driver).open() == []
    return dict(driver.uses)


@pytest.mark.parametrize(("device", "scenario"), CASES)
def test_a_failing_call_is_named_and_everything_is_undone(device: str, scenario: str) -> None:
    uses = _uses(device, scenario)
    for call in DOING:
        for at in range(1, uses.get(call, 0) + 1):
            driver = DRIVERS[device](call, at)
            try:
                ledger = _lives(_config(device, scenario), driver)
            except DWDPError as error:
                ledger = error.ledger  # type: ignore[attr-defined]
                told = "\n".join([str(error), *getattr(error, "__notes__", ())])
                assert f"{call} failed with INJECTED" in told
            else:
                assert call in ("wait", "copy", "record"), "only a fetch may fail unnoticed, of a layer nobody acquires"
            assert ledger.open() == [], f"{call} number {at}"


@pytest.mark.parametrize("scenario", ["pair", "list"])
def test_another_rank_whose_memory_cannot_be_used_is_named(scenario: str) -> None:
    """As between GPUs that cannot reach each other: the driver refuses what it imported, and names addresses only."""
    call = {"pair": "set_access", "list": "open_allocation"}[scenario]
    first = {"pair": 2 * len(MODELS["cpu"]) + 1, "list": 1}[scenario]  # after the shards of rank 0 and of the host
    sentence = f"{call} failed with INJECTED while trying to use the memory of rank 1 on cpu: make its use number"
    with pytest.raises(DriverError, match=sentence):
        _lives(SCENARIOS[scenario], FaultyDriver(call, first))


@pytest.mark.parametrize(("device", "scenario"), CASES)
def test_a_failing_undo_leaves_what_a_second_close_can_finish(device: str, scenario: str) -> None:
    uses = _uses(device, scenario)
    for call in UNDOING:
        for at in range(1, uses.get(call, 0) + 1):
            driver = DRIVERS[device](call, at)
            try:
                ledger = _lives(_config(device, scenario), driver)
            except DriverError as error:  # or none, where the call is tried again at once
                ledger = error.ledger  # type: ignore[attr-defined]
            assert ledger.open() == [], f"{call} number {at}"


REFRESH_CALLS = ("prepare", "copy", "synchronize", "unmap", "map", "set_access")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _published(device: str, driver: Driver, rendezvous: Path) -> DWDPRuntime:
    runtime = DWDPRuntime(_config(device, "cache"), 0, driver.device, rendezvous, driver=driver)
    add_layers(runtime, MODELS[device])
    fill_shards(runtime, MODELS[device])
    runtime.publish()
    return runtime


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", REFRESH_CALLS)
def test_a_refresh_that_fails_leaves_every_byte_where_it_was(call: str, device: str, tmp_path: Path) -> None:
    """At every use of the call while a full cache turns from one expert to another."""
    at, failed = 1, True
    while failed:
        driver = DRIVERS[device]()
        runtime = _published(device, driver, tmp_path / f"{at}")
        _refresh(runtime, 4)
        driver.fail(call, at)
        try:
            _refresh(runtime, 2)
        except DriverError as error:
            told = str(error)
            assert f"{call} failed with INJECTED" in told
            at += 1
        else:
            failed = False
        driver.fail("", 0)
        check_pass(runtime, MODELS[device])
        runtime.check_integrity()
        _refresh(runtime, 2)
        check_pass(runtime, MODELS[device])
        runtime.check_integrity()
        cache = runtime.stats().cache
        assert cache is not None
        assert cache.used_bytes == cache.nbytes
        assert runtime.close().open() == []
    assert at > 1, "the call was never made"


@pytest.mark.parametrize("device", DEVICES)
def test_a_refresh_that_cannot_be_undone_bars_passes_in_place_until_the_next(device: str, tmp_path: Path) -> None:
    driver = DRIVERS[device]()
    runtime = _published(device, driver, tmp_path / "rendezvous")
    driver.fail("map", 1, times=2)
    with pytest.raises(DriverError, match="INJECTED") as raised:
        _refresh(runtime, 4)
    assert "and then: map failed with INJECTED" in raised.value.__notes__[0]
    with pytest.raises(StateError, match=r"pages of layer \d, w, in place are missing or old.*call refresh_cache"):
        runtime.acquire(0)
    check_pass(runtime, MODELS[device], mode="staged")
    runtime.refresh_cache()
    check_pass(runtime, MODELS[device])
    runtime.check_integrity()
    assert runtime.close().open() == []

"""A failure at every use of every driver call, from set-up to close: named, undone, and a retry works."""

from __future__ import annotations

import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from support.faults import DOING, UNDOING, FaultyDriver
from support.groups import add_layers, check_pass, fill_shards, random_model

from vmm_dwdp import DriverError, DWDPConfig, DWDPError, DWDPRuntime
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger

MODEL = random_model({number: {"w": ((5, 1500 + 400 * number), torch.float32)} for number in range(3)})
SCENARIOS = {
    "host": DWDPConfig(group_size=1, host_experts=3, mode="in_place"),
    "pair": DWDPConfig(group_size=2, slice_bytes=64),
    "list": DWDPConfig(group_size=2, assembly="tensor_list"),
}


def _life(config: DWDPConfig, rank: int, rendezvous: str, driver: Driver, timeout: float) -> Ledger:
    """Everything that a rank does, and its ledger at the end, however it ended."""
    driver.activate()
    try:
        runtime = DWDPRuntime(config, rank, "cpu", rendezvous, driver=driver)
    except DWDPError as error:
        error.ledger = Ledger()  # type: ignore[attr-defined]  # no runtime, nothing to be counted
        raise
    try:
        add_layers(runtime, MODEL)
        fill_shards(runtime, MODEL)
        runtime.publish(timeout)
        check_pass(runtime, MODEL)
        check_pass(runtime, MODEL, [2, 0], "staged")
        runtime.close()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # tensors that the loader held would keep their memory
        with suppress(DWDPError):
            runtime.close()
        error.ledger = runtime.ledger  # type: ignore[attr-defined]
        raise
    return runtime.ledger


def _lives(config: DWDPConfig, driver: Driver, timeout: float) -> Ledger:
    """A group whose rank 0 has ``driver``; the other rank, if there is one, may fail with it."""
    with tempfile.TemporaryDirectory() as rendezvous, ThreadPoolExecutor(1) as pool:
        others = [
            pool.submit(_life, config, rank, rendezvous, FaultyDriver(), timeout)
            for rank in range(1, config.group_size)
        ]
        try:
            return _life(config, 0, rendezvous, driver, timeout)
        except DWDPError as error:
            for failure in filter(None, (other.exception() for other in others)):
                error.add_note(f"the other rank: {failure}")  # that is where a failing export is told
                assert failure.ledger.open() == []  # type: ignore[attr-defined]
            raise


def _uses(config: DWDPConfig) -> dict[str, int]:
    driver = FaultyDriver()
    assert _lives(config, driver, timeout=20).open() == []
    return dict(driver.uses)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failing_call_is_named_and_everything_is_undone(scenario: str) -> None:
    uses = _uses(SCENARIOS[scenario])
    for call in DOING:
        for at in range(1, uses.get(call, 0) + 1):
            driver = FaultyDriver(call, at)
            try:
                ledger = _lives(SCENARIOS[scenario], driver, timeout=0.2)
            except DWDPError as error:
                ledger = error.ledger  # type: ignore[attr-defined]
                told = [str(error), *getattr(error, "__notes__", ())]
                assert any(f"{call} failed with INJECTED" in line for line in told), told
            else:
                assert call in ("wait", "copy", "record"), "only a fetch may fail unnoticed, of a layer nobody acquires"
            assert ledger.open() == [], f"{call} number {at}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failing_undo_leaves_what_a_second_close_can_finish(scenario: str) -> None:
    uses = _uses(SCENARIOS[scenario])
    for call in UNDOING:
        for at in range(1, uses.get(call, 0) + 1):
            driver = FaultyDriver(call, at)
            try:
                ledger = _lives(SCENARIOS[scenario], driver, timeout=20)
            except DriverError as error:  # or none, where the call is tried again at once
                ledger = error.ledger  # type: ignore[attr-defined]
            assert ledger.open() == [], f"{call} number {at}"

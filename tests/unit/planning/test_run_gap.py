"""What a gap between runs costs, and that measuring it leaves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from support.drivers import NativeDriver, Refusal
from support.groups import PAGE

from vmm_dwdp.allocator.driver import Lane
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import DriverError
from vmm_dwdp.planning import run_gap
from vmm_dwdp.planning.run_gap import LOST, RUNS, measure_gap, shortest_run

DRIVERS: dict[str, Callable[[], Any]] = {"native": NativeDriver, "twin": lambda: HostDriver(PAGE)}


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_gap, "OF_OWNER", 8 * PAGE)


@pytest.mark.parametrize(("gap", "rate"), [(6.4e-6, 390e9), (50e-6, 54e9), (0.0, 390e9)])
def test_a_run_from_which_a_gap_costs_little(gap: float, rate: float) -> None:
    nbytes = shortest_run(gap, rate)

    assert nbytes == pytest.approx(gap / LOST * rate, abs=1)
    assert gap <= LOST * (nbytes + 1) / rate


@pytest.mark.usefixtures("open_descriptors")
@pytest.mark.parametrize("driver", DRIVERS)
def test_each_run_more_is_counted_once(driver: str) -> None:
    """Copies in 2 and in 16 runs take 5 and 12 seconds: half a second for each more."""
    made, ledger, given = DRIVERS[driver](), Ledger(), []

    def took(driver: object, issuer: object, other: object, lanes: list[Lane]) -> float:
        given.append([len(lane.runs) for lane in lanes])
        return 5.0 if len(lanes[0].runs) == 1 else 12.0

    with patch.object(run_gap, "_seconds", took), patch.object(run_gap, "Ledger", lambda: ledger), made.current():
        assert measure_gap(made) == 7.0 / 14
    assert given == [[1, 1], [RUNS, RUNS]]
    assert ledger.open() == []


@pytest.mark.usefixtures("open_descriptors")
@pytest.mark.parametrize("driver", DRIVERS)
def test_measured_with_either_thread_and_all_is_given_back(driver: str) -> None:
    made, ledger = DRIVERS[driver](), Ledger()

    with patch.object(run_gap, "Ledger", lambda: ledger), made.current():
        gap = measure_gap(made)

    assert 0.0 <= gap < math.inf
    assert ledger.open() == []


@pytest.mark.usefixtures("open_descriptors")
def test_a_copy_that_is_refused_leaves_nothing() -> None:
    made, ledger = NativeDriver(), Ledger()

    with (
        patch.object(run_gap, "Ledger", lambda: ledger),
        made.current(),
        Refusal(made, 9),
        pytest.raises(DriverError, match="INJECTED"),
    ):
        measure_gap(made)
    assert ledger.open() == []

"""How kernels are compared in benchmarks: two in turns, on a GPU made up here whose time passes as it is told."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import grouped_gemm
import in_turns

from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.testing import random_operands

T = TypeVar("T")


class Gpu:
    """Its clock begins fast, slows down and wobbles; what it runs is called by name."""

    def __init__(self, wobble: float = 0.0) -> None:
        self.now = 0.0  # milliseconds
        self.wobble = wobble
        self.ran: list[str] = []
        self.issued_behind: list[int] = []  # how many runs were issued already when each one was waited for
        self.random = random.Random(0)

    def taking(self, milliseconds: float, function: Callable[[], T], name: str = "") -> Callable[[], T]:
        """``function``, which takes as long, when the clock is fastest."""

        def run() -> T:
            self.ran.append(name)
            slow = 1.3 - 0.3 * math.exp(-self.now / 50) + 0.1 * math.sin(self.now / 700)
            self.now += milliseconds * slow * self.random.gauss(1, self.wobble)
            return function()

        return run

    def kernel(self, name: str, milliseconds: float) -> Callable[[], None]:
        return self.taking(milliseconds, lambda: None, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, self.before = made.now, len(made.ran)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

        def synchronize(self) -> None:
            made.issued_behind.append(len(made.ran) - self.before)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: None)
    monkeypatch.setattr(in_turns, "time", SimpleNamespace(perf_counter=lambda: made.now / 1e3))
    return made


@pytest.mark.parametrize("milliseconds", [0.2, 3, 25])
@pytest.mark.parametrize("ratio", [1, 0.98, 2.5])
def test_the_ratio_is_found_while_the_clock_drifts(gpu: Gpu, milliseconds: float, ratio: float) -> None:
    gpu.wobble = 0.005
    turns = in_turns.in_turns(
        gpu.kernel("method", milliseconds / ratio), gpu.kernel("other", milliseconds), seconds=60, precision=0.002
    )
    least, most = in_turns.interval(turns.ratios)

    assert (most - least) / 2 <= 0.0025
    assert sorted(turns.ratios)[len(turns.ratios) // 2] == pytest.approx(ratio, rel=0.004)
    assert gpu.ran[:2] == ["other", "method"]
    assert gpu.ran[2:] == ["other", "method", "method", "other"] * (len(gpu.ran) // 4)
    assert len(turns.other) == len(turns.method) == len(turns.ratios)
    (ahead,) = set(gpu.issued_behind)
    assert ahead >= 4  # runs, of 20 ms when the clock was fastest
    assert ahead * milliseconds * (1 + 1 / ratio) / 2 > 15


def test_as_many_pairs_as_needed_but_no_longer_than_asked(gpu: Gpu) -> None:
    pairs = {}
    for gpu.wobble in (0.0, 0.002, 0.02):
        begin = gpu.now
        turns = in_turns.in_turns(gpu.kernel("method", 10), gpu.kernel("other", 10), seconds=2, precision=0.002)
        pairs[gpu.wobble] = len(turns.ratios)
        assert gpu.now - begin < 1e3 * (2 + 5 * 4 * 10 * 1.5 / 1e3)  # and a few rounds
    assert pairs[0.0] <= pairs[0.002] <= 20 < pairs[0.02]


@pytest.mark.parametrize("count", range(8, 120))
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    least, most = in_turns.interval(range(count))
    inside = sum(math.comb(count, below) for below in range(int(least) + 1, int(most) + 1)) / 2**count

    assert least + most == count - 1
    assert 0.92 < inside < 0.985


def test_there_are_always_enough_ratios_for_an_interval(gpu: Gpu) -> None:
    seen = in_turns.in_turns(gpu.kernel("method", 300), gpu.kernel("other", 300), seconds=0, precision=0)

    assert len(seen.ratios) == 10


@pytest.mark.parametrize("form", [Format.PLAIN, Format.NVFP4])
def test_all_methods_of_a_case(gpu: Gpu, form: Format) -> None:
    operands = random_operands(form, num_rows=70, experts=[6], n=24, k=64)
    with grouped_gemm.assembled(operands.weights[0]) as copy:
        found = grouped_gemm.methods(operands, copy, ["torch", "deep-gemm"], [1, 2, 4, 8])
        found = {name: method._replace(run=gpu.taking(1, method.run)) for name, method in found.items()}
        rows = {str(row["method"]): row for row in grouped_gemm.compare(operands, found, 0.05)}

    lists = {f"list of {count} (torch)": "list of 1 (torch)" for count in (2, 4)}
    if form is Format.PLAIN:
        expected = {"torch": "-", "torch, assembled": "torch", "torch, again": "torch", "list of 1 (torch)": "torch"}
        expected |= lists | {"merge 4 + torch": "list of 4 (torch)"}
    else:
        expected = {"list of 1 (torch)": "-"} | lists
    assert {name: row["compared with"] for name, row in rows.items()} == expected
    assert [row["same bits"] for row in rows.values() if row["same bits"] != "-"].count(False) == 0
    for row in rows.values():
        assert row["error"] < 5e-3
        assert row["ms"] == pytest.approx(1.3, abs=0.15)
        if row["compared with"] != "-":
            assert row["from"] <= row["ratio"] <= row["to"]
            assert row["ratio"] == pytest.approx(1, abs=0.003)


def test_a_method_that_is_compared_with_none_is_timed_too(gpu: Gpu) -> None:
    operands = random_operands(Format.MXFP4, num_rows=20, experts=[2], n=16, k=64)
    found = {"alone": grouped_gemm.Method(gpu.taking(2, lambda: operands.x[:, :16]))}
    (row,) = grouped_gemm.compare(operands, found, 0.5)

    assert row["ms"] == pytest.approx(2.6, abs=0.3)

"""Waits for other nodes: added up by layer, traced and advised of under their own name, and none of compute's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, join, random_model

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.observe.guard import PASSES
from vmm_dwdp.observe.trace import COMPUTE, NODES, WAITING

LAYERS = (3, 5, 8)
MODEL = random_model({number: {"w": ((4, 1000), torch.float32)} for number in LAYERS})


class Clock(HostDriver):
    """Events have the time that the test sets."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.now = 0.0
        self.times: dict[int, float] = {}

    def record(self, event: int, stream: int, *, external: bool = False) -> None:
        super().record(event, stream, external=external)
        self.times[event] = self.now

    def elapsed(self, start: int, end: int) -> float:
        return self.times[end] - self.times[start]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runtime(tmp_path: Path, clock: Clock) -> Iterator[DWDPRuntime]:
    runtime = join(DWDPConfig(group_size=1, host_experts=2), 0, tmp_path / "group", MODEL, clock)
    yield runtime
    assert runtime.close().open() == []


def run_pass(
    runtime: DWDPRuntime, clock: Clock, waits: float, computes: float, layers: tuple[int, ...] = LAYERS
) -> None:
    for number in layers:
        for _ in range(2):
            with runtime.exchange(number):
                clock.now += waits
            clock.now += computes


def test_waits_are_added_up_by_layer(runtime: DWDPRuntime, clock: Clock) -> None:
    run_pass(runtime, clock, 0.5, 2.0)
    run_pass(runtime, clock, 0.25, 2.0, LAYERS[:1])
    stats = runtime.stats()
    assert {number: layer.node_wait_s for number, layer in stats.layers.items()} == {3: 1.5, 5: 1.0, 8: 1.0}
    assert stats.node_wait_s == 3.5


def test_events_are_used_again(runtime: DWDPRuntime, clock: Clock) -> None:
    run_pass(runtime, clock, 0.5, 2.0)
    before = runtime.ledger.counts()["events"]
    for _ in range(20):
        run_pass(runtime, clock, 0.5, 2.0)
    assert runtime.ledger.counts()["events"] <= before + 4


def test_what_is_said_of_passes_that_other_nodes_hold_up(
    runtime: DWDPRuntime, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(PASSES - 1):
        run_pass(runtime, clock, 0.5, 0.5)
    run_pass(runtime, clock, 0.1, 0.9)  # not in a row
    for _ in range(PASSES):
        run_pass(runtime, clock, 0.5, 0.5)
    assert runtime.stats().node_advice is None, "the latest pass may go on"
    for _ in range(3):
        run_pass(runtime, clock, 0.5, 0.5)
    advice = runtime.stats().node_advice
    assert advice is not None
    assert advice.startswith(
        "passes are held up by other nodes: of 5.5e+03 ms, 55% are exchanges with this rank's rail"
    )
    assert [record.message for record in caplog.records] == [advice]


def test_of_a_pass_that_ends_early_nothing_is_said(runtime: DWDPRuntime, clock: Clock) -> None:
    for _ in range(3 * PASSES):
        run_pass(runtime, clock, 0.5, 0.5, LAYERS[:2])
    assert runtime.stats().node_advice is None


def test_of_passes_that_copies_hold_up_it_is_said_what_is_not_compute(runtime: DWDPRuntime, clock: Clock) -> None:
    for _ in range(2):
        run_pass(runtime, clock, 0.5, 2.0)
    stats = runtime.stats()
    assert stats.advice is None
    told = runtime._exchanges.added_to(replace(stats, advice="compute takes 9 ms")).advice
    assert told == "compute takes 9 ms; of what is called compute, 3e+03 ms are exchanges with other nodes"


def test_an_exchange_that_fails_is_not_timed(runtime: DWDPRuntime, clock: Clock) -> None:
    def failing() -> None:
        clock.now += 5.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), runtime.exchange(3):
        failing()
    with runtime.exchange(3):
        clock.now += 1.0
    assert runtime.stats().node_wait_s == 1.0


def test_a_trace_names_them(runtime: DWDPRuntime, clock: Clock) -> None:
    with runtime.trace() as trace:
        for number in LAYERS[:2]:
            with runtime.exchange(number):
                clock.now += 1.0
            clock.now += 0.25  # between the tokens' arrival and the layer's
            with runtime.layer(number):
                clock.now += 3.0
            with runtime.exchange(number):
                clock.now += 0.5
            clock.now += 2.0
    runtime.reset()
    spans = [(span.track, span.layer, span.seconds) for span in trace.spans if "copies from" not in span.track]
    assert [span for span in spans if span[0] != WAITING] == [
        (NODES, 3, 1.0),
        (COMPUTE, None, 0.25),
        (COMPUTE, 3, 3.0),
        (COMPUTE, None, 0.0),
        (NODES, 3, 0.5),
        (COMPUTE, None, 2.0),
        (NODES, 5, 1.0),
        (COMPUTE, None, 0.25),
        (COMPUTE, 5, 3.0),
        (COMPUTE, None, 0.0),
        (NODES, 5, 0.5),
    ]


def test_at_the_wrong_moment(runtime: DWDPRuntime, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no layer 4"), runtime.exchange(4):
        pytest.fail("it was not refused")
    other = DWDPRuntime(DWDPConfig(group_size=1), 0, "cpu", tmp_path / "other", driver=HostDriver(PAGE))
    with other, pytest.raises(StateError, match="not published yet"), other.exchange(3):
        pytest.fail("it was not refused")

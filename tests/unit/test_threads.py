"""Several threads on one runtime: each acquire is right or refused by a sentence, and `stats` may come at any time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from support.groups import PAGE, join, random_model, same_bytes

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.observe.metrics import StatsCollector

MODEL = random_model({number: {"w": ((6, 1100), torch.float32)} for number in range(5)})
PASSES = 100


@pytest.fixture(autouse=True)
def _threads_turn_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("mode", ["staged", "in_place", "auto"])
def test_three_threads_in_passes_of_one_runtime(tmp_path: Path, mode: str) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=4, mode=mode), 0, tmp_path / "rendezvous", MODEL)  # type: ignore[arg-type]
    wrong: list[str] = []
    right = [0, 0, 0]

    def passes(thread: int) -> None:
        for _ in range(PASSES):
            for number in MODEL:
                try:
                    with runtime.layer(number, tokens=5) as weights:
                        found = weights["w"]
                        assert isinstance(found, torch.Tensor)
                        if same_bytes(found, MODEL[number]["w"]):
                            right[thread] += 1
                        else:
                            wrong.append(f"thread {thread} has other bytes of layer {number}")
                        del weights, found
                except StateError:
                    continue
                except BaseException as error:
                    wrong.append(f"thread {thread}, layer {number}: {error!r}")

    threads = [threading.Thread(target=passes, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {sum(right) + len(wrong)}: {wrong[:5]}"
    assert sum(right) >= len(MODEL)
    runtime.reset()
    for number, weights in MODEL.items():
        with runtime.layer(number, tokens=5) as found:
            assert isinstance(found["w"], torch.Tensor)
            assert same_bytes(found["w"], weights["w"])
    runtime.check_integrity()
    del found
    assert runtime.close().open() == []


@pytest.mark.parametrize("passes", [1, 5])
def test_stats_after_close_are_the_latest(tmp_path: Path, passes: int) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=4), 0, tmp_path / "rendezvous", MODEL)
    for number in [*MODEL] * passes:
        with runtime.layer(number):
            pass
    assert runtime.close().open() == []
    stats = runtime.stats()
    assert stats.hits + stats.misses == passes * len(MODEL)


def test_stats_and_metrics_at_any_moment(tmp_path: Path) -> None:
    """In passes, in `close` and after it."""
    registry = CollectorRegistry()
    wrong: list[BaseException] = []
    rounds = 0
    over = threading.Event()
    runtime = join(DWDPConfig(group_size=1, host_experts=4), 0, tmp_path / "rendezvous", MODEL)
    collector = StatsCollector(0)
    registry.register(collector)

    def look() -> None:
        nonlocal rounds
        while not over.is_set():
            try:
                for _ in range(50):
                    collector.observe(runtime.stats())
                generate_latest(registry)
                rounds += 1
            except BaseException as error:
                wrong.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(300):
        for number in MODEL:
            with runtime.layer(number):
                pass
    assert runtime.close().open() == []
    after = rounds
    while rounds < after + 10 and not wrong:
        runtime.stats()
    over.set()
    watcher.join()
    assert not wrong, f"{len(wrong)}: {wrong[0]!r}"
    stats = runtime.stats()
    assert stats.hits + stats.misses == 300 * len(MODEL)


def _passes(runtime: DWDPRuntime) -> None:
    for number in [3, 0, 4, 1, 2]:
        runtime.acquire(number, tokens=5)
        runtime.release(number)


def _refresh(runtime: DWDPRuntime) -> None:
    for number in MODEL:
        runtime.acquire(number, mode="in_place", chosen=torch.tensor([[number], [5]]))
        runtime.release(number)
    runtime.refresh_cache()


def _sleep(runtime: DWDPRuntime) -> None:
    runtime.sleep()
    runtime.wake()


def _verify(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    runtime.release(0)
    runtime.check_integrity(verify=True)


HOST = DWDPConfig(group_size=1, host_experts=4)
CALLS: dict[str, tuple[DWDPConfig, Callable[[DWDPRuntime], None]]] = {
    "passes": (HOST, _passes),
    "passes in slices": (replace(HOST, slice_bytes=64), _passes),
    "passes in place": (replace(HOST, mode="in_place"), _passes),
    "refresh_cache": (replace(HOST, mode="auto", resident_cache=8 * PAGE), _refresh),
    "sleep and wake": (HOST, _sleep),
    "check_integrity": (replace(HOST, checksums=True), _verify),
    "update": (
        DWDPConfig(group_size=1),
        lambda runtime: runtime.update({(number, "w", 0): MODEL[number]["w"] for number in MODEL}, timeout=20),
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_close_in_the_middle_of_another_threads_calls(what: str, tmp_path: Path) -> None:
    """Which end with a sentence that says so: nothing is read from memory that is gone."""
    config, call = CALLS[what]
    told: list[BaseException] = []

    def go_on(runtime: DWDPRuntime, begun: threading.Event) -> None:
        try:
            while True:
                call(runtime)
                begun.set()
        except BaseException as error:
            told.append(error)
            begun.set()

    for attempt in range(20):
        runtime = join(config, 0, tmp_path / f"rendezvous {attempt}", MODEL)
        begun = threading.Event()
        other = threading.Thread(target=go_on, args=(runtime, begun))
        other.start()
        assert begun.wait(20)
        for _ in range(attempt * 100):  # elsewhere each time
            pass
        runtime.close()
        other.join(20)
        assert not other.is_alive()
        assert runtime.close().open() == []
    others = [error for error in told if not isinstance(error, StateError) or "closed" not in str(error)]
    assert not others, f"{len(others)}: {others[0]!r}"

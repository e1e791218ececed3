"""Passes inside a graph, without a GPU: every order of eager passes and replays, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.explorer import COMPUTE, Op, Program, RecordingDriver, RecordingIssuer, explore, rotating, without_timing
from support.groups import PAGE, check_pass, join, random_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import StateError
from vmm_dwdp.schedule.capture import CapturedPasses
from vmm_dwdp.schedule.issue import InlineIssuer
from vmm_dwdp.schedule.layer import StagedLayer
from vmm_dwdp.schedule.staging import Staging


class Rig:
    """Staged layers and their captured passes over a driver that writes down what they ask for."""

    def __init__(
        self,
        num_layers: int,
        depth: int,
        *,
        thread: bool = True,
        num_streams: int = 1,
        staging: type[Staging] = Staging,
        captured: type[CapturedPasses] = CapturedPasses,
    ) -> None:
        self.program = Program(num_layers, min(depth, num_layers), num_streams)
        self.driver = driver = RecordingDriver(self.program)
        fetches = rotating(num_layers, depth, num_streams)
        issuer = RecordingIssuer(driver) if thread else InlineIssuer()
        self.staging = staging(driver, Ledger(), issuer, fetches, depth)  # type: ignore[arg-type]
        self.captured = captured(driver, Ledger(), self.staging, fetches)  # type: ignore[arg-type]
        self.layers = self.staging.layers

    def eager(self) -> None:
        for layer in self.layers:
            self.run(layer)

    def run(self, layer: StagedLayer) -> None:
        layer.acquire(COMPUTE)
        self.driver.kernel(layer.place)
        layer.release(COMPUTE)

    def begin(self) -> int:
        """Everything is captured from here until `end`; the number of the capture."""
        self.program.graphs.append([])
        self.driver.writing = self.program.graphs[-1]
        return self.driver.capture(COMPUTE)

    def end(self) -> None:
        self.driver.writing = self.program.launcher

    def capture(self) -> int:
        """A whole pass; the graph's index, for `replay`."""
        number = self.begin()
        for layer in self.layers:
            self.captured.acquire(number, layer, COMPUTE)
            self.driver.kernel(layer.place)
            self.captured.release(number, layer, COMPUTE)
        self.end()
        return number - 1

    def replay(self, graph: int) -> None:
        self.program.launcher.append(Op("replay", graph))

    def violation(self) -> str | None:
        self.program.launcher = without_timing(self.program)
        return explore(self.program).violation


def alternate(rig: Rig) -> None:
    rig.eager()
    first = rig.capture()
    rig.replay(first)
    rig.replay(first)
    rig.eager()
    second = rig.capture()
    rig.replay(second)
    rig.replay(first)


def eager_after_replay(rig: Rig) -> None:
    graph = rig.capture()
    rig.eager()
    rig.replay(graph)
    rig.eager()


def a_miss_after_replay(rig: Rig) -> None:
    graph = rig.capture()
    rig.replay(graph)
    last = rig.layers[-1]
    rig.run(last)
    rig.staging.reset(COMPUTE)
    rig.replay(graph)


def abandoned_capture(rig: Rig) -> None:
    """An exception in the model, inside a capture: the graph is never made, and nothing has happened."""
    number = rig.begin()
    rig.captured.acquire(number, rig.layers[0], COMPUTE)
    rig.captured.release(number, rig.layers[0], COMPUTE)
    rig.captured.acquire(number, rig.layers[1], COMPUTE)
    rig.end()
    rig.program.graphs[-1].clear()
    rig.eager()
    rig.replay(rig.capture())


@pytest.mark.parametrize("thread", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize(("num_layers", "depth"), [(2, 1), (3, 2), (4, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("launch", [alternate, eager_after_replay, a_miss_after_replay, abandoned_capture])
def test_passes_and_replays_in_every_order(
    launch: Callable[[Rig], None], num_layers: int, depth: int, thread: bool
) -> None:
    rig = Rig(num_layers, depth, thread=thread)
    launch(rig)
    assert rig.violation() is None


def test_replays_with_two_copy_streams_in_every_order() -> None:
    rig = Rig(3, 2, thread=False, num_streams=2)
    eager_after_replay(rig)
    assert rig.violation() is None


class _EndsBeforeItsCopiesAreIssued(Staging):
    """Leaves the copies of the first layers to the issuing thread when a pass ends, although there is a graph."""

    def settle(self) -> None:
        super().settle()
        self.pipeline.prompt = False


class _NeverJoins(CapturedPasses):
    """Says that the first layers are in their slots without waiting for their copies."""

    def _join(self, stream: int) -> None:
        for first in self._staging.layers[: len(self._slots)]:
            for ready in first.ready:
                self._driver.record(ready.event, stream, external=True)


class _OnlyItsOwnEvents(CapturedPasses):
    """Reads the first layers without waiting for whoever filled their slots before the graph was launched."""

    def acquire(self, capture: int, layer: StagedLayer, stream: int) -> None:
        real, self._driver.wait = self._driver.wait, self._wait_inside  # type: ignore[method-assign]
        super().acquire(capture, layer, stream)
        self._driver.wait = real  # type: ignore[method-assign]

    def _wait_inside(self, stream: int, event: int, *, external: bool = False) -> None:
        if not external:
            type(self._driver).wait(self._driver, stream, event)


@pytest.mark.parametrize(
    "broken",
    [{"staging": _EndsBeforeItsCopiesAreIssued}, {"captured": _NeverJoins}, {"captured": _OnlyItsOwnEvents}],
)
def test_a_broken_capture_is_found(broken: dict[str, type]) -> None:
    rig = Rig(3, 2, **broken)
    eager_after_replay(rig)
    assert rig.violation() is not None


def test_a_capture_begins_between_passes() -> None:
    rig = Rig(4, 2)
    rig.layers[0].acquire(COMPUTE)
    rig.layers[0].release(COMPUTE)
    number = rig.begin()
    with pytest.raises(StateError, match="between passes, with layer 0 in its slot"):
        rig.captured.acquire(number, rig.layers[1], COMPUTE)
    rig.end()
    rig.staging.reset(COMPUTE)
    rig.replay(rig.capture())
    assert rig.violation() is None


def test_a_layer_acquired_outside_is_not_released_inside() -> None:
    rig = Rig(4, 2)
    rig.layers[0].acquire(COMPUTE)
    number = rig.begin()
    with pytest.raises(StateError, match="layer 0 is released inside a graph capture, but was not acquired inside"):
        rig.captured.release(number, rig.layers[0], COMPUTE)
    with pytest.raises(StateError, match="layer 0 was acquired outside of the graph capture, and was not released"):
        rig.captured.acquire(number, rig.layers[1], COMPUTE)
    rig.end()
    rig.layers[0].release(COMPUTE)


def test_a_layer_acquired_inside_is_not_released_outside() -> None:
    rig = Rig(4, 2)
    rig.captured.acquire(rig.begin(), rig.layers[0], COMPUTE)
    rig.end()
    with pytest.raises(StateError, match="layer 0 is released, but was not acquired"):
        rig.layers[0].release(COMPUTE)


def test_layers_are_captured_in_order_and_one_at_a_time_in_a_slot() -> None:
    rig = Rig(4, 2)
    number = rig.begin()
    with pytest.raises(StateError, match="layer 2 is captured out of order: layer 0 is the next to use its slot"):
        rig.captured.acquire(number, rig.layers[2], COMPUTE)
    rig.captured.acquire(number, rig.layers[0], COMPUTE)
    with pytest.raises(StateError, match="layer 2 is captured, but layer 0 has its slot and was not released"):
        rig.captured.acquire(number, rig.layers[2], COMPUTE)


class Capturing(HostDriver):
    """Says that the named streams are captured."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.captured: set[int] = set()

    def capture(self, stream: int) -> int:
        return 1 if stream in self.captured else 0

    def capturing(self) -> bool:
        return self.current_stream() in self.captured


def test_what_does_not_belong_into_a_capture_is_refused_and_the_runtime_goes_on(tmp_path: Path) -> None:
    model = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(4)})
    driver = Capturing()
    runtime = join(DWDPConfig(group_size=1, host_experts=4), 0, tmp_path / "rendezvous", model, driver)
    driver.captured = {driver.current_stream()}
    with pytest.raises(StateError, match="end it, there is nothing to reset"):
        runtime.reset()
    beside = driver.create_stream()
    with pytest.raises(StateError, match="takes no part in the capture of the current stream"):
        runtime.acquire(0, stream=SimpleNamespace(cuda_stream=beside, device=runtime.device))  # type: ignore[arg-type]
    with pytest.raises(StateError, match="layer 0 is released inside a graph capture, but was not acquired inside"):
        runtime.release(0)
    driver.captured = {beside}
    with pytest.raises(StateError, match="is captured into a graph: make it the current stream"):
        runtime.acquire(0, stream=SimpleNamespace(cuda_stream=beside, device=runtime.device))  # type: ignore[arg-type]
    assert runtime.stats().misses == 0
    driver.captured = set()
    driver.destroy_stream(beside)
    check_pass(runtime, model)
    assert runtime.close().open() == []


def test_layers_that_all_fit_into_slots_are_captured_without_a_copy() -> None:
    rig = Rig(2, 2)
    rig.capture()
    assert not [op for op in rig.program.graphs[0] if op.kind == "copy"]


def test_a_pass_that_is_stated_once_is_captured_whole(tmp_path: Path) -> None:
    model = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(4)})
    driver = Capturing()
    runtime = join(DWDPConfig(group_size=1, host_experts=4), 0, tmp_path / "rendezvous", model, driver)
    driver.captured = {driver.current_stream()}
    with runtime.forward_pass(tokens=3):
        for number in model:
            runtime.acquire(number)
            runtime.release(number)
    with (  # noqa: PT012
        pytest.raises(StateError, match="layer 3 was acquired, and was not released") as raised,
        runtime.forward_pass(),
    ):
        for number in model:
            runtime.acquire(number)
            if number != 3:
                runtime.release(number)
    assert any("there is nothing to reset" in note for note in raised.value.__notes__), "a capture cannot be given up"
    driver.captured = set()
    runtime.reset()
    runtime.check_integrity()  # not the bytes: this driver has made the copies that only a replay would make
    assert runtime.close().open() == []

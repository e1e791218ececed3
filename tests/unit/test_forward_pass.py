"""A pass that is stated once: what is of it, whose turn it is, and that nothing of it is left over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, add_layers, check_pass, join, random_model, same_bytes

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

MODEL = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(5)})
LAYERS = list(MODEL)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    """One rank with some experts in host memory, which may be read in place, too."""
    runtime = join(DWDPConfig(group_size=1, host_experts=4, mode="auto"), 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    assert runtime.close().open() == []


def through(runtime: DWDPRuntime, layers: list[int] = LAYERS) -> None:
    """Acquire and release with nothing but a number, and every byte compared."""
    for number in layers:
        weights = runtime.acquire(number)
        found = weights["w"]
        assert isinstance(found, torch.Tensor)
        assert same_bytes(found, MODEL[number]["w"])
        runtime.release(number)


def in_place(runtime: DWDPRuntime) -> list[int]:
    """How often each layer was read in place."""
    return [layer.in_place for layer in runtime.stats().layers.values()]


def test_what_is_of_the_pass_is_stated_once(runtime: DWDPRuntime) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        runtime.acquire(0)
    with runtime.forward_pass(tokens=7, top_k=2):
        through(runtime)
    before = in_place(runtime)
    with runtime.forward_pass(mode="in_place"):
        through(runtime)
        through(runtime)
    assert in_place(runtime) == [count + 2 for count in before]
    with runtime.forward_pass(mode="in_place"):
        for number in LAYERS:
            with runtime.layer(number, mode="staged"):  # unless the layer is told otherwise
                pass
    assert in_place(runtime) == [count + 2 for count in before]
    with pytest.raises(ConfigError, match="tokens"):  # nothing of it is left
        runtime.acquire(0)


def test_threads_take_turns(runtime: DWDPRuntime) -> None:
    wrong: list[BaseException] = []

    def passes() -> None:
        try:
            for _ in range(40):
                with runtime.forward_pass(mode="staged"):
                    through(runtime)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=passes) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    stats = runtime.stats()
    assert (stats.hits, stats.misses) == (3 * 40 * len(LAYERS), 0)


@pytest.mark.parametrize("held", [True, False])
def test_an_exception_gives_the_pass_up(runtime: DWDPRuntime, held: bool) -> None:
    with pytest.raises(ZeroDivisionError), runtime.forward_pass(mode="staged"):  # noqa: PT012
        through(runtime, [0, 1, 2])
        if held:
            runtime.acquire(3)
        raise ZeroDivisionError
    nothing_is_left_of_it(runtime)


def nothing_is_left_of_it(runtime: DWDPRuntime) -> None:
    """The slots have the first layers, and the next pass misses none, in whatever thread."""
    runtime.check_integrity()
    misses = runtime.stats().misses
    thread = threading.Thread(target=check_pass, args=(runtime, MODEL), kwargs={"mode": "staged"})
    thread.start()
    thread.join()
    check_pass(runtime, MODEL, mode="staged")
    stats = runtime.stats()
    assert stats.misses == misses
    assert stats.hits >= 2 * len(LAYERS)


@pytest.mark.parametrize("last", [0, 2, 4])
def test_a_pass_may_end_early(runtime: DWDPRuntime, last: int) -> None:
    with runtime.forward_pass(mode="staged"):
        through(runtime, LAYERS[:last])
    nothing_is_left_of_it(runtime)


def test_a_pass_that_was_left_before_is_given_up_at_the_beginning(runtime: DWDPRuntime) -> None:
    for number in (0, 1, 2):
        with runtime.layer(number, mode="staged"):
            pass
    with runtime.forward_pass(mode="staged"):
        through(runtime)
    assert runtime.stats().misses == 0
    nothing_is_left_of_it(runtime)


def test_a_layer_is_held_across_its_border(runtime: DWDPRuntime) -> None:
    runtime.acquire(1, mode="staged")
    with (
        pytest.raises(StateError, match="layer 1 was acquired, and was not released"),
        runtime.forward_pass(tokens=3),
    ):
        pytest.fail("the body has begun")
    runtime.release(1)
    runtime.reset()
    for mode in ("staged", "in_place"):
        with (
            pytest.raises(StateError, match="layer 4 was acquired, and was not released"),
            runtime.forward_pass(mode=mode),  # type: ignore[arg-type]
        ):
            runtime.acquire(4)
        nothing_is_left_of_it(runtime)


def test_within_another(runtime: DWDPRuntime) -> None:
    with runtime.forward_pass(mode="staged"):
        runtime.acquire(0)
        with pytest.raises(StateError, match="within a pass of the same thread"), runtime.forward_pass():
            pytest.fail("the body has begun")
        runtime.release(0)
        through(runtime, LAYERS[1:])
    nothing_is_left_of_it(runtime)


def test_what_is_between_passes_in_its_block(runtime: DWDPRuntime) -> None:
    with runtime.forward_pass(mode="staged"):
        through(runtime, [0, 1])
        runtime.sleep()
    runtime.wake()
    with runtime.forward_pass(mode="staged"):
        through(runtime)
        runtime.update({})
        runtime.check_integrity()
        through(runtime, [0])
        runtime.reset()
    nothing_is_left_of_it(runtime)


def test_beside_a_pass_of_a_thread_that_takes_no_turns(runtime: DWDPRuntime) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def without() -> None:
        runtime.acquire(0, mode="staged")
        begun.set()
        go_on.wait()
        runtime.release(0)
        runtime.reset()

    thread = threading.Thread(target=without)
    thread.start()
    begun.wait()
    with pytest.raises(StateError, match="in the middle of a pass of thread"), runtime.forward_pass(mode="staged"):
        pytest.fail("the body has begun")
    go_on.set()
    thread.join()
    with runtime.forward_pass(mode="staged"):
        through(runtime)


def test_what_cannot_be(tmp_path: Path) -> None:
    runtime = DWDPRuntime(
        DWDPConfig(group_size=1, host_experts=4), 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)
    )
    with pytest.raises(StateError, match="not published"), runtime.forward_pass():
        pytest.fail("the body has begun")
    add_layers(runtime, MODEL)
    runtime.publish()
    with (
        pytest.raises(ConfigError, match="does not provide for mode in_place, only for staged"),
        runtime.forward_pass(mode="in_place"),
    ):
        pytest.fail("the body has begun")
    with runtime.forward_pass():
        assert runtime.close().open() == []
    with pytest.raises(StateError, match="the runtime is closed"), runtime.forward_pass():
        pytest.fail("the body has begun")


def test_a_thread_waits_while_another_closes(runtime: DWDPRuntime) -> None:
    told: list[BaseException] = []
    entered = threading.Event()

    def waits() -> None:
        entered.set()
        try:
            with runtime.forward_pass(mode="staged"):
                through(runtime)
        except StateError as error:
            told.append(error)

    with runtime.forward_pass(mode="staged"):
        thread = threading.Thread(target=waits)
        thread.start()
        entered.wait()
        runtime.close()
    thread.join()
    assert [str(error) for error in told] == ["the runtime is closed"]

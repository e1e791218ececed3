"""Two devices in one thread: every public call leaves the current device as it was, and works whatever it was.

The two are host drivers that refuse, as CUDA does, what would go to another device's context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.groups import PAGE, Model, add_layers, fill_shards, random_model, same_bytes

from vmm_dwdp import HOST, DriverError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator import host_context
from vmm_dwdp.allocator.driver import Copy
from vmm_dwdp.allocator.host_driver import HostDriver

MODELS = [random_model({n: {"w": ((6, 1000), torch.float32)} for n in range(5)}, seed) for seed in range(2)]
SOME = DWDPConfig(
    group_size=1,
    host_experts=4,
    mode="in_place",
    resident_cache=8 * PAGE,
    checksums=True,
    slice_bytes=PAGE,
    movable_experts=True,
)


def contexts() -> list[int]:
    """The calling thread's, from the bottom to the current one; without any, device 0 is current, and may stay so."""
    return list(host_context._thread.contexts) or [0]


class Watched:
    """Makes public calls of a runtime, and looks at the current device before and after each.

    Attributes:
        made: the names of those that were made.
    """

    made: ClassVar[set[str]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = contexts()
        self._runtime = DWDPRuntime(*args, **kwargs)
        assert contexts() == before

    def __getattr__(self, name: str) -> Any:
        before = contexts()
        found = getattr(self._runtime, name)
        assert contexts() == before
        if not callable(found):
            self.made.add(name)
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.add(name)
            before = contexts()
            try:
                result = found(*args, **kwargs)
            finally:
                assert contexts() == before, name
            return self._watch(name, result) if hasattr(result, "__enter__") and result is not self else result

        return call

    @contextlib.contextmanager
    def _watch(self, name: str, manager: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        before = contexts()
        with manager as entered:
            assert contexts() == before, f"in the body of {name}"
            yield entered
        assert contexts() == before, name


def watched(*args: Any, **kwargs: Any) -> Any:
    """A runtime, as whoever calls it sees it."""
    return Watched(*args, **kwargs)


def check(runtime: Any, model: Model, mode: str) -> None:
    for number, weights in model.items():
        with runtime.layer(number, mode=mode) as found:
            assert same_bytes(found["w"], weights["w"])


def live(runtimes: list[Any]) -> None:
    """All that a published runtime can be asked for, the two in turns."""
    for mode in ("staged", "in_place") * 2:
        for runtime, model in zip(runtimes, MODELS, strict=True):
            check(runtime, model, mode)
    chosen = torch.arange(6)[:, None]
    for runtime, model in zip(runtimes, MODELS, strict=True):
        runtime.acquire(0, mode="staged")
        runtime.reset()
        runtime.acquire(3, mode="staged")
        parts = runtime.tensor_list(3, "w")
        assert same_bytes(torch.cat(parts), model[3]["w"])
        runtime.release(3)
        runtime.reset()
        for number in model:
            with runtime.layer(number, mode="in_place", chosen=chosen):
                pass
        runtime.refresh_cache()
        assert [runtime.logical_to_physical(number).tolist() for number in model] == [[*range(6)]] * len(model)
        assert runtime.rebalance() == 0
        assert runtime.held_experts(1) == tuple(runtime.local_experts(1))
        with runtime.trace() as trace:
            check(runtime, model, "staged")
        assert trace.spans
        shard = model[1]["w"][4:] if runtime.local_experts(1).start == 4 else model[1]["w"][:2]
        runtime.update({(1, "w", 0): shard})
        runtime.check_integrity(verify=True)
        with runtime.updating() as update:
            update.write(1, "w", model[1]["w"][0], experts=0) if 0 in runtime.local_experts(1) else None
        with runtime.forward_pass(mode="staged"):
            runtime.acquire(0)
            runtime.release(0)
        assert runtime.published
        assert not runtime.closed
        runtime.sleep()
        assert runtime.asleep
        runtime.wake()
        check(runtime, model, "in_place")
        assert runtime.peers() == {}
        assert runtime.stats().hits > 0


def whole_life(folder: Path) -> None:
    drivers = [HostDriver(PAGE, index) for index in range(2)]
    runtimes = [
        watched(SOME, 0, "cpu", folder / f"group-{index}", driver=driver) for index, driver in enumerate(drivers)
    ]
    for runtime, model in zip(runtimes, MODELS, strict=True):
        add_layers(runtime, model)
        assert set(runtime.held_owners) == {0, HOST}
        assert runtime.device == torch.device("cpu")
        assert runtime.memory_needed(SOME) == runtime.memory_needed()
        runtime.settle()
        fill_shards(runtime, model)
        runtime.publish()
    live(runtimes)
    for runtime, model in zip(runtimes, MODELS, strict=True):
        runtime.acquire(2)
        with pytest.raises(StateError):
            runtime.acquire(2)
        check(runtime, {4: model[4]}, "in_place")
        with runtime.exchange(4):
            pass
        runtime.reset()
        assert runtime.close().open() == []
        assert runtime.close().open() == []


def life_with_a_bank(folder: Path) -> None:
    """Neither experts that move nor a resident cache go with it."""
    stated = DWDPConfig(group_size=1, host_experts=4, mode="in_place", expert_bank=20 * PAGE)
    runtime = watched(stated, 0, "cpu", folder / "bank", driver=HostDriver(PAGE, 1))
    add_layers(runtime, MODELS[0])
    fill_shards(runtime, MODELS[0])
    runtime.publish()
    chosen = torch.tensor([[5], [0]])
    with runtime.layer(0):
        weights, rows = runtime.look_up(0, chosen)
        assert same_bytes(weights["w"][rows.flatten()], MODELS[0][0]["w"][chosen.flatten()])
    del weights, rows
    assert runtime.bank_counts().keys() == MODELS[0].keys()
    assert runtime.close().open() == []


@pytest.mark.parametrize("current", [None, 0, 1, 2])
def test_every_public_call_leaves_the_current_device_as_it_was(current: int | None, tmp_path: Path) -> None:
    """``current`` is the caller's device; ``None``: it is in a thread that has no context."""

    def work() -> None:
        if current is None:
            whole_life(tmp_path)
            life_with_a_bank(tmp_path)
            return
        with HostDriver(PAGE, current).current():
            whole_life(tmp_path)
            life_with_a_bank(tmp_path)
            assert host_context.current_device() == current

    Watched.made.clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    public = {name for name in dir(DWDPRuntime) if not name.startswith("_")}
    assert public - Watched.made == {"rejoin"}, "see the next test"


def test_a_rank_rejoins_whatever_device_is_current(tmp_path: Path) -> None:
    config, model = DWDPConfig(group_size=2), MODELS[0]

    def start(rank: int) -> Any:
        runtime = watched(config, rank, "cpu", tmp_path, driver=HostDriver(PAGE, 1 + rank))
        add_layers(runtime, model)
        fill_shards(runtime, model)
        runtime.publish()
        return runtime

    with ThreadPoolExecutor(2) as pool:
        alive, gone = pool.map(start, range(2))
    gone.close()
    again = watched(config, 1, "cpu", tmp_path, driver=HostDriver(PAGE, 2))
    add_layers(again, model)  # type: ignore[arg-type]
    again.rejoin()
    assert again.peers() == {0: True}
    check(again, model, "staged")
    for runtime in (alive, again):
        assert runtime.close().open() == []


def test_a_runtime_made_in_one_thread_is_used_in_another(tmp_path: Path) -> None:
    runtimes = [
        watched(SOME, 0, "cpu", tmp_path / f"group-{index}", driver=HostDriver(PAGE, index)) for index in range(2)
    ]
    for runtime, model in zip(runtimes, MODELS, strict=True):
        add_layers(runtime, model)
        fill_shards(runtime, model)
        runtime.publish()
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(live, runtimes).result()
        live(runtimes)
    with ThreadPoolExecutor(1) as pool:
        closed = [pool.submit(runtime.close).result() for runtime in runtimes]
    assert [ledger.open() for ledger in closed] == [[], []]


def test_plain_memory_is_taken_on_the_device_of_the_runtime(tmp_path: Path) -> None:
    runtimes = [
        watched(DWDPConfig(group_size=1, assembly="tensor_list"), 0, "cpu", tmp_path / str(index), driver=driver)
        for index, driver in enumerate(HostDriver(PAGE, index) for index in range(2))
    ]
    for runtime, model in zip(runtimes, MODELS, strict=True):
        add_layers(runtime, model)
        fill_shards(runtime, model)
        runtime.publish()
    for runtime, model in zip(runtimes, MODELS, strict=True):
        for number, weights in model.items():
            with runtime.layer(number) as found:
                assert same_bytes(torch.cat(found["w"]), weights["w"])
        del found
        assert runtime.close().open() == []


def test_a_stream_of_another_device_is_refused(tmp_path: Path) -> None:
    with DWDPRuntime(SOME, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE)) as runtime:
        add_layers(runtime, MODELS[0])
        fill_shards(runtime, MODELS[0])
        runtime.publish()
        other: Any = SimpleNamespace(device=torch.device("cuda:1"), cuda_stream=0)
        calls: list[Callable[[], object]] = [
            lambda: runtime.acquire(0, stream=other),
            lambda: runtime.acquire(0, stream=other, mode="staged"),
            lambda: runtime.reset(stream=other),
        ]
        for call in calls:
            with pytest.raises(StateError, match="the stream is of cuda:1, but the weights are on cpu"):
                call()
        for mode in ("staged", "in_place"):
            runtime.acquire(0, mode=mode)  # type: ignore[arg-type]
            with pytest.raises(StateError, match="the stream is of cuda:1, but the weights are on cpu"):
                runtime.release(0, stream=other)
            runtime.release(0)  # for which it is still acquired
        check(runtime, MODELS[0], "staged")


def test_what_goes_to_the_current_device_is_refused_while_that_is_another() -> None:
    driver, other = HostDriver(PAGE, 1), HostDriver(PAGE, 2)
    with driver.current():
        stream, event = driver.create_stream(), driver.create_event(timed=False)
        driver.record(event, stream)
    calls: dict[str, Callable[[], object]] = {
        "create_stream": driver.create_stream,
        "create_event": lambda: driver.create_event(timed=False),
        "allocate": lambda: driver.allocate(PAGE),
        "open_allocation": lambda: driver.open_allocation(b"/proc/1/fd/1", PAGE),
        "record": lambda: driver.record(event, 0),
        "wait": lambda: driver.wait(0, event),
        "copy": lambda: driver.copy(driver.prepare([Copy(0, 0, 0)]), stream),
        "capture": lambda: driver.capture(0),
        "capturing": driver.capturing,
        "synchronize": driver.synchronize,
    }

    def refuse() -> None:
        for name, call in calls.items():
            with pytest.raises(DriverError, match=f"{name} failed with CUDA_ERROR_INVALID_CONTEXT"):
                call()
        assert not driver.is_current()

    with other.current():
        refuse()
        driver.record(event, stream)  # whose context is told by what they are given
        driver.wait(stream, event)
        driver.synchronize(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(refuse).result()
    driver.destroy_event(event)
    driver.destroy_stream(stream)

"""Calls at the wrong moment and values that cannot be: one sentence each, and nothing stays allocated."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.faults import FaultyDriver
from support.groups import (
    PAGE,
    add_layers,
    check_pass,
    fill_shards,
    in_threads,
    join,
    published,
    random_model,
    same_bytes,
)

from vmm_dwdp import HOST, ConfigError, DriverError, DWDPConfig, DWDPRuntime, ExchangeError, StateError, WeightSpec
from vmm_dwdp.allocator.handles import Allocation
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode
from vmm_dwdp.memory.virtual import VirtualAssembly
from vmm_dwdp.observe.stats import CacheStats
from vmm_dwdp.schedule.layer import Slot, StagedLayer

MODEL = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(5)})
ALONE = DWDPConfig(group_size=1, host_experts=4)  # two slots, so the layers in flight are limited


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    """One rank with some experts in host memory, published."""
    runtime = join(ALONE, 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    assert runtime.close().open() == []


@pytest.fixture
def unpublished(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = DWDPRuntime(ALONE, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE))
    yield runtime
    assert runtime.close().open() == []


def test_a_layer_acquired_twice(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    with pytest.raises(StateError, match="layer 0 is acquired already"):
        runtime.acquire(0)
    runtime.release(0)


def test_a_layer_whose_slot_is_held_by_another(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    with pytest.raises(StateError, match="layer 2 needs the slot of layer 0"):
        runtime.acquire(2)
    runtime.release(0)
    with runtime.layer(2) as weights:
        assert same_bytes(weights["w"], MODEL[2]["w"])
    del weights


def test_a_release_without_acquire(runtime: DWDPRuntime) -> None:
    with pytest.raises(StateError, match="layer 1 is released, but was not acquired"):
        runtime.release(1)


def test_reset_gives_up_a_pass_that_ended_early(runtime: DWDPRuntime) -> None:
    runtime.acquire(0)
    runtime.release(0)
    runtime.acquire(1)
    runtime.reset()
    for number in (0, 1):
        with runtime.layer(number) as weights:
            assert same_bytes(weights["w"], MODEL[number]["w"])
        del weights
    assert runtime.stats().misses == 0


def test_reading_in_place_leaves_the_slots_as_they_are(tmp_path: Path) -> None:
    runtime = join(replace(ALONE, mode="in_place"), 0, tmp_path / "rendezvous", MODEL)
    check_pass(runtime, MODEL, mode="staged")
    before = runtime.stats()
    check_pass(runtime, MODEL)
    after = runtime.stats()
    assert after.in_place == len(MODEL)
    assert (after.hits, after.misses, after.fetched_bytes) == (before.hits, before.misses, before.fetched_bytes)
    check_pass(runtime, MODEL, mode="staged")
    assert runtime.stats().misses == 0
    runtime.acquire(0)
    with pytest.raises(StateError, match="layer 0 is acquired already"):
        runtime.acquire(0)
    runtime.reset()
    runtime.acquire(0)
    runtime.release(0)
    assert runtime.close().open() == []


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_the_tensors_of_a_layer_are_those_of_its_mode(tmp_path: Path, mode: Mode) -> None:
    with join(replace(ALONE, mode="in_place"), 0, tmp_path / "rendezvous", MODEL) as runtime:
        for number, weights in MODEL.items():
            with pytest.raises(StateError, match=f"layer {number} is not acquired"):
                runtime.tensor_list(number, "w")
            runtime.acquire(number, mode=mode)
            assert same_bytes(torch.cat(runtime.tensor_list(number, "w")), weights["w"])
            runtime.release(number)


def test_in_place_alone_stages_nothing(tmp_path: Path) -> None:
    runtime = join(replace(ALONE, mode="in_place", prefetch_depth=0), 0, tmp_path / "rendezvous", MODEL)
    assert runtime.stats().staged_bytes == 0
    check_pass(runtime, MODEL)
    with pytest.raises(ConfigError, match="does not provide for mode staged, only for in_place"):
        runtime.acquire(0, mode="staged")
    with pytest.raises(StateError, match="there is nothing to trace"), runtime.trace():
        pass
    assert runtime.ledger.counts()["mappings"] == runtime._assembly.num_mappings()
    assert runtime.close().open() == []


def test_in_place_that_the_config_does_not_provide_for(runtime: DWDPRuntime) -> None:
    with pytest.raises(ConfigError, match="does not provide for mode in_place, only for staged"):
        runtime.acquire(0, mode="in_place")


def test_the_same_tensors_on_every_call(runtime: DWDPRuntime) -> None:
    with runtime.layer(0) as first:
        address = first["w"].data_ptr()
    with runtime.layer(0) as second:
        assert second["w"].data_ptr() == address
    del first, second


def test_calls_may_come_from_another_thread(runtime: DWDPRuntime) -> None:
    """One after another, as where a program generates text in a thread of its own."""
    for _ in range(2):
        with ThreadPoolExecutor(1) as other:
            other.submit(check_pass, runtime, MODEL).result()
    check_pass(runtime, MODEL)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(runtime.close).result().open() == []


def test_what_one_thread_closes_is_closed_for_another_that_ran_passes(runtime: DWDPRuntime) -> None:
    check_pass(runtime, MODEL)
    with ThreadPoolExecutor(1) as other:
        other.submit(runtime.close).result()
    for call in (runtime.acquire, runtime.release):
        with pytest.raises(StateError, match="the runtime is closed"):
            call(0)


def test_unknown_names(runtime: DWDPRuntime) -> None:
    with pytest.raises(ConfigError, match="there is no layer 9; the layers are 0, 1, 2, 3, 4"):
        runtime.acquire(9)
    with pytest.raises(ConfigError, match="layer 0 has no weight 'v'; it has w"):
        runtime.tensor_list(0, "v")


@pytest.mark.parametrize("call", ["add_layer", "local_shard", "publish", "rejoin"])
def test_setup_after_publish(runtime: DWDPRuntime, call: str) -> None:
    calls = {
        "add_layer": lambda: runtime.add_layer(7, {"w": WeightSpec((6, 4), torch.int8)}),
        "local_shard": lambda: runtime.local_shard(0, "w"),
        "publish": runtime.publish,
        "rejoin": runtime.rejoin,
    }
    with pytest.raises(StateError, match=f"{call} after publish"):
        calls[call]()


RUNNING: dict[str, Callable[[DWDPRuntime], object]] = {
    "acquire": lambda runtime: runtime.acquire(0),
    "release": lambda runtime: runtime.release(0),
    "reset": lambda runtime: runtime.reset(),
    "update": lambda runtime: runtime.update({}),
    "check_integrity": lambda runtime: runtime.check_integrity(),
    "refresh_cache": lambda runtime: runtime.refresh_cache(),
    "tensor_list": lambda runtime: runtime.tensor_list(0, "w"),
    "peers": lambda runtime: runtime.peers(),
    "trace": lambda runtime: runtime.trace().__enter__(),
    "rebalance": lambda runtime: runtime.rebalance(),
}


@pytest.mark.parametrize("call", RUNNING)
def test_a_call_before_publish_and_after_close(unpublished: DWDPRuntime, tmp_path: Path, call: str) -> None:
    add_layers(unpublished, MODEL)
    with pytest.raises(StateError, match="not published yet"):
        RUNNING[call](unpublished)
    with join(ALONE, 0, tmp_path / "another", MODEL) as published:
        check_pass(published, MODEL)
    with pytest.raises(StateError, match="the runtime is closed"):
        RUNNING[call](published)


def test_set_up_after_close(unpublished: DWDPRuntime) -> None:
    unpublished.close()
    with pytest.raises(StateError, match="publish after close"):
        unpublished.publish()


def test_a_numa_node_that_is_not_there(tmp_path: Path) -> None:
    config = replace(ALONE, host_numa_node=1000)
    with pytest.raises(ConfigError, match="host_numa_node is 1000, but this machine has no such NUMA node; it has 0"):
        DWDPRuntime(config, 0, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE))


def test_layers_that_cannot_be(unpublished: DWDPRuntime) -> None:
    unpublished.add_layer(0, {"w": WeightSpec((6, 4), torch.int8)})
    with pytest.raises(ConfigError, match="layer 0 was added already"):
        unpublished.add_layer(0, {"w": WeightSpec((6, 4), torch.int8)})
    with pytest.raises(ConfigError, match="disagree on the number of experts: a has 6, b has 7"):
        unpublished.add_layer(1, {"a": WeightSpec((6, 4), torch.int8), "b": WeightSpec((7, 4), torch.int8)})
    with pytest.raises(ConfigError, match="layer 2 has no weights"):
        unpublished.add_layer(2, {})
    with pytest.raises(ConfigError, match="host_experts is 4, but a layer has only 3"):
        unpublished.add_layer(3, {"w": WeightSpec((3, 4), torch.int8)})
    with pytest.raises(ConfigError, match="does not hold the shards of rank 1"):
        unpublished.local_shard(0, "w", 1)


def copy_in_time(
    reached: threading.Event, published: threading.Event, target: torch.Tensor, source: torch.Tensor
) -> None:
    assert reached.wait(timeout=10)
    if not published.is_set():  # then the memory is others' to read
        target.copy_(source)


def test_publish_waits_for_what_still_fills_a_shard(tmp_path: Path) -> None:
    """By a copy that does not end before somebody waits for the device, as a loader's on a stream of its own."""
    waited, published = threading.Event(), threading.Event()

    class Device(HostDriver):
        def synchronize(self, stream: int | None = None) -> None:
            if stream is None:
                waited.set()
            super().synchronize(stream)

    driver = Device(PAGE)
    with DWDPRuntime(ALONE, 0, "cpu", tmp_path / "rendezvous", driver=driver) as runtime:
        add_layers(runtime, MODEL)
        fill_shards(runtime, MODEL)
        shard = runtime.local_shard(0, "w", HOST)
        right = shard.clone()
        shard.zero_()
        stream = driver.create_stream()
        waited.clear()
        driver._stream("copy", stream).submit(partial(copy_in_time, waited, published, shard, right))
        runtime.publish()
        published.set()

        with runtime.layer(0) as weights:
            complete = same_bytes(weights["w"], MODEL[0]["w"])
        driver.synchronize()
        driver.destroy_stream(stream)
        del shard, weights
    assert complete


def test_the_log_tells_that_layers_are_ready(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vmm_dwdp"), join(ALONE, 0, tmp_path / "rendezvous", MODEL):
        assert [record.getMessage() for record in caplog.records] == [
            "rank 0: 5 layers ready, 0 MiB resident, 0 MiB staged"
        ]


def test_publish_without_layers(unpublished: DWDPRuntime) -> None:
    with pytest.raises(ConfigError, match="at least one layer"):
        unpublished.publish()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_group(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} is not in a group of 2"):
        DWDPRuntime(DWDPConfig(group_size=2), rank, "cpu", tmp_path)


@pytest.mark.parametrize("rank", ["0", 0.0, None])
def test_a_rank_that_is_no_number(tmp_path: Path, rank: object) -> None:
    with pytest.raises(ConfigError, match=f"rank must be a whole number, not {rank!r}"):
        DWDPRuntime(ALONE, rank, "cpu", tmp_path / "group", driver=HostDriver(PAGE))  # type: ignore[arg-type]
    assert not (tmp_path / "group").exists()


def test_more_layers_than_a_process_can_map(unpublished: DWDPRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpublished._driver, "max_mappings", 10)
    add_layers(unpublished, MODEL)
    with pytest.raises(ConfigError, match=r"5 layers need \d+ mappings, but a process can have 10"):
        unpublished.publish()


def test_more_shares_than_a_process_can_have_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DWDPConfig(group_size=2)
    with published(config, tmp_path / "whole", MODEL) as whole:
        received, handed_over = (each.ledger.counts()["descriptors"] for each in whole)  # by rank 0, and to rank 1
    count = 2 * received + handed_over  # on the host driver a handle is one, too
    monkeypatch.setattr("resource.getrlimit", lambda _: (5, 5))
    runtime = DWDPRuntime(config, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE))
    add_layers(runtime, MODEL)
    with pytest.raises(ConfigError, match=f"takes {count} file descriptors, but a process may open 5"):
        runtime.publish()
    assert runtime.ledger.open() == []


def test_lists_of_tensors_cannot_rejoin(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2, assembly="tensor_list")
    alive, gone = in_threads(lambda rank: join(config, rank, tmp_path, MODEL), 2)
    gone.close()
    successor = DWDPRuntime(config, 1, "cpu", tmp_path, driver=HostDriver(PAGE))
    add_layers(successor, MODEL)
    with pytest.raises(StateError, match="assembly: tensor_list cannot rejoin"):
        successor.rejoin(timeout=10)
    assert successor.ledger.open() == []
    assert alive.close().open() == []


SPOILS: dict[str, Callable[[DWDPRuntime], object]] = {
    r"slot 0 holds layer 1, which is not its own": lambda runtime: setattr(
        first_slot(runtime), "holds", staged(runtime, 1)
    ),
    r"slot 0 is read as layer 2, which it is not": lambda runtime: setattr(
        first_slot(runtime), "reader", staged(runtime, 2)
    ),
    r"the slots have 1 bytes, but the layouts need \d+": lambda runtime: setattr(runtime._assembly, "staged_nbytes", 1),
    r"counts \d+ handles, but the layouts have": lambda runtime: runtime.ledger.add("handles", "nobody's"),
    r"the handles of host memory do not make up": lambda runtime: setattr(tile(runtime), "nbytes", PAGE // 2),
}


def first_slot(runtime: DWDPRuntime) -> Slot:
    return staged(runtime, 0).slot


def staged(runtime: DWDPRuntime, number: int) -> StagedLayer:
    layer = runtime._schedule._layers[number].staged
    assert layer is not None
    return layer


def tile(runtime: DWDPRuntime) -> Allocation:
    assert isinstance(runtime._assembly, VirtualAssembly)
    return runtime._assembly._tiles[0, "w", HOST][0]


@pytest.mark.parametrize("sentence", SPOILS)
def test_what_disagrees_is_found(tmp_path: Path, sentence: str) -> None:
    with join(ALONE, 0, tmp_path / "rendezvous", MODEL) as runtime:
        check_pass(runtime, MODEL)
        runtime.check_integrity()
        SPOILS[sentence](runtime)
        with pytest.raises(StateError, match=sentence):
            runtime.check_integrity()


def test_lists_of_tensors_that_disagree_are_found(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, assembly="tensor_list")
    with join(config, 0, tmp_path / "rendezvous", MODEL) as runtime:
        runtime.check_integrity()
        runtime.ledger.add("allocations", "nobody's")
        with pytest.raises(StateError, match="the ledger counts 6 allocations, but the layouts have 5"):
            runtime.check_integrity()


def test_mappings_are_counted_before_they_are_made(tmp_path: Path) -> None:
    runtime = join(ALONE, 0, tmp_path / "rendezvous", MODEL)
    assert runtime.ledger.counts()["mappings"] == runtime._assembly.num_mappings()
    assert runtime.close().open() == []


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    runtime = DWDPRuntime(DWDPConfig(group_size=3), 1, "cpu", tmp_path, driver=HostDriver(PAGE))
    add_layers(runtime, MODEL)
    fill_shards(runtime, MODEL)
    with pytest.raises(ExchangeError, match="rank 2 did not come"):
        runtime.publish(timeout=0.05)
    assert runtime.ledger.open() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("assembly", ["vmm", "tensor_list"])
def test_a_tensor_that_outlives_close_keeps_its_bytes_and_is_named(tmp_path: Path, assembly: str) -> None:
    config = DWDPConfig(group_size=1, assembly=assembly)  # type: ignore[arg-type]
    runtime = join(config, 0, tmp_path / "rendezvous", MODEL)
    with runtime.layer(3) as weights:
        held = weights["w"][0][2:4] if isinstance(weights["w"], list) else weights["w"][2:4]
    del weights
    with pytest.warns(ResourceWarning, match="layer 3, w"):
        ledger = runtime.close()
    assert any("layer 3, w" in line for line in ledger.open())
    assert same_bytes(held, MODEL[3]["w"][2:4])
    del held
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.close().open() == []


def test_staged_memory_is_the_remote_pages_of_each_slot_and_no_more(runtime: DWDPRuntime) -> None:
    remote_bytes = 4 * 1000 * 4  # four experts in host memory
    resident_bytes = 2 * 1000 * 4  # and two here: the page where they meet is resident
    pages = -(-(remote_bytes + resident_bytes) // PAGE) - -(-resident_bytes // PAGE)
    assert runtime.stats().staged_bytes == 2 * pages * PAGE


CACHED = replace(ALONE, mode="in_place", resident_cache=9 * PAGE)


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = join(CACHED, 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    assert runtime.close().open() == []


def use(runtime: DWDPRuntime, layer: int, *experts: int) -> None:
    """A token for each of the experts."""
    runtime.acquire(layer, chosen=torch.tensor(experts)[:, None])
    runtime.release(layer)


def test_a_cache_holds_the_experts_that_most_tokens_use(cached: DWDPRuntime) -> None:
    """Experts of 4000 bytes and pages of 4096: expert 2 is in the last page of this rank and in one of the host pool's,
    expert 4 in the next two."""
    assert cached.stats().cache == CacheStats(nbytes=9 * PAGE, used_bytes=0, refreshes=0, served=None)
    for layer in (1, 3):
        use(cached, layer, *[4] * 10, *[2] * 5, 0)
    cached.refresh_cache()
    assert cached.stats().cache == CacheStats(nbytes=9 * PAGE, used_bytes=6 * PAGE, refreshes=1, served=0.0)
    use(cached, 1, 4, 4, 2)
    use(cached, 0, 4)
    cached.refresh_cache()
    served = (2 * 4000 + 3 * 4000 - 2 * PAGE) / (3 * 4000 + 3 * 4000 - 2 * PAGE)
    assert cached.stats().cache == CacheStats(nbytes=9 * PAGE, used_bytes=8 * PAGE, refreshes=2, served=served)
    check_pass(cached, MODEL)
    check_pass(cached, MODEL, mode="staged")


def test_what_is_no_expert_is_not_counted_and_does_no_harm(cached: DWDPRuntime) -> None:
    use(cached, 0, -1, 6, -1, 6)
    cached.refresh_cache()
    assert cached.stats().cache == CacheStats(nbytes=9 * PAGE, used_bytes=0, refreshes=1, served=None)


def test_counting_where_inference_mode_comes_and_goes(tmp_path: Path) -> None:
    with torch.inference_mode():
        runtime = join(CACHED, 0, tmp_path / "rendezvous", MODEL)
        use(runtime, 0, 4)
    use(runtime, 0, 4)
    with torch.inference_mode():
        runtime.refresh_cache()
        use(runtime, 0, 4)
        runtime.refresh_cache()
    cache = runtime.stats().cache
    assert cache is not None
    assert cache.served == 1
    assert runtime.close().open() == []


def test_staged_layers_are_not_counted(cached: DWDPRuntime) -> None:
    with cached.layer(0, mode="staged", chosen=torch.full((9, 1), 4)):
        pass
    cached.refresh_cache()
    assert cached.stats().cache == CacheStats(nbytes=9 * PAGE, used_bytes=0, refreshes=1, served=None)


def test_a_cache_is_not_refreshed_while_it_may_be_read(cached: DWDPRuntime) -> None:
    cached.acquire(2)
    with pytest.raises(StateError, match="layer 2 was acquired, and was not released"):
        cached.refresh_cache()
    cached.release(2)
    cached.refresh_cache()


@pytest.mark.parametrize("call", ["update", "refresh_cache", "close"])
def test_kernels_that_read_in_place_are_waited_for(tmp_path: Path, call: str) -> None:
    """Here they run in the launching thread; so a device that cannot be waited for tells whether somebody would."""
    driver = FaultyDriver()
    runtime = join(replace(CACHED, prefetch_depth=0), 0, tmp_path / "rendezvous", MODEL, driver)
    driver.fail("synchronize", 1)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: runtime.update({}),
        "refresh_cache": runtime.refresh_cache,
        "close": runtime.close,
    }
    with pytest.raises(DriverError, match="synchronize failed with INJECTED"):
        calls[call]()
    if call != "close":
        check_pass(runtime, MODEL)
    assert runtime.close().open() == []


def test_a_cache_is_not_refreshed_in_a_capture(cached: DWDPRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cached._driver, "capture", lambda stream: 1)
        with pytest.raises(StateError, match="between replays of a graph, not in a capture"):
            cached.refresh_cache()
    cached.refresh_cache()


def test_without_a_cache_there_is_nothing_to_refresh(runtime: DWDPRuntime, tmp_path: Path) -> None:
    with (
        join(replace(ALONE, mode="in_place"), 0, tmp_path / "other", MODEL) as in_place,
        pytest.raises(ConfigError, match="the config has no resident_cache"),
    ):
        in_place.refresh_cache()
    with pytest.raises(ConfigError, match="the config has no resident_cache"):
        runtime.refresh_cache()
    assert runtime.stats().cache is None


def test_a_cache_where_nothing_is_remote_takes_no_memory(tmp_path: Path) -> None:
    with join(replace(CACHED, host_experts=0), 0, tmp_path / "rendezvous", MODEL) as runtime:
        assert runtime.stats().cache is None
        runtime.refresh_cache()
        check_pass(runtime, MODEL)


def test_a_cache_is_no_larger_than_what_is_remote(tmp_path: Path) -> None:
    with join(replace(CACHED, resident_cache=1 << 40), 0, tmp_path / "rendezvous", MODEL) as runtime:
        for layer in MODEL:
            use(runtime, layer, *range(6))
        runtime.refresh_cache()
        cache = runtime.stats().cache
        assert cache is not None
        assert cache.used_bytes == cache.nbytes == 4 * len(MODEL) * PAGE
        check_pass(runtime, MODEL)


def test_a_cache_smaller_than_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resident_cache is 4095 bytes, and a page of memory has 4096 here"):
        join(replace(CACHED, resident_cache=PAGE - 1), 0, tmp_path / "rendezvous", MODEL)


def test_a_cache_that_does_not_fit_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    driver = FaultyDriver()
    runtime = DWDPRuntime(CACHED, 0, "cpu", tmp_path / "rendezvous", driver=driver)
    add_layers(runtime, MODEL)
    fill_shards(runtime, MODEL)
    slots = 2
    driver.fail("create", slots + 4)
    with pytest.raises(ConfigError, match=f"resident_cache of {9 * PAGE} bytes does not fit .* after {3 * PAGE} of"):
        runtime.publish()
    assert runtime.ledger.open() == []

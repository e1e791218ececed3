"""Experts that change places between ranks: every expert's bytes at the row that the table tells, on every rank."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import PAGE, Model, add_layers, check_pass, in_threads, join, published, random_model
from support.moved import ask_for_tables, check_experts, check_held, rebalance, route, write_all

from vmm_dwdp import HOST, ConfigError, DriverError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode

CONFIG = DWDPConfig(group_size=3, mode="in_place", movable_experts=True, checksums=True)
PAIR = replace(CONFIG, group_size=2)
SHAPES = {number: {"a": ((11, 1777), torch.bfloat16), "b": ((11, 300), torch.float32)} for number in range(4)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)


def modes(config: DWDPConfig) -> list[Mode]:
    return ["staged", "in_place"] if config.prefetch_depth else ["in_place"]


def check(runtimes: list[DWDPRuntime], model: Model) -> None:
    for runtime in runtimes:
        for mode in modes(runtime.config):
            check_experts(runtime, model, mode)
        runtime.check_integrity(verify=True)
    check_held(runtimes, model)


def addresses(runtime: DWDPRuntime) -> list[int]:
    found = [table.data_ptr() for table in ask_for_tables(runtime, OLD).values()]
    for mode in modes(runtime.config):
        for number in OLD:
            with runtime.layer(number, mode=mode, tokens=7) as weights:
                found += [weight.data_ptr() for weight in weights.values() if isinstance(weight, torch.Tensor)]
    return found


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        PAIR,
        replace(CONFIG, host_experts=3),
        replace(CONFIG, num_local_experts=6),
        replace(CONFIG, prefetch_depth=0),
        replace(CONFIG, mode="auto", resident_cache=30 * PAGE),
        replace(CONFIG, slice_bytes="streams", prefetch_depth=1),
    ],
    ids=["three", "two", "host", "overlap", "in place only", "cache", "streams"],
)
def test_every_expert_after_any_sequence_of_swaps_and_updates(config: DWDPConfig, tmp_path: Path) -> None:
    chance, model, total = random.Random(1), OLD, 0
    with published(config, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
        before = [addresses(runtime) for runtime in runtimes]
        for step in range(8):
            if chance.random() < 0.3:
                model = random_model(SHAPES, seed=step)
                in_threads(lambda rank, model=model: write_all(runtimes[rank], model), config.group_size)  # type: ignore[misc]
            else:
                favourites = {number: chance.sample(range(11), 3) for number in OLD}
                for runtime in runtimes:
                    route(runtime, favourites)
                total += rebalance(runtimes, most=chance.randint(1, 6))
            if config.resident_cache:
                for runtime in runtimes:
                    runtime.refresh_cache()
            check(runtimes, model)
        assert total > 4, "experts have moved"
        assert [addresses(runtime) for runtime in runtimes] == before


def test_what_is_routed_to_one_rank_is_spread(tmp_path: Path) -> None:
    """Four experts of rank 0 have nearly all tokens of rank 1 and 2: afterwards no rank has more than two of them."""
    with published(CONFIG, tmp_path, OLD) as runtimes:
        first = runtimes[0].local_experts(0)
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: first, 1: [], 2: [], 3: []})
        assert rebalance(runtimes, most=50) > 0
        check(runtimes, OLD)
        assert all(len({*runtime.held_experts(0)} & {*first}) <= 2 for runtime in runtimes)
        assert rebalance(runtimes) == 0, "nothing was routed since"


def test_the_least_that_a_rank_allows_is_moved(tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {number: runtimes[0].local_experts(number) for number in OLD})
        moved = in_threads(lambda rank: runtimes[rank].rebalance(most=[9, 1][rank], timeout=20), 2)
        assert moved == [2, 2]
        for runtime in runtimes:
            route(runtime, {number: runtimes[0].held_experts(number) for number in OLD})
        assert rebalance(runtimes, most=0) == 0
        check(runtimes, OLD)


def test_a_cache_goes_by_where_experts_are(tmp_path: Path) -> None:
    """What others use most is cached, in whichever row it is."""
    config = replace(PAIR, resident_cache=3 * PAGE)  # of 26 that are remote
    with published(config, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: [*runtimes[1].local_experts(0)][:3]})
        assert rebalance(runtimes) > 0
        rows = runtimes[0].logical_to_physical(0).tolist()
        for reader in runtimes:
            far = next(each for each in range(11) if rows[each] != each and each not in reader.held_experts(0))
            for _ in range(30):  # what was counted before is forgotten by halves
                with reader.forward_pass(mode="in_place"):
                    reader.acquire(0, chosen=torch.full((9, 1), far))
                    reader.release(0)
                reader.refresh_cache()
            cache = reader._assembly.cache
            assert cache is not None
            hot = [tile for tile in cache._tiles if tile.pages and tile.heat]
            assert hot
            assert all(tile.layer == 0 and rows[far] in dict(tile.experts) for tile in hot)
        check(runtimes, OLD)


def test_passes_without_a_table_are_refused(tmp_path: Path) -> None:
    """Whoever did not ask for a table does not know that experts move."""
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            for number in list(OLD)[:-1]:
                runtime.logical_to_physical(number)
            with pytest.raises(StateError, match=r"nobody has asked for logical_to_physical\(3\)"):
                runtime.rebalance(timeout=1)
            check_pass(runtime, OLD)


def test_what_cannot_be_is_refused_before_others_hear_of_it(tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        one = runtimes[0]
        ask_for_tables(one, OLD)
        for most in (-1, 1.5, True, "all"):
            with pytest.raises(ConfigError, match="rebalance takes a whole number of swaps"):
                one.rebalance(most=most)  # type: ignore[arg-type]
        for mode in modes(PAIR):
            one.acquire(1, mode=mode)
            with pytest.raises(StateError, match="layer 1 was acquired, and was not released"):
                one.rebalance(timeout=1)
            one.reset()
        with pytest.raises(ConfigError, match="there is no layer 99"):
            one.logical_to_physical(99)
        check_pass(one, OLD)


def test_a_capture_is_no_place_to_move_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        one = runtimes[0]
        with monkeypatch.context() as patched:
            patched.setattr(one._driver, "capturing", lambda: True)
            with pytest.raises(
                StateError, match="layer 2: a table of its experts is first asked for outside of a capture"
            ):
                one.logical_to_physical(2)
        table = ask_for_tables(one, OLD)[2]
        with monkeypatch.context() as patched:
            patched.setattr(one._driver, "capturing", lambda: True)
            assert one.logical_to_physical(2) is table
        with monkeypatch.context() as patched:
            patched.setattr(one._driver, "capture", lambda stream: 1)
            with pytest.raises(StateError, match="experts are moved between replays of a graph, not in a capture"):
                one.rebalance(timeout=1)
        check_experts(one, OLD)
        one.close()
        with pytest.raises(StateError, match="the runtime is closed"):
            one.logical_to_physical(2)


def test_tables_of_inference_mode_change_outside_of_it(tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        with torch.inference_mode():
            tables = [ask_for_tables(runtime, OLD) for runtime in runtimes]
            for runtime in runtimes:
                route(runtime, {0: runtimes[0].local_experts(0)})
        assert rebalance(runtimes) > 0
        assert not any(table.is_inference() for each in tables for table in each.values())
        check(runtimes, OLD)


def test_a_config_that_keeps_experts_where_they_are(tmp_path: Path) -> None:
    with published(replace(PAIR, movable_experts=False), tmp_path, OLD) as runtimes:
        for call in (runtimes[0].rebalance, lambda: runtimes[0].logical_to_physical(0)):
            with pytest.raises(ConfigError, match="experts stay where they are: the config has no movable_experts"):
                call()
        assert runtimes[0].held_experts(0) == tuple(runtimes[0].local_experts(0))


def test_once_moved_a_whole_shard_has_no_order(tmp_path: Path) -> None:
    with published(replace(PAIR, host_experts=2), tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: runtimes[0].local_experts(0)})
        assert rebalance(runtimes) > 0
        one = runtimes[0]
        with pytest.raises(StateError, match=r"experts of layer 0 have moved: held_experts\(0\) tells who holds which"):
            one.local_experts(0)
        with pytest.raises(ConfigError, match="experts of this layer have moved, and a whole shard has no order"):
            one.update({(0, "a", 0): torch.zeros(5, 1777, dtype=torch.bfloat16)}, timeout=1)
        assert one.local_experts(1) == range(5), "of which none has moved"
        assert [*one.held_experts(0, HOST)] == [9, 10], "experts in host memory stay"
        elsewhere = min({*runtimes[1].held_experts(0)} - {*one.held_experts(0)})
        assert elsewhere < 5, "it was rank 0's"

        def write(rank: int) -> None:
            with runtimes[rank].updating(20) as update:
                if rank == 0:
                    with pytest.raises(ConfigError, match="the shard of rank 0 has the experts"):
                        update.write(0, "a", NEW[0]["a"][elsewhere], experts=elsewhere)
                else:
                    update.write(0, "a", NEW[0]["a"][elsewhere], experts=elsewhere)

        in_threads(write, 2)
        changed = {**OLD, 0: {"a": OLD[0]["a"].clone(), "b": OLD[0]["b"]}}
        changed[0]["a"][elsewhere] = NEW[0]["a"][elsewhere]
        check(runtimes, changed)


def test_a_missing_rank_is_named_and_nothing_is_moved(tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: runtimes[0].local_experts(0)})
        with pytest.raises(ExchangeError, match=r"nothing was written: .*\brank 1 \(rebalance: its tokens are counted"):
            runtimes[0].rebalance(timeout=0.3)
        check(runtimes, OLD)
        assert rebalance(runtimes) > 0, "what was counted before is not lost"
        check(runtimes, OLD)


def test_a_table_that_is_asked_for_late_is_the_latest(tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        tables = [ask_for_tables(runtime, OLD) for runtime in runtimes]
        for runtime in runtimes:
            route(runtime, {0: runtimes[0].local_experts(0)})
        rebalance(runtimes)
        for runtime, asked in zip(runtimes, tables, strict=True):
            assert all(runtime.logical_to_physical(number) is asked[number] for number in OLD)
            assert asked[0].dtype == torch.int64


def sleep_and_wake(runtimes: list[DWDPRuntime]) -> None:
    in_threads(lambda rank: runtimes[rank].sleep(timeout=20), len(runtimes))
    in_threads(lambda rank: runtimes[rank].wake(timeout=20), len(runtimes))


def give_up_and_write(runtimes: list[DWDPRuntime]) -> None:
    in_threads(lambda rank: runtimes[rank].sleep(keep=False, timeout=20), len(runtimes))
    in_threads(lambda rank: runtimes[rank].wake(timeout=20), len(runtimes))
    in_threads(lambda rank: write_all(runtimes[rank], OLD), len(runtimes))


@pytest.mark.parametrize("between", [sleep_and_wake, give_up_and_write])
def test_sleep_keeps_experts_where_they_are(between: Callable[[list[DWDPRuntime]], None], tmp_path: Path) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: runtimes[0].local_experts(0), 2: runtimes[1].local_experts(2)})
        assert rebalance(runtimes) > 0
        held = [runtime.held_experts(0) for runtime in runtimes]
        between(runtimes)
        assert [runtime.held_experts(0) for runtime in runtimes] == held
        check(runtimes, OLD)


def test_a_rank_that_comes_back_learns_where_experts_are(tmp_path: Path) -> None:
    """And reads nothing before it has asked for the tables."""
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: runtimes[0].local_experts(0)})
        assert rebalance(runtimes) > 0
        held = runtimes[1].held_experts(0)
        runtimes[1].close()
        driver = HostDriver(PAGE)
        back = runtimes[1] = DWDPRuntime(PAIR, 1, "cpu", tmp_path, driver=driver)
        add_layers(back, OLD)
        back.rejoin(timeout=20)
        for call in (lambda: back.acquire(0), lambda: back.forward_pass().__enter__(), back.refresh_cache):
            with pytest.raises(StateError, match=r"nobody has asked for logical_to_physical\(0\)"):
                call()  # type: ignore[no-untyped-call]
        ask_for_tables(back, OLD)
        assert back.held_experts(0) == held
        check(runtimes, OLD)
        for runtime in runtimes:
            route(runtime, {0: held})
        assert rebalance(runtimes) > 0
        check(runtimes, OLD)


def test_a_group_of_one_has_nobody_to_move_to(tmp_path: Path) -> None:
    runtime = join(replace(CONFIG, group_size=1, host_experts=5), 0, tmp_path, OLD)
    ask_for_tables(runtime, OLD)
    route(runtime, {0: [10]})
    assert runtime.rebalance() == 0
    check_experts(runtime, OLD)
    assert runtime.close().open() == []


def test_close_from_another_thread_waits_for_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever reads afterwards is told, on both ranks."""
    with published(PAIR, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            ask_for_tables(runtime, OLD)
            route(runtime, {0: runtimes[0].local_experts(0)})
        one = runtimes[0]
        real, leaving = one._assembly.shard, threading.Event()

        def shard(*given: Any) -> torch.Tensor:
            if not closed:
                stop = one._assembly.stop
                monkeypatch.setattr(one._assembly, "stop", lambda: (leaving.set(), stop()))
                closed.append(pool.submit(one.close))
                leaving.wait()
            assert not closed[0].done()
            return real(*given)

        closed: list[Future[Ledger]] = []
        with ThreadPoolExecutor(3) as pool:
            monkeypatch.setattr(one._assembly, "shard", shard)
            moving = [pool.submit(runtime.rebalance, timeout=3) for runtime in runtimes]
            for each in moving:
                with pytest.raises((ExchangeError, StateError, DriverError)):
                    each.result()
            assert closed[0].result().open() == []
        check_experts(runtimes[1], OLD)

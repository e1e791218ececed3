"""Ranks that give their memory back and take it again: every byte at its address, and nothing is kept meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.banks import check_looked_up
from support.faults import FaultyDriver
from support.groups import (
    PAGE,
    Model,
    add_layers,
    answered,
    beside,
    check_pass,
    in_threads,
    join,
    published,
    random_model,
    until_rank_1_has_died,
)

from vmm_dwdp import ConfigError, DriverError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.driver import Copy
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode
from vmm_dwdp.group.agreement import LAST_STEP

CONFIG = DWDPConfig(group_size=3, host_experts=2, mode="in_place", checksums=True)
PAIR = DWDPConfig(group_size=2)
SHAPES = {number: {"a": ((11, 1777), torch.bfloat16), "b": ((11, 300), torch.float32)} for number in range(4)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)


def modes(config: DWDPConfig) -> list[Mode]:
    return ["staged"] * bool(config.prefetch_depth) + ["in_place"] * config.reads_in_place  # type: ignore[list-item]


def check(runtime: DWDPRuntime, model: Model) -> None:
    for mode in modes(runtime.config):
        check_pass(runtime, model, mode=mode, tokens=7)
    if runtime.config.expert_bank:
        for _ in range(2):  # as they come into the bank, and there
            check_looked_up(runtime, model, 0, 5, 10)
    runtime.check_integrity(verify=runtime.config.checksums)


def together(runtimes: list[DWDPRuntime], call: Callable[[DWDPRuntime], None]) -> None:
    in_threads(lambda rank: call(runtimes[rank]), len(runtimes))


def sleep(runtime: DWDPRuntime) -> None:
    runtime.sleep(timeout=20)


def give_up(runtime: DWDPRuntime) -> None:
    runtime.sleep(keep=False, timeout=20)


def wake(runtime: DWDPRuntime) -> None:
    runtime.wake(timeout=20)


def update(runtime: DWDPRuntime) -> None:
    """Of all that this rank holds, to the new model."""
    shards = {
        (number, name, owner): tensor[slice(experts.start, experts.stop)]
        for number, weights in NEW.items()
        for name, tensor in weights.items()
        for owner in runtime.held_owners
        for experts in [runtime.local_experts(number, owner)]
    }
    runtime.update(shards, timeout=20)


def addresses(runtime: DWDPRuntime) -> list[int]:
    found = []
    for mode in modes(runtime.config):
        for number in OLD:
            with runtime.layer(number, mode=mode, tokens=7) as weights:
                found += [weight.data_ptr() for weight in weights.values() if isinstance(weight, torch.Tensor)]
    return found


def memory_files() -> set[int]:
    """The inodes of all that this process has open or mapped of the host driver's memory."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if "memfd:vmm_dwdp" in os.readlink(f"/proc/self/fd/{descriptor}"):
                found.add(os.stat(f"/proc/self/fd/{descriptor}").st_ino)
    mapped = re.findall(r"^\S+ \S+ \S+ \S+ (\d+) +/memfd:vmm_dwdp", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return found | set(map(int, mapped))


def route(runtime: DWDPRuntime) -> int:
    """Fill the resident cache; how many bytes it holds."""
    for number in OLD:
        runtime.acquire(number, mode="in_place", chosen=torch.arange(11), tokens=11)
        runtime.release(number)
    runtime.refresh_cache()
    cache = runtime.stats().cache
    assert cache is not None
    return cache.used_bytes


@pytest.mark.parametrize(
    "config",
    [
        DWDPConfig(group_size=1),
        DWDPConfig(group_size=1, host_experts=4, prefetch_depth=1),
        CONFIG,
        DWDPConfig(group_size=3, num_local_experts=6, checksums=True),
        DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0, checksums=True),
        replace(CONFIG, mode="auto", resident_cache=30 * PAGE),
        replace(CONFIG, mode="auto", expert_bank=4 * 3 * PAGE),
    ],
    ids=["alone", "with host memory", "three", "overlap", "in place", "cache", "bank"],
)
def test_every_byte_is_back_at_its_address(config: DWDPConfig, tmp_path: Path) -> None:
    with published(config, tmp_path, OLD) as runtimes:
        before = [addresses(runtime) for runtime in runtimes]
        cached = [route(runtime) for runtime in runtimes] if config.resident_cache else []
        for runtime in runtimes:
            answered(runtime)
        counts = [runtime.ledger.counts() for runtime in runtimes]
        taken = [(runtime.stats().resident_bytes, runtime.stats().staged_bytes) for runtime in runtimes]
        for call in (sleep, sleep, sleep):  # the host memory of the first is there for the others
            together(runtimes, call)
            assert all(runtime.asleep for runtime in runtimes)
            assert all(runtime.stats().staged_bytes == 0 for runtime in runtimes)
            together(runtimes, wake)
            assert not any(runtime.asleep for runtime in runtimes)
            for runtime in runtimes:
                check(runtime, OLD)
                assert addresses(runtime) == before[runtime.rank]
        saved = len(OLD) * 2  # handles in host memory: one a shard
        for rank, runtime in enumerate(runtimes):
            answered(runtime)
            assert (runtime.stats().resident_bytes, runtime.stats().staged_bytes) == taken[rank]
            assert runtime.ledger.counts() == {**counts[rank], "handles": counts[rank]["handles"] + saved}
            if config.resident_cache:
                cache = runtime.stats().cache
                assert cache is not None
                assert cache.used_bytes == cached[rank] > 0, "the cache holds what it held"


@pytest.mark.parametrize("keep", [True, False])
def test_no_rank_keeps_a_page_of_a_device(tmp_path: Path, keep: bool) -> None:
    before = memory_files()
    with published(replace(CONFIG, host_experts=0, resident_cache=20 * PAGE), tmp_path, OLD) as runtimes:
        awake = memory_files() - before
        together(runtimes, sleep if keep else give_up)
        asleep = memory_files() - before
        assert not awake & asleep, "what was there before is still open or mapped"
        assert len(asleep) == (3 * len(OLD) * 2 if keep else 0), "each rank's shards are saved, and nothing else"
    assert memory_files() == before


def test_what_a_rank_has_of_others_is_read_only_again(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as runtimes:
        together(runtimes, sleep)
        together(runtimes, wake)
        for runtime in runtimes:
            with runtime.layer(0, mode="in_place") as weights:
                assert isinstance(weights["a"], torch.Tensor)
                address = weights["a"].data_ptr()
            del weights
            driver = runtime._driver
            with pytest.raises(DriverError, match="not mapped as read-write"):
                driver.copy(driver.prepare([Copy(address, address + PAGE, 16)]), driver.current_stream())  # type: ignore[arg-type]


def test_all_that_reads_is_told_that_the_group_sleeps(tmp_path: Path) -> None:
    with published(replace(CONFIG, resident_cache=20 * PAGE), tmp_path, OLD) as runtimes:
        runtime = runtimes[0]
        check_pass(runtime, OLD)  # in the thread that asks next
        together(runtimes, sleep)
        calls: list[Callable[[], object]] = [
            lambda: runtime.acquire(0),
            lambda: runtime.release(0),
            runtime.reset,
            lambda: runtime.update({}),
            runtime.check_integrity,
            runtime.refresh_cache,
            lambda: runtime.tensor_list(0, "a"),
            lambda: runtime.trace().__enter__(),
        ]
        for call in calls:
            with pytest.raises(StateError, match=r"^the group sleeps: wake comes first, on all ranks$"):
                call()
        with pytest.raises(StateError, match="publish after publish"):
            runtime.publish()
        assert runtime.peers() == {1: True, 2: True}
        assert runtime.stats().in_place == len(OLD)
        together(runtimes, wake)
        check(runtime, OLD)


def test_sleep_and_wake_come_between_passes(tmp_path: Path) -> None:
    with published(replace(CONFIG, group_size=1), tmp_path, OLD) as (runtime,):
        for mode in modes(CONFIG):
            runtime.acquire(2, mode=mode)
            for call in (sleep, wake):
                with pytest.raises(StateError, match="layer 2 was acquired, and was not released"):
                    call(runtime)
            assert not runtime.asleep
            runtime.release(2)
        runtime.acquire(0)
        with ThreadPoolExecutor(1) as pool, pytest.raises(StateError, match="in the middle of a pass of thread"):
            pool.submit(sleep, runtime).result()
        runtime.reset()
        check(runtime, OLD)


def test_a_call_that_is_interrupted_while_asleep_is_no_way_past_it(tmp_path: Path) -> None:
    with published(replace(CONFIG, group_size=1), tmp_path, OLD) as (runtime,):
        check_pass(runtime, OLD)
        sleep(runtime)
        runtime._lifecycle.claim(goes_on=False)  # what `wake` begins with
        for _ in range(2):
            with pytest.raises(StateError, match="the group sleeps"):
                runtime.acquire(0)
        wake(runtime)
        check(runtime, OLD)


def test_a_cache_that_cannot_be_filled_when_it_wakes_is_not_read(tmp_path: Path) -> None:
    driver = FaultyDriver()
    config = replace(CONFIG, group_size=1, prefetch_depth=0, resident_cache=30 * PAGE)
    with join(config, 0, tmp_path, OLD, driver) as runtime:
        assert route(runtime) > 0
        sleep(runtime)
        copies = 2 * len(OLD)  # one for each shard that comes back; then the cache's
        driver.fail("copy", copies + 1)
        with pytest.raises(DriverError, match="INJECTED"):
            wake(runtime)
        assert not runtime.asleep
        with pytest.raises(StateError, match="missing or old, because a driver call failed: call refresh_cache"):
            runtime.acquire(0)
        runtime.refresh_cache()
        check(runtime, OLD)


def test_memory_without_addresses_of_its_own_cannot_sleep(tmp_path: Path) -> None:
    with published(replace(PAIR, assembly="tensor_list"), tmp_path, OLD) as (runtime, _):
        for call in (sleep, give_up, wake):
            with pytest.raises(StateError, match="assembly: tensor_list cannot sleep: ordinary memory does not come"):
                call(runtime)
        check_pass(runtime, OLD)


def test_called_again_it_changes_nothing(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as runtimes:
        together(runtimes, wake)
        for runtime in runtimes:
            check(runtime, OLD)
        together(runtimes, sleep)
        together(runtimes, sleep)
        together(runtimes, wake)
        together(runtimes, wake)
        for runtime in runtimes:
            check(runtime, OLD)


# -- ranks that do not do the same -------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [sleep, give_up])
def test_a_missing_rank_is_named_before_anything_is_given_back(
    tmp_path: Path, call: Callable[[DWDPRuntime], None]
) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes:
        with pytest.raises(ExchangeError, match=r"^nothing was given back or taken: not ready .* there: rank 1"):
            runtimes[0].sleep(keep=call is sleep, timeout=0.2)
        for runtime in runtimes:
            assert not runtime.asleep
            check(runtime, OLD)
        together(runtimes, call)
        with pytest.raises(ExchangeError, match=r"^nothing was given back or taken: not ready .* there: rank 1"):
            runtimes[0].wake(timeout=0.2)
        assert runtimes[0].stats().resident_bytes == 0, "it sleeps on, without memory"
        together(runtimes, wake)
        if call is sleep:
            for runtime in runtimes:
                check(runtime, OLD)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (lambda runtime: runtime.sleep(timeout=0.5), update, "rank 1 attempts to update"),
        (lambda runtime: runtime.update({}, 0.5), sleep, "rank 1 attempts to sleep"),
        (lambda runtime: runtime.sleep(timeout=0.5), give_up, "rank 1 attempts to give up"),
        (lambda runtime: runtime.wake(timeout=0.5), sleep, "rank 1 attempts to sleep"),
    ],
    ids=["sleep and update", "update and sleep", "keep and give up", "wake and sleep"],
)
def test_ranks_that_do_different_things_do_none(
    tmp_path: Path, first: Callable[[DWDPRuntime], None], second: Callable[[DWDPRuntime], None], told: str
) -> None:
    with published(PAIR, tmp_path, OLD) as runtimes, ThreadPoolExecutor(1) as pool:
        other = pool.submit(second, runtimes[1])
        with pytest.raises(ExchangeError, match=f"nothing was .*: not ready before the deadline.*; {told}"):
            first(runtimes[0])
        if second is update:  # whoever waits is still right once the first does the same
            update(runtimes[0])
        else:
            (sleep if second is sleep else give_up)(runtimes[0])
        other.result()
        together(runtimes, wake)
        if second is not give_up:
            for runtime in runtimes:
                check(runtime, NEW if second is update else OLD)


# -- without keeping ---------------------------------------------------------------------------------------------------
def test_a_bank_has_nothing_of_weights_that_were_given_up(tmp_path: Path) -> None:
    with published(replace(CONFIG, expert_bank=4 * 3 * PAGE), tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            check(runtime, OLD)
        for call in (give_up, wake, update):
            together(runtimes, call)
        for runtime in runtimes:
            check(runtime, NEW)


def test_weights_that_were_given_up_are_read_once_all_are_written(tmp_path: Path) -> None:
    with published(replace(CONFIG, resident_cache=20 * PAGE), tmp_path, OLD) as runtimes:
        cached = [route(runtime) for runtime in runtimes]
        together(runtimes, give_up)
        with pytest.raises(StateError, match=r"sleep\(keep=False\) gave the weights up: there is nothing to keep"):
            sleep(runtimes[0])
        together(runtimes, wake)
        for runtime in runtimes:
            with pytest.raises(StateError, match=r"^weights are gone: sleep\(keep=False\) gave them up; update all"):
                runtime.acquire(0)
            with pytest.raises(ConfigError, match=f"the shard of rank {runtime.rank} may be half written"):
                runtime.update({})
        together(runtimes, sleep)  # it is no reason not to sleep again, and does not make them whole
        together(runtimes, wake)
        with pytest.raises(StateError, match="weights are gone"):
            runtimes[1].acquire(0)
        together(runtimes, update)
        for runtime in runtimes:
            check(runtime, NEW)
            cache = runtime.stats().cache
            assert cache is not None
            assert cache.used_bytes == cached[runtime.rank]


def test_what_was_kept_can_be_given_up_later(tmp_path: Path) -> None:
    before = memory_files()
    with published(PAIR, tmp_path, OLD) as runtimes:
        together(runtimes, sleep)
        together(runtimes, give_up)
        assert memory_files() == before
        together(runtimes, wake)
        together(runtimes, update)
        together(runtimes, sleep)
        together(runtimes, wake)
        for runtime in runtimes:
            check(runtime, NEW)


def test_an_update_between_is_what_comes_back(tmp_path: Path) -> None:
    """The host memory that stays has the bytes of the time before."""
    with published(CONFIG, tmp_path, OLD) as runtimes:
        for call in (sleep, wake, update, sleep, wake):
            together(runtimes, call)
        for runtime in runtimes:
            check(runtime, NEW)


# -- closed, dead, and back --------------------------------------------------------------------------------------------
def test_close_while_asleep_leaves_nothing(tmp_path: Path) -> None:
    before = memory_files()
    with published(CONFIG, tmp_path, OLD) as runtimes:
        with runtimes[0].layer(1) as weights:
            kept = weights["a"]
        del weights
        runtimes[0].reset()
        together(runtimes, sleep)
        with pytest.warns(ResourceWarning, match="layer 1, a, in place stays"):
            left = runtimes[0].close().counts()
        assert {kind: number for kind, number in left.items() if number} == {"reservations": 1}
        del kept
        with pytest.raises(ExchangeError, match="rank 0 left"):
            wake(runtimes[1])
    assert memory_files() == before


def _dies_at(name: str, call: Callable[[DWDPRuntime], None], *before: Callable[[DWDPRuntime], None]) -> object:
    """A script: rank 1 dies where ``call`` comes to a method of its assembly, or to a step of the group."""

    def script(runtime: DWDPRuntime) -> None:
        for each in before:
            each(runtime)
        exchange = runtime._membership._exchange
        assert exchange is not None
        if name.startswith("step"):
            step = exchange.step

            def dying(number: int, what: str, deadline: float) -> None:
                if str(number) in name:
                    os._exit(7)
                step(number, what, deadline)

            exchange.step = dying  # type: ignore[method-assign]
        else:
            real = getattr(runtime._assembly, name)
            of_others = name == "drop"
            setattr(
                runtime._assembly,
                name,
                lambda *given: real(*given) if of_others and given[0] == runtime.rank else os._exit(7),
            )
        call(runtime)

    return script


DEATHS = {
    "while it saves": _dies_at("save", sleep),
    "before it gives back": _dies_at("give_back", sleep),
    "when it is asked for what it has saved": _dies_at("hand_over", sleep),
    "before it has told so": _dies_at("step 1", sleep),
    "before it lets go": _dies_at("drop", sleep),
    "before it has let go": _dies_at(f"step {LAST_STEP}", sleep),
    "asleep": sleep,
    "while it takes its memory": _dies_at("take_again", wake, sleep),
    "before it hands it over": _dies_at("step 1", wake, sleep),
    "before it maps the others'": _dies_at("build", wake, sleep),
    "before it has told that it is awake": _dies_at(f"step {LAST_STEP}", wake, sleep),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_rank_that_dies_takes_no_byte_with_it(tmp_path: Path, death: str) -> None:
    """The others are told, and read right bytes or nothing; who comes back has the dead one's, and wakes with them."""
    with beside(CONFIG, tmp_path, OLD, DEATHS[death]) as ranks:  # type: ignore[arg-type]

        def attempt(runtime: DWDPRuntime) -> list[str]:
            told = []
            for call in (sleep, wake):
                with suppress(ExchangeError):
                    call(runtime)
                    told.append(call.__name__)
            return told

        done = in_threads(lambda n: attempt(ranks[n]), 2)
        assert all("wake" not in each for each in done), "nobody wakes without all"
        for runtime in ranks:
            with suppress(StateError):  # asleep
                check_pass(runtime, OLD, mode="staged")
        until_rank_1_has_died()
        back = DWDPRuntime(CONFIG, 1, "cpu", tmp_path, driver=HostDriver(PAGE))
        add_layers(back, OLD)
        back.rejoin()
        assert back.asleep == any(runtime.asleep for runtime in ranks)
        everybody = [ranks[0], back, ranks[1]]
        together(everybody, wake)
        for runtime in everybody:
            check(runtime, OLD)
        together(everybody, sleep)
        together(everybody, wake)
        for runtime in everybody:
            check(runtime, OLD)
        assert back.close().open() == []


def test_a_rank_that_comes_back_to_a_group_that_gave_its_weights_up(tmp_path: Path) -> None:
    with beside(CONFIG, tmp_path, OLD, give_up) as ranks:
        together(ranks, give_up)
        with pytest.raises(ExchangeError, match="rank 1"):
            wake(ranks[0])
        until_rank_1_has_died()
        back = DWDPRuntime(CONFIG, 1, "cpu", tmp_path, driver=HostDriver(PAGE))
        add_layers(back, OLD)
        back.rejoin()
        everybody = [ranks[0], back, ranks[1]]
        together(everybody, wake)
        for runtime in everybody:
            with pytest.raises(StateError, match="weights are gone"):
                runtime.acquire(0)
        together(everybody, update)
        for runtime in everybody:
            check(runtime, NEW)
        assert back.close().open() == []

"""New weights written in place by all ranks together, between passes; nobody reads half of an update."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.banks import check_looked_up
from support.doors import UnixPlace, answer_to, request
from support.faults import FaultyDriver
from support.groups import PAGE, Model, check_pass, in_threads, join, published, random_model

from vmm_dwdp import HOST, ConfigError, DriverError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.config import Mode
from vmm_dwdp.observe.stats import CacheStats

CONFIG = DWDPConfig(group_size=3, host_experts=2, mode="in_place", checksums=True)
SHAPES = {number: {"a": ((11, 1777), torch.bfloat16), "b": ((11, 300), torch.float32)} for number in range(5)}
NO_CACHE = CacheStats(nbytes=0, used_bytes=0, refreshes=0, served=None)
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)


def shards(runtime: DWDPRuntime, model: Model) -> dict[tuple[int, str, int | str], torch.Tensor]:
    """What this rank writes of ``model``."""
    return {
        (number, name, owner): weights[name][slice(experts.start, experts.stop)]
        for number, weights in model.items()
        for name in weights
        for owner in runtime.held_owners
        for experts in [runtime.local_experts(number, owner)]
    }


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, host_experts=0, num_local_experts=6),
        DWDPConfig(group_size=2, assembly="tensor_list"),
        replace(CONFIG, resident_cache=30 * PAGE),
        replace(CONFIG, expert_bank=5 * 3 * PAGE),
    ],
    ids=["host", "overlap", "tensor-list", "cache", "bank"],
)
def test_every_rank_reads_the_new_bytes(config: DWDPConfig, tmp_path: Path) -> None:
    with published(config, tmp_path, OLD) as runtimes:
        for model in (NEW, OLD, NEW):
            in_threads(lambda rank, model=model: updated(runtimes[rank], model), config.group_size)  # type: ignore[misc]
            for runtime in runtimes:
                for mode in ("staged", config.mode):
                    check_pass(runtime, model, mode=mode)
                runtime.check_integrity(verify=config.checksums)
                if config.resident_cache:  # the next model is read there too
                    fill_cache(runtime)
                    assert (runtime.stats().cache or NO_CACHE).used_bytes > 0
                if config.expert_bank:
                    for _ in range(2):  # as they come into the bank, and there
                        check_looked_up(runtime, model, 0, 5, 10)
                    runtime.check_integrity(verify=True)


def fill_cache(runtime: DWDPRuntime) -> None:
    for number in OLD:
        runtime.acquire(number, chosen=torch.arange(11))
        runtime.release(number)
    runtime.refresh_cache()


def updated(runtime: DWDPRuntime, model: Model) -> None:
    runtime.update(shards(runtime, model), timeout=20)  # type: ignore[arg-type]


def test_a_missing_rank_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as runtimes:

        def attempt(rank: int) -> str:
            with pytest.raises(ExchangeError) as raised:
                runtimes[rank].update(shards(runtimes[rank], NEW), timeout=0.3)  # type: ignore[arg-type]
            return str(raised.value)

        for told in in_threads(attempt, 2):  # the first to give up may be missed by the other as well
            assert re.search(r"nothing was written: .*\brank (0, |1, )?2 ", told), told
        for runtime in runtimes:
            check_pass(runtime, OLD)
            check_pass(runtime, OLD, mode="staged")
        in_threads(lambda rank: updated(runtimes[rank], NEW), 3)
        for runtime in runtimes:
            check_pass(runtime, NEW)


def test_a_rank_that_leaves_midway_bars_others_from_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, group_size=2)
    with published(config, tmp_path, OLD) as runtimes:
        leaver = runtimes[1]

        def leave(*_: object) -> None:
            assert leaver._membership._exchange is not None
            leaver._membership._exchange.close()
            raise RuntimeError("this rank dies while it writes")

        monkeypatch.setattr(leaver._membership, "_sum_held_shards", leave)
        for runtime in runtimes:  # in this thread, in which nothing is acquired afterwards
            check_pass(runtime, OLD)

        def attempt(rank: int) -> None:
            with pytest.raises((ExchangeError, RuntimeError)):
                updated(runtimes[rank], NEW)

        in_threads(attempt, 2)
        for runtime in runtimes:
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.acquire(0)
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.refresh_cache()


def test_a_stranger_to_the_group_does_not_disturb_it_once_it_is_published(tmp_path: Path) -> None:
    with published(replace(CONFIG, group_size=2), tmp_path, OLD) as runtimes:
        place = UnixPlace(tmp_path)
        told = answer_to(place, request(place, fingerprint="of another group"), Ledger())
        assert told["error"] == "the configs or the layers of the two ranks differ"
        with pytest.raises(
            ExchangeError, match="nothing was written: not ready before the deadline, though there: rank 1"
        ):
            runtimes[0].update({}, timeout=0.5)  # it is rank 1 that does not come, and nobody else's fault
        in_threads(lambda rank: updated(runtimes[rank], NEW), 2)
        for runtime in runtimes:
            check_pass(runtime, NEW)


def test_what_does_not_fit_is_refused_before_others_hear_of_it(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=4)
    with published(config, tmp_path, OLD) as (runtime,):
        good = OLD[0]["a"][:7]
        for key, value, sentence in [
            ((9, "a", 0), good, "there is no layer 9"),
            ((0, "c", 0), good, "layer 0 has no weight 'c'"),
            ((0, "a", 1), good, "does not hold the shards of rank 1"),
            ((0, "a", 0), good[:3], r"the shard of rank 0 is \(7, 1777\)"),
            (
                (0, "a", HOST),
                good.float(),
                r"the shard of host memory is \(4, 1777\) of torch.bfloat16, not .* torch.flo",
            ),
        ]:
            with pytest.raises(ConfigError, match=sentence):
                runtime.update({key: value})  # type: ignore[dict-item]


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_an_update_is_made_between_passes(tmp_path: Path, mode: Mode) -> None:
    with published(DWDPConfig(group_size=1, host_experts=4, mode="in_place"), tmp_path, OLD) as (runtime,):
        runtime.acquire(3, mode=mode)
        with pytest.raises(StateError, match="layer 3 was acquired, and was not released"):
            runtime.update({})
        runtime.release(3)
        runtime.update({})
        check_pass(runtime, OLD, mode=mode)


def test_integrity_tells_of_a_byte_that_changed(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=4, checksums=True)
    with published(config, tmp_path, OLD) as (runtime,):
        runtime.check_integrity(verify=True)
        with runtime.layer(2) as weights:
            assert isinstance(weights["b"], torch.Tensor)
            weights["b"].view(torch.uint8)[3, 17] ^= 1  # an expert of this rank's own
        del weights
        with pytest.raises(StateError, match="layer 2, b: the bytes of rank 0 are not those that were published"):
            runtime.check_integrity(verify=True)


def test_updates_and_checks_leave_nothing_to_watch_behind(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=4, checksums=True)
    with published(config, tmp_path, OLD) as (runtime,):

        def watches() -> int:
            return sum(len(memory._watches) for memory in runtime._assembly._ranges)

        updated(runtime, NEW)
        runtime.check_integrity(verify=True)
        before = watches()
        for model in (OLD, NEW) * 3:
            updated(runtime, model)
            runtime.check_integrity(verify=True)
        assert watches() == before


def test_integrity_tells_of_a_mapping_too_many(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=4)
    with published(config, tmp_path, OLD) as (runtime,):
        runtime.check_integrity()
        token = runtime.ledger.add("mappings", "one that nobody knows")
        with pytest.raises(StateError, match="mappings, but the layouts have"):
            runtime.check_integrity()
        runtime.ledger.remove(token)
        with pytest.raises(ConfigError, match="needs checksums: true"):
            runtime.check_integrity(verify=True)


def test_a_cache_that_cannot_be_filled_anew_is_not_read(tmp_path: Path) -> None:
    """The owners have the new bytes, and the cache still has the old ones."""
    config = replace(CONFIG, group_size=1, resident_cache=30 * PAGE)
    driver = FaultyDriver()
    with join(config, 0, tmp_path / "rendezvous", OLD, driver) as runtime:
        fill_cache(runtime)
        for model in (NEW, OLD):
            driver.fail("prepare", 2)  # the first is for the edges
            with pytest.raises(DriverError, match="prepare failed with INJECTED"):
                updated(runtime, model)
            with pytest.raises(StateError, match="missing or old, because a driver call failed: call refresh_cache"):
                runtime.acquire(0)
            runtime.refresh_cache()
            check_pass(runtime, model)
            runtime.check_integrity(verify=True)


def test_integrity_tells_of_a_byte_that_changed_in_the_cache(tmp_path: Path) -> None:
    config = replace(CONFIG, group_size=1, resident_cache=30 * PAGE)
    with join(config, 0, tmp_path / "rendezvous", OLD) as runtime:
        fill_cache(runtime)
        runtime.check_integrity(verify=True)
        cache = runtime._assembly.cache
        assert cache is not None
        byte = tensor_at(cache._memory.address + 17, (1,), torch.uint8, runtime.device)
        byte ^= 1
        with pytest.raises(StateError, match=r"the resident cache has other bytes of layer \d, \w, in place than"):
            runtime.check_integrity(verify=True)

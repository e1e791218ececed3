"""`num_local_experts: auto`: ranks settle on one number before they take memory, and on none if one of them dies."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import PAGE, Model, add_layers, answered, check_pass, fill_shards, in_threads, random_model
from support.ranks import processes as new_processes
from support.ranks import start_server
from support.room import Counted

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, ExpertPlacement, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.memory import room as memory_room

EXPERTS = 11
SHAPES = {number: {"a": ((EXPERTS, 1777), torch.bfloat16), "b": ((EXPERTS, 300), torch.float32)} for number in range(4)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)
PAIR = DWDPConfig(group_size=2, num_local_experts="auto", checksums=True)
THREE = DWDPConfig(group_size=3, num_local_experts="auto", host_experts=2, mode="in_place", checksums=True)


def counted(config: DWDPConfig) -> Counted:
    layers = [(EXPERTS, (2 * 1777, 4 * 300))] * len(SHAPES)
    return Counted(layers, config.group_size, config.prefetch_depth, PAGE, config.host_experts, config.resident_cache)


def has_free(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """By rank: of the one that is `here`."""
    monkeypatch.setattr(memory_room, "free_bytes", lambda device: free[_here.rank])


_here = threading.local()


def here(runtime: DWDPRuntime) -> DWDPRuntime:
    """The rank of this thread."""
    _here.rank = runtime.rank
    return runtime


def set_up(config: DWDPConfig, rank: int, rendezvous: Path) -> DWDPRuntime:
    """All layers are added."""
    runtime = here(DWDPRuntime(config, rank, "cpu", rendezvous, driver=HostDriver(PAGE)))
    add_layers(runtime, OLD)
    return runtime


def load(runtime: DWDPRuntime) -> DWDPRuntime:
    fill_shards(here(runtime), OLD)
    runtime.publish(timeout=20)
    return runtime


def shards(runtime: DWDPRuntime, model: Model) -> dict[Any, torch.Tensor]:
    return {
        (number, name, owner): whole[slice(experts.start, experts.stop)]
        for number, weights in model.items()
        for name, whole in weights.items()
        for owner in runtime.held_owners
        for experts in [runtime.local_experts(number, owner)]
    }


def check(runtime: DWDPRuntime, model: Model) -> None:
    for mode in ["staged", "in_place"][: 1 + runtime.config.reads_in_place]:
        check_pass(runtime, model, mode=mode)  # type: ignore[arg-type]
    runtime.check_integrity(verify=True)


# -- the number --------------------------------------------------------------------------------------------------------
def live_alone(config: DWDPConfig, free: list[int], rendezvous: Path, rank: int) -> tuple[int | None, int, int]:
    """In a process of its own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        has_free(patched, *free)
        return live(config, rendezvous, rank)


def live(config: DWDPConfig, rendezvous: Path, rank: int) -> tuple[int | None, int, int]:
    """A rank's whole life; what it holds, and the bytes that it takes and has copied."""
    with set_up(config, rank, rendezvous) as runtime:
        load(runtime)
        check(runtime, OLD)
        runtime.sleep(timeout=20)
        runtime.wake(timeout=20)
        check(runtime, OLD)
        runtime.update(shards(runtime, NEW), timeout=20)
        check(runtime, NEW)
        stats = runtime.stats()
        pool = runtime._assembly.pool_nbytes
        number = runtime.config.num_local_experts
    assert runtime.ledger.open() == []
    assert number != "auto"
    return number, stats.resident_bytes - pool + stats.staged_bytes, stats.fetched_bytes


@pytest.mark.parametrize(
    ("config", "number", "processes"),
    [
        (PAIR, 8, True),
        (THREE, 5, True),
        (PAIR, EXPERTS, False),
        (replace(THREE, resident_cache=20 * PAGE), 5, False),
        (replace(PAIR, memory_bytes=1 << 40), None, False),
    ],
    ids=["two", "three", "all experts", "cache", "an equal share"],
)
def test_ranks_with_unequal_room_hold_what_fits_on_each(
    config: DWDPConfig, number: int | None, processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank has just enough for ``number``; the others have plenty."""
    group, last = counted(config), config.group_size - 1
    enough = group.takes(last, number)
    sharing = 1 if config.memory_bytes else 2 * config.group_size
    free = [10 * sharing * enough] * last + [sharing * enough]
    everything = EXPERTS - config.host_experts
    assert all(group.most(rank, free[rank] // sharing, free[rank]) == everything for rank in range(last))
    assert group.most(last, enough, enough) == ("equal" if number is None else number)

    if processes:
        start_server()
        with ProcessPoolExecutor(config.group_size, mp_context=new_processes) as pool:
            found = list(pool.map(partial(live_alone, config, free, tmp_path), range(config.group_size)))
    else:
        has_free(monkeypatch, *free)
        found = in_threads(partial(live, config, tmp_path), config.group_size)

    assert [each[0] for each in found] == [number] * config.group_size
    taken = [group.takes(rank, number) - config.resident_cache for rank in range(config.group_size)]
    assert [each[1] for each in found] == taken
    assert all((each[2] == 0) == (number == EXPERTS) for each in found), "where all is local, nothing is copied"


def test_the_least_that_each_rank_can_do_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free may be less than an equal share, which is what they hold then."""
    group = counted(PAIR)
    has_free(monkeypatch, *(group.takes(rank, None) for rank in range(2)))
    runtimes = in_threads(lambda rank: load(set_up(PAIR, rank, tmp_path)), 2)
    for runtime in runtimes:
        assert runtime.config == replace(PAIR, num_local_experts=None)
        check(runtime, OLD)
        assert runtime.close().open() == []


@pytest.mark.parametrize("stated", [True, False], ids=["memory_bytes", "free"])
def test_no_room_for_an_equal_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: bool) -> None:
    """Rank 1, which needs most, says so; the others are told that it is rank 1; nobody has taken anything."""
    group = counted(THREE)
    little = group.takes(1, None) - 1
    assert all(group.takes(rank, None) <= little for rank in (0, 2))
    has_free(monkeypatch, 1 << 40, (1 << 40) if stated else little, 1 << 40)
    config = replace(THREE, memory_bytes=little if stated else None)

    def told(rank: int) -> str:
        runtime = set_up(config, rank, tmp_path)
        with pytest.raises(ConfigError) as raised:
            fill_shards(runtime, OLD)
        assert runtime.closed
        assert runtime.ledger.open() == []
        with pytest.raises(StateError, match="settle after close"):
            runtime.local_experts(0)
        return str(raised.value)

    first, middle, last = in_threads(told, 3)
    assert first == last == "an equal share of the experts does not fit on rank 1, which says more"
    assert re.search(r"rank 1 needs .*, of which experts may take 0\.00 GB: .*host_experts: \d+ \(needs.* fit$", middle)


# -- calls -------------------------------------------------------------------------------------------------------------
def test_who_calls_twice_or_from_several_threads_settles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, *[4 * counted(PAIR).takes(1, 8)] * 2)
    runtimes = [set_up(PAIR, rank, tmp_path) for rank in range(2)]
    barrier = threading.Barrier(6)

    def ask(caller: int) -> int:
        runtime = here(runtimes[caller % 2])
        barrier.wait()
        return len(runtime.local_experts(caller % 4))

    assert set(in_threads(ask, 6)) == {8}
    for runtime in runtimes:
        runtime.settle()
        with pytest.raises(StateError, match="add_layer after settle: with num_local_experts: auto all layers"):
            runtime.add_layer(9, {})
    in_threads(lambda rank: load(runtimes[rank]), 2)
    for runtime in runtimes:
        with pytest.raises(StateError, match="settle after publish"):
            runtime.settle()
        check(runtime, OLD)
        assert runtime.close().open() == []


def test_what_has_no_number_yet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto is a number once the ranks of a runtime have agreed: settle\(\)"):
        ExpertPlacement(EXPERTS, PAIR)
    with DWDPRuntime(PAIR, 0, "cpu", tmp_path, driver=HostDriver(PAGE)) as runtime:
        with pytest.raises(ConfigError, match="settle needs at least one layer"):
            runtime.settle()
        add_layers(runtime, OLD)
        equal = replace(PAIR, num_local_experts=None)
        assert runtime.memory_needed() == runtime.memory_needed(equal)
        assert runtime.memory_needed().on_device == counted(PAIR).takes(0, None)
        with pytest.raises(ConfigError, match="there is no layer 9"):
            runtime.local_experts(9)
        with pytest.raises(ConfigError, match="layer 0 has no weight 'c'"):
            runtime.local_shard(0, "c")
        assert runtime.ledger.open() == []


def test_one_that_loads_for_longer_and_one_with_another_checkpoint(tmp_path: Path) -> None:
    """Ranks hear each other from `settle` on; nobody is refused for what another has not stated yet."""
    for second in ("one", "another"):
        place = tmp_path / second
        runtimes = [set_up(PAIR, rank, place) for rank in range(2)]
        in_threads(lambda rank, runtimes=runtimes: here(runtimes[rank]).settle(timeout=20), 2)  # type: ignore[misc]
        exchange = runtimes[1]._membership._exchange
        assert exchange is not None
        heard, hear = threading.Event(), exchange._hear

        def hearing(*word: Any, heard: threading.Event = heard, hear: Callable[..., Any] = hear) -> Any:
            try:
                return hear(*word)
            finally:
                heard.set()

        exchange._hear = hearing  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            fill_shards(runtimes[0], OLD)
            first = pool.submit(runtimes[0].publish, 20, revision="one")
            heard.wait()  # rank 0 publishes, and rank 1 has not filled anything yet
            assert not first.done()
            fill_shards(runtimes[1], OLD)
            if second == "one":
                runtimes[1].publish(20, revision="one")
                first.result()
                for runtime in runtimes:
                    check(runtime, OLD)
            else:
                with pytest.raises(ExchangeError, match="the two ranks were given different checkpoints"):
                    runtimes[1].publish(20, revision="another")
                with pytest.raises(ExchangeError, match=r"rank 1 left .*different checkpoints"):
                    first.result()
        for runtime in runtimes:
            assert runtime.close().open() == []


def test_ranks_that_state_different_memory_are_refused(tmp_path: Path) -> None:
    def told(rank: int) -> str:
        runtime = set_up(replace(PAIR, memory_bytes=(1 << 30) + rank), rank, tmp_path)
        with pytest.raises(ExchangeError) as raised:
            runtime.settle(timeout=20)
        assert runtime.ledger.open() == []
        return str(raised.value)

    assert any("the configs or the layers of the two ranks differ" in sentence for sentence in in_threads(told, 2))


# -- deaths ------------------------------------------------------------------------------------------------------------
@contextmanager
def beside(
    rendezvous: Path, script: Callable[[DWDPRuntime], object]
) -> Iterator[tuple[list[DWDPRuntime], Callable[[], None]]]:
    """Ranks 0 and 2, set up; rank 1 is a process of its own, which dies in the middle of ``script``, or at its end,
    for which what is yielded besides waits."""
    child = os.fork()
    if not child:
        try:
            runtime = set_up(THREE, 1, rendezvous)
            script(runtime)
            answered(runtime)
            os._exit(7)
        finally:
            os._exit(1)
    ranks = [set_up(THREE, rank, rendezvous) for rank in (0, 2)]

    def died() -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    try:
        yield ranks, died
    finally:
        for runtime in ranks:
            runtime.close()
    assert [runtime.ledger.open() for runtime in ranks] == [[], []]


def dies_at(name: str, number: int = 0) -> Callable[[DWDPRuntime], object]:
    """A script: where rank 1 comes to a call of its exchange, or to the step ``number``."""

    def script(runtime: DWDPRuntime) -> None:
        make = runtime._membership._make_exchange

        def making(patience: float) -> Any:
            exchange = make(patience)
            real = getattr(exchange, name)

            def dying(*given: Any, **named: Any) -> Any:
                return os._exit(7) if given[:1] == (number,) or not number else real(*given, **named)

            setattr(exchange, name, dying)
            return exchange

        runtime._membership._make_exchange = making  # type: ignore[method-assign]
        runtime.settle(timeout=20)

    return script


def dies_when_both_have_asked(runtime: DWDPRuntime) -> None:
    make, asked = runtime._membership._make_exchange, set()

    def making(patience: float) -> Any:
        exchange = make(patience)
        real = exchange._hear

        def dying(rank: int, *word: Any) -> Any:
            asked.add(rank)
            return os._exit(7) if asked == {0, 2} else real(rank, *word)

        exchange._hear = dying  # type: ignore[method-assign]
        return exchange

    runtime._membership._make_exchange = making  # type: ignore[method-assign]
    runtime.settle(timeout=20)


DEATHS: dict[str, Callable[[DWDPRuntime], object]] = {
    "before it is heard": dies_at("serve"),
    "when it is asked": dies_when_both_have_asked,
    "when all are bound": dies_at("offers"),
    "before it has told that it knows": dies_at("step", 1),
    "before it has told that all do": dies_at("step", 2),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_rank_that_dies_while_they_settle_is_named(
    tmp_path: Path, death: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes on to load; and nothing is left that keeps the next group from it."""
    has_free(monkeypatch, *[1 << 40] * 3)
    waits = 0.5 if death == "before it is heard" else 20  # it never came
    with beside(tmp_path, DEATHS[death]) as (ranks, died):

        def told(n: int) -> str:
            with pytest.raises(ExchangeError) as raised:
                here(ranks[n]).settle(timeout=waits)
            assert ranks[n].config.num_local_experts == "auto"
            return str(raised.value)

        sentences = in_threads(told, 2)
        died()
        assert any("rank 1" in sentence for sentence in sentences), sentences
    anew = in_threads(lambda rank: load(set_up(THREE, rank, tmp_path)), 3)
    for runtime in anew:
        assert runtime.config.num_local_experts == EXPERTS - THREE.host_experts
        check(runtime, OLD)
        assert runtime.close().open() == []


def test_a_rank_that_dies_once_they_have_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missed by `publish`, at once. Started anew alone it is told that the others have settled."""
    has_free(monkeypatch, *[1 << 40] * 3)
    with beside(tmp_path, lambda runtime: runtime.settle(timeout=20)) as (ranks, died):
        in_threads(lambda n: here(ranks[n]).settle(timeout=20), 2)
        died()
        again = set_up(THREE, 1, tmp_path)
        with pytest.raises(ExchangeError, match="have settled on 9 experts a rank already: start all anew, or rejoin"):
            again.settle(timeout=20)
        assert again.ledger.open() == []

        def told(n: int) -> str:
            fill_shards(ranks[n], OLD)
            with pytest.raises(ExchangeError) as raised:
                ranks[n].publish(timeout=20)
            return str(raised.value)

        assert any("rank 1 left" in sentence for sentence in in_threads(told, 2))


@pytest.mark.parametrize("asleep", [False, True])
def test_a_rank_that_comes_back_takes_the_number_of_the_group(
    tmp_path: Path, asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has room for itself, and whichever of the others tells it: one of them came back, too."""
    free = [2 * 3 * counted(THREE).takes(rank, 5) for rank in range(3)]
    has_free(monkeypatch, *free)

    def live_on(runtime: DWDPRuntime) -> None:
        load(runtime)
        if asleep:
            runtime.sleep(timeout=20)

    with beside(tmp_path, live_on) as (ranks, died):
        in_threads(lambda n: live_on(ranks[n]), 2)
        died()
        everybody = [ranks[0], None, ranks[1]]
        for number in (1, 2):
            gone = everybody[number]
            if gone is not None:
                gone.close()
            has_free(monkeypatch, *[1] * 3 if asleep else [1 << 40] * 3)
            back = everybody[number] = set_up(THREE, number, tmp_path)
            back.rejoin(timeout=20)
            assert back.config == replace(THREE, num_local_experts=5)
            with suppress(StateError):
                check(back, OLD)
        runtimes = [runtime for runtime in everybody if runtime is not None]
        for call in ("sleep", "wake"):
            in_threads(lambda rank, call=call: getattr(runtimes[rank], call)(timeout=20), 3)  # type: ignore[misc]
        in_threads(lambda rank: runtimes[rank].update(shards(runtimes[rank], NEW), timeout=20), 3)
        for runtime in runtimes:
            check(runtime, NEW)
            assert len(runtime.local_experts(0)) == 5
        for runtime in runtimes[1:]:
            assert runtime.close().open() == []


def test_who_should_rejoin_and_asks_for_its_experts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, *[1 << 40] * 3)
    with beside(tmp_path, load) as (ranks, died):
        in_threads(lambda n: load(ranks[n]), 2)
        died()
        again = set_up(THREE, 1, tmp_path)
        with pytest.raises(ExchangeError, match="have settled on 9 experts a rank already: start all anew, or rejoin"):
            again.local_experts(0)
        assert again.ledger.open() == []
        for runtime in ranks:
            check(runtime, OLD)

"""What an agreement that failed leaves for the next one: nothing that counts, and all that must be known."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.doors import UnixPlace, answer_to, request
from support.groups import PAGE, Model, add_layers, check_pass, fill_shards, in_threads, join, published, random_model

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group.membership import ShardKey
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Share

CONFIG = DWDPConfig(group_size=2)
SHAPES = {number: {"a": ((6, 1777), torch.bfloat16)} for number in range(3)}
OLD, NEW, NEWER = (random_model(SHAPES, seed=seed) for seed in (1, 2, 3))


def shards(runtime: DWDPRuntime, model: Model) -> dict[ShardKey, torch.Tensor]:
    found: dict[ShardKey, torch.Tensor] = {}
    for number in model:
        experts = runtime.local_experts(number)
        found[number, "a", runtime.rank] = model[number]["a"][experts.start : experts.stop]
    return found


@contextmanager
def stopped_before(runtime: DWDPRuntime, number: int, going_on: threading.Event) -> Iterator[threading.Event]:
    """The rank writes no layer from ``number`` on until ``going_on``; yields what is set when it has come so far."""
    real, here = runtime._assembly.writing, threading.Event()

    @contextmanager
    def writing(layer: Layer, weight: str, owner: int | str) -> Iterator[torch.Tensor]:
        if layer.number == number:
            here.set()
            going_on.wait()
        with real(layer, weight, owner) as shard:  # type: ignore[arg-type]
            yield shard

    runtime._assembly.writing = writing  # type: ignore[method-assign, assignment]
    try:
        yield here
    finally:
        runtime._assembly.writing = real  # type: ignore[method-assign]


def update(runtime: DWDPRuntime, model: Model, timeout: float = 60) -> None:
    runtime.update(shards(runtime, model), timeout=timeout)


def fail_midway(first: DWDPRuntime, second: DWDPRuntime) -> None:
    """Both write, the second one not all of it in the first one's time; both raise."""
    going_on = threading.Event()
    with stopped_before(second, 2, going_on), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(update, second, NEW)
        with pytest.raises(ExchangeError, match=r"not ready before the deadline, though there: rank 1"):
            update(first, NEW, timeout=0.5)
        going_on.set()
        with pytest.raises(ExchangeError, match="rank 0 gave up, or began anew, while others waited for it"):
            slow.result()


def test_a_second_attempt_counts_no_word_of_the_first(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as (first, second):
        fail_midway(first, second)
        for runtime in (first, second):
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.acquire(0)
        going_on = threading.Event()
        with stopped_before(second, 0, going_on) as here, ThreadPoolExecutor(2) as pool:
            updates = [pool.submit(update, runtime, NEWER) for runtime in (second, first)]
            here.wait()
            assert not updates[1].done(), "the first returns before the second has written"
            going_on.set()
            for updated in updates:
                updated.result()
        for runtime in (first, second):
            check_pass(runtime, NEWER)


def test_an_update_covers_what_the_one_before_left_half_written(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as (first, second):
        fail_midway(first, second)
        some = shards(first, NEWER)
        del some[1, "a", 0]
        with pytest.raises(ConfigError, match="layer 1, a: the shard of rank 0 may be half written"):
            first.update(some, timeout=1)
        in_threads(lambda rank: update((first, second)[rank], NEWER), 2)
        in_threads(lambda rank: (first, second)[rank].update({}), 2)  # nothing is half written any more
        for runtime in (first, second):
            check_pass(runtime, NEWER)


def test_an_update_that_fails_in_the_middle_of_a_pass_ends_the_pass(tmp_path: Path) -> None:
    """Whose thread would not be asked again before it reads the next layer."""
    with published(CONFIG, tmp_path, OLD) as (first, second):
        with first.layer(0):
            pass
        fail_midway(first, second)
        with pytest.raises(StateError, match="weights are partly old and partly new"):
            first.acquire(1)


@pytest.mark.parametrize("in_a_pass", [True, False])
@pytest.mark.parametrize("interrupted", [True, False])
def test_no_other_call_is_a_way_past_a_failed_update(tmp_path: Path, in_a_pass: bool, interrupted: bool) -> None:
    """Not even one that an interrupt ends as soon as it has claimed the pass."""
    with published(CONFIG, tmp_path, OLD) as (first, second):
        if in_a_pass:
            with first.layer(0):
                pass
        fail_midway(first, second)
        if interrupted:
            first._lifecycle.claim(goes_on=False)  # what every such call begins with
        else:
            first.check_integrity()
        for call in (lambda: first.acquire(1), first.forward_pass().__enter__):
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                call()  # type: ignore[no-untyped-call]


def _die_while_writing(rendezvous: Path) -> None:
    """In a forked child."""
    runtime = join(CONFIG, 1, rendezvous, OLD)
    going_on = threading.Event()
    with stopped_before(runtime, 2, going_on) as here, ThreadPoolExecutor(1) as pool:
        pool.submit(update, runtime, NEW)
        here.wait()
        os._exit(7)


@contextmanager
def _a_rank_that_dies_while_it_writes(rendezvous: Path) -> Iterator[DWDPRuntime]:
    """Rank 0, after rank 1 has died with two of three layers written."""
    child = os.fork()
    if not child:
        try:
            _die_while_writing(rendezvous)
        finally:
            os._exit(1)
    with join(CONFIG, 0, rendezvous, OLD) as runtime:
        with pytest.raises(ExchangeError, match="rank 1"):
            update(runtime, NEW)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        yield runtime
    assert runtime.ledger.open() == []


def _rejoined(rendezvous: Path, rank: int, revision: str | None = None, config: DWDPConfig = CONFIG) -> DWDPRuntime:
    runtime = DWDPRuntime(config, rank, "cpu", rendezvous, driver=HostDriver(PAGE))
    add_layers(runtime, OLD)
    runtime.rejoin(revision=revision)
    return runtime


def test_a_rank_that_comes_back_knows_that_an_update_was_left_half_done(tmp_path: Path) -> None:
    with _a_rank_that_dies_while_it_writes(tmp_path) as first, _rejoined(tmp_path, 1) as second:
        for runtime in (first, second):
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.acquire(0)
        with pytest.raises(ConfigError, match="layer 0, a: the shard of rank 1 may be half written"):
            second.update({})  # nobody knows how far the dead one came
        in_threads(lambda rank: update((first, second)[rank], NEWER), 2)
        for runtime in (first, second):
            check_pass(runtime, NEWER)


def test_a_rank_that_comes_back_where_one_does_not_tell_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there, and says nothing of what it knows; another one hands over the memory."""
    config = replace(CONFIG, group_size=3)
    with published(config, tmp_path, OLD) as (first, second, third):
        third.close()
        exchange = first._membership._exchange
        assert exchange is not None
        answer = exchange._transport._answer_to

        def silent(asked: dict[str, object]) -> tuple[dict[str, object], list[Share]]:
            return answer(asked) if asked["ask"] != "say" else ({"error": None}, [])

        with monkeypatch.context() as patched:
            patched.setattr(exchange._transport, "_answer_to", silent)
            again = _rejoined(tmp_path, 2, config=config)
        with again:
            check_pass(second, OLD)
            with pytest.raises(StateError, match="rank 0 does not tell whether an update was begun"):
                again.acquire(0)
            in_threads(lambda rank: update((first, second, again)[rank], NEW), 3)
            for runtime in (first, second, again):
                check_pass(runtime, NEW)


def test_a_rank_that_comes_back_to_a_whole_group_reads_at_once(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as (first, second):
        second.close()
        with pytest.raises(ExchangeError, match="nothing was written: rank 1 left"):
            first.update({}, timeout=5)
        with _rejoined(tmp_path, 1) as again:
            check_pass(again, OLD)
            in_threads(lambda rank: update((first, again)[rank], NEW), 2)
            for runtime in (first, again):
                check_pass(runtime, NEW)


# -- publish -----------------------------------------------------------------------------------------------------------
def loaded(rank: int, rendezvous: Path, config: DWDPConfig = CONFIG) -> DWDPRuntime:
    runtime = DWDPRuntime(config, rank, "cpu", rendezvous, driver=HostDriver(PAGE))
    add_layers(runtime, OLD)
    fill_shards(runtime, OLD)
    return runtime


def test_ranks_that_were_given_different_checkpoints_are_all_refused(tmp_path: Path) -> None:
    def told(rank: int) -> str:
        with pytest.raises(ExchangeError) as raised:
            loaded(rank, tmp_path).publish(revision=f"checkpoint {rank}")
        return str(raised.value)

    for sentence in in_threads(told, 2):
        assert "the two ranks were given different checkpoints" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_comes_back_states_the_same_checkpoint(tmp_path: Path) -> None:
    def publish(rank: int) -> DWDPRuntime:
        runtime = loaded(rank, tmp_path)
        runtime.publish(revision="main")
        return runtime

    first, second = in_threads(publish, 2)
    second.close()
    for other in (None, "another"):
        with pytest.raises(ExchangeError, match="the two ranks were given different checkpoints"):
            _rejoined(tmp_path, 1, revision=other)
    with _rejoined(tmp_path, 1, revision="main") as again:
        check_pass(again, OLD)
    first.close()


def test_a_rank_that_fails_to_publish_comes_again_to_who_still_waits(tmp_path: Path) -> None:
    """Its first self has said that it is there, and was given memory; none of that counts for the second."""
    config = DWDPConfig(group_size=3)

    def publish(rank: int, timeout: float) -> DWDPRuntime:
        runtime = loaded(rank, tmp_path, config)
        runtime.publish(timeout)
        return runtime

    early = loaded(0, tmp_path, config)
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(early.publish)
        while not (tmp_path / "rank-0").exists():
            pass
        with pytest.raises(ExchangeError, match="rank 2 did not come"):
            publish(1, 1.0)
        again = pool.submit(publish, 1, 60)
        while not (tmp_path / "rank-1").exists():  # before rank 0 asks it again, which takes who is gone for left
            pass
        others = [publish(2, 60), again.result()]
        waiting.result()
    for runtime in (early, *others):
        check_pass(runtime, OLD)
    for runtime in (early, *others):
        runtime.close()


def test_a_rank_that_died_and_publishes_is_told_to_rejoin(tmp_path: Path) -> None:
    with published(CONFIG, tmp_path, OLD) as (first, second):
        second.close()
        with pytest.raises(ExchangeError, match="is published already: a rank that has died comes back by rejoin"):
            loaded(1, tmp_path).publish()
        check_pass(first, OLD)
        with _rejoined(tmp_path, 1) as again:
            check_pass(again, OLD)


def test_a_mistaken_request_is_no_reason_for_others_to_fail(tmp_path: Path) -> None:
    """Somebody who knows the token asks in a rank's name, while this rank waits for the real one."""
    waiting = loaded(0, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        published_ = pool.submit(waiting.publish)
        while not (tmp_path / "rank-0").exists():
            pass
        place = UnixPlace(tmp_path)
        told = answer_to(place, request(place, rank=7, fingerprint="of another group"), Ledger())
        assert told["error"] == "the configs or the layers of the two ranks differ"
        other = loaded(1, tmp_path)
        other.publish()
        published_.result()
    for runtime in (waiting, other):
        runtime.close()

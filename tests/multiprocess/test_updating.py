"""`updating`: new weights by one tensor after another, under one agreement; nobody reads half of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, Model, check_pass, in_threads, join, published, random_model

from vmm_dwdp import HOST, ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError

CONFIG = DWDPConfig(group_size=3, host_experts=2, mode="in_place", checksums=True)
ALONE = DWDPConfig(group_size=1, host_experts=4, mode="in_place", checksums=True)
SHAPES = {number: {"a": ((11, 30, 50), torch.bfloat16), "b": ((11, 300), torch.float32)} for number in range(4)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    """One rank with a pool of host memory, published."""
    runtime = join(ALONE, 0, tmp_path / "rendezvous", OLD)
    yield runtime
    assert runtime.close().open() == []


def check(runtime: DWDPRuntime, model: Model) -> None:
    for mode in ("staged", "in_place"):
        check_pass(runtime, model, mode=mode)  # type: ignore[arg-type]
    runtime.check_integrity(verify=True)


def pieces(runtime: DWDPRuntime, model: Model) -> Iterator[tuple[int, str, int, int | str, torch.Tensor]]:
    """Every expert that the rank holds, on its own: layer, weight, expert, owner, tensor ``[...]``."""
    for number, weights in model.items():
        for name, whole in weights.items():
            for owner in runtime.held_owners:
                for expert in runtime.local_experts(number, owner):
                    yield number, name, expert, owner, whole[expert]


def stream(runtime: DWDPRuntime, model: Model, seed: int = 0) -> None:
    """One tensor of one expert after another, in no order, as a trainer would send them."""
    shuffled = list(pieces(runtime, model))
    random.Random(seed).shuffle(shuffled)
    with runtime.updating(timeout=20) as update:
        for number, name, expert, owner, tensor in shuffled:
            update.write(number, name, tensor.clone(), experts=expert, owner=owner)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, host_experts=0, num_local_experts=6), replace(CONFIG, resident_cache=30 * PAGE)],
    ids=["host", "overlap", "cache"],
)
def test_experts_of_a_group_one_after_another(config: DWDPConfig, tmp_path: Path) -> None:
    with published(config, tmp_path, OLD) as runtimes:

        def new(rank: int) -> None:
            runtime = runtimes[rank]
            if rank != 1:
                stream(runtime, NEW, seed=rank)
                return
            runtime.update(  # which may be what another rank calls
                {
                    (number, name, owner): whole[experts.start : experts.stop]
                    for number, weights in NEW.items()
                    for name, whole in weights.items()
                    for owner in runtime.held_owners
                    for experts in [runtime.local_experts(number, owner)]
                }  # type: ignore[misc]
            )

        in_threads(new, config.group_size)
        for runtime in runtimes:
            check(runtime, NEW)


def test_a_list_of_tensors_and_parts_of_a_shard(tmp_path: Path) -> None:
    with published(DWDPConfig(group_size=2, assembly="tensor_list"), tmp_path, OLD) as runtimes:

        def new(rank: int) -> None:
            held = runtimes[rank].local_experts(0)
            with runtimes[rank].updating(timeout=20) as update:
                for number, weights in NEW.items():
                    update.write(number, "a", weights["a"][held.start : held.stop])
                    for part in (held[:2], held[2:]):
                        update.write(number, "b", weights["b"][part.start : part.stop], experts=part)

        in_threads(new, 2)
        for runtime in runtimes:
            check_pass(runtime, NEW)


def test_what_is_not_written_stays(runtime: DWDPRuntime) -> None:
    with runtime.updating():
        pass
    check(runtime, OLD)
    with runtime.updating() as update:
        update.write(2, "b", NEW[2]["b"][3:5], experts=range(3, 5))
        update.write(1, "a", OLD[1]["a"][:1], experts=0)
        update.write(1, "a", NEW[1]["a"][:1], experts=0)  # again
    expected = {number: {name: whole.clone() for name, whole in weights.items()} for number, weights in OLD.items()}
    expected[2]["b"][3:5], expected[1]["a"][0] = NEW[2]["b"][3:5], NEW[1]["a"][0]
    check(runtime, expected)


def test_several_threads_write(runtime: DWDPRuntime) -> None:
    with runtime.updating() as update, ThreadPoolExecutor(4) as pool:
        tasks = [
            pool.submit(update.write, number, name, tensor, experts=expert, owner=owner)  # type: ignore[arg-type]
            for number, name, expert, owner, tensor in pieces(runtime, NEW)
        ]
        for task in tasks:
            task.result()
    check(runtime, NEW)


def test_a_body_that_raises(runtime: DWDPRuntime) -> None:
    with pytest.raises(ZeroDivisionError), runtime.updating() as update:  # noqa: PT012
        update.write(1, "a", NEW[1]["a"][:7])
        update.write(1, "b", NEW[1]["b"][7:9], experts=range(7, 9), owner=HOST)
        raise ZeroDivisionError
    for call in (lambda: runtime.acquire(0), runtime.forward_pass().__enter__):
        with pytest.raises(StateError, match="weights are partly old and partly new"):
            call()  # type: ignore[no-untyped-call]

    with pytest.raises(ConfigError, match="layer 1, a: the shard of rank 0 may be half written by an update"):
        runtime.update({(1, "b", HOST): NEW[1]["b"][7:]})
    with (  # noqa: PT012
        pytest.raises(ConfigError, match="layer 1, b: the shard of host memory may be half written by an update"),
        runtime.updating() as update,
    ):
        update.write(1, "a", NEW[1]["a"][:7])
        for expert in (7, 8, 10):  # all but one
            update.write(1, "b", NEW[1]["b"][expert], experts=expert, owner=HOST)
    with pytest.raises(StateError, match="weights are partly old and partly new"):
        runtime.acquire(0)

    with runtime.updating() as update:
        update.write(1, "a", NEW[1]["a"][:7])
        for expert in range(7, 11):
            update.write(1, "b", NEW[1]["b"][expert], experts=expert, owner=HOST)
    expected = {number: dict(weights) for number, weights in OLD.items()}
    expected[1] = {name: torch.cat([NEW[1][name][:7], OLD[1][name][7:]]) for name in ("a", "b")}
    expected[1]["b"] = torch.cat([OLD[1]["b"][:7], NEW[1]["b"][7:]])
    check(runtime, expected)


def test_a_rank_whose_body_raises_bars_the_others(tmp_path: Path) -> None:
    config = replace(CONFIG, group_size=2)
    with published(config, tmp_path, OLD) as runtimes:
        for runtime in runtimes:  # in this thread, in which nothing is acquired afterwards
            check_pass(runtime, OLD)

        def attempt(rank: int) -> str:
            with (  # noqa: PT012
                pytest.raises((ZeroDivisionError, ExchangeError)) as raised,
                runtimes[rank].updating(timeout=5) as update,
            ):
                update.write(0, "b", NEW[0]["b"][runtimes[rank].local_experts(0).start], experts=rank * 5)
                if rank == 1:
                    raise ZeroDivisionError
            return str(raised.value)

        told = in_threads(attempt, 2)
        assert "rank 1" in told[0], told
        for runtime in runtimes:
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.acquire(0)
        in_threads(lambda rank: stream(runtimes[rank], NEW), 2)
        for runtime in runtimes:
            check(runtime, NEW)


CALLS: dict[str, Callable[[DWDPRuntime], object]] = {
    "acquire": lambda runtime: runtime.acquire(0),
    "release": lambda runtime: runtime.release(0),
    "a pass": lambda runtime: runtime.forward_pass().__enter__(),
    "reset": lambda runtime: runtime.reset(),
    "update": lambda runtime: runtime.update({}),
    "updating": lambda runtime: runtime.updating().__enter__(),
    "sleep": lambda runtime: runtime.sleep(),
    "wake": lambda runtime: runtime.wake(),
    "check_integrity": lambda runtime: runtime.check_integrity(),
    "trace": lambda runtime: runtime.trace().__enter__(),
    "tensor_list": lambda runtime: runtime.tensor_list(0, "a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_calls_in_its_block(runtime: DWDPRuntime, call: str) -> None:
    with runtime.updating() as update:
        update.write(0, "a", NEW[0]["a"][:7])
        with pytest.raises(StateError, match="an update is under way: nothing else is allowed in its block"):
            CALLS[call](runtime)
        runtime.stats()
        assert runtime.peers() == {}
    expected = {number: dict(weights) for number, weights in OLD.items()}
    expected[0]["a"] = torch.cat([NEW[0]["a"][:7], OLD[0]["a"][7:]])
    check(runtime, expected)


def test_another_thread_in_its_block(runtime: DWDPRuntime) -> None:
    """Whatever it asks for in the middle, from whichever thread it will pass next."""

    def ask(call: str) -> str:
        with pytest.raises(StateError) as raised:
            CALLS[call](runtime)
        return str(raised.value)

    with ThreadPoolExecutor(1) as pool:
        with runtime.updating() as update:
            update.write(0, "a", NEW[0]["a"][:7])
            told = {call: pool.submit(ask, call).result() for call in CALLS}
        pool.submit(check, runtime, {**OLD, 0: {**OLD[0], "a": torch.cat([NEW[0]["a"][:7], OLD[0]["a"][7:]])}}).result()
    assert all("an update is under way" in sentence for sentence in told.values()), told


def test_what_does_not_fit(runtime: DWDPRuntime) -> None:
    good = NEW[0]["a"]
    with runtime.updating() as update:
        for sentence, arguments, named in [
            ("there is no layer 9", (9, "a", good[:7]), {}),
            ("layer 0 has no weight 'c'", (0, "c", good[:7]), {}),
            ("does not hold the shards of rank 1", (0, "a", good[:7]), {"owner": 1}),
            (r"the shard of rank 0 is \(7, 30, 50\) of torch.bfloat16, not \(8", (0, "a", good[:8]), {}),
            (r"the shard of rank 0 is .* not \(7, 30, 50\) of torch.float32", (0, "a", good[:7].float()), {}),
            (r"has the experts range\(0, 7\), not range\(6, 8\)", (0, "a", good[6:8]), {"experts": range(6, 8)}),
            (r"has the experts range\(0, 7\), not range\(9, 10\)", (0, "a", good[9]), {"experts": 9}),
            (r"not range\(0, 4, 2\)", (0, "a", good[:2]), {"experts": range(0, 4, 2)}),
            (r"the part of range\(2, 4\) of the shard", (0, "a", good[:3]), {"experts": range(2, 4)}),
            ("a shard is a tensor, not list", (0, "a", [1.0]), {"experts": 0}),
        ]:
            with pytest.raises(ConfigError, match=sentence):
                update.write(*arguments, **named)  # type: ignore[arg-type]
    check(runtime, OLD)
    with pytest.raises(StateError, match=r"the update is over: write in the block of runtime.updating"):
        update.write(0, "a", good[:7])
    check(runtime, OLD)


def test_close_in_its_block(tmp_path: Path) -> None:
    runtime = join(ALONE, 0, tmp_path / "rendezvous", OLD)
    with pytest.raises(StateError, match=r"^the runtime is closed$"), runtime.updating() as update:  # noqa: PT012
        update.write(0, "a", NEW[0]["a"][:7])
        assert runtime.close().open() == []
        update.write(0, "a", NEW[0]["a"][:7])
    assert runtime.close().open() == []

    runtime = join(ALONE, 0, tmp_path / "rendezvous", OLD)
    with pytest.raises(StateError, match=r"^the runtime is closed$"), runtime.updating():
        assert runtime.close().open() == []
    assert runtime.close().open() == []

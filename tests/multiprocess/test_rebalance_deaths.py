"""A rank that dies at any step of a rebalance: the others read every expert's right bytes or none, and go on.

`EVERY_POINT=1` tries each step, and not a sample of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.groups import PAGE, add_layers, beside, in_threads, published, random_model, until_rank_1_has_died
from support.moved import ask_for_tables, check_experts, check_held, rebalance, route, write_all

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

CONFIG = DWDPConfig(group_size=3, mode="in_place", movable_experts=True, checksums=True)
SHAPES = {number: {"a": ((9, 1777), torch.bfloat16), "b": ((9, 300), torch.float32)} for number in range(2)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)
SOON = 3.0  # seconds: for a rank that does not come
FAVOURITES = {0: [0, 1, 2], 1: [3, 4, 5]}


def prepare(runtime: DWDPRuntime) -> None:
    ask_for_tables(runtime, OLD)
    route(runtime, FAVOURITES)


def parts(runtime: DWDPRuntime) -> dict[str, tuple[Any, str]]:
    """What a rebalance comes to, by a word: words to others, numbers from them, what is read, and what is written."""
    membership, assembly = runtime._membership, runtime._assembly
    return {
        "word": (membership._exchange, "_send"),
        "numbers": (membership._exchange, "collect_numbers"),
        "read": (assembly, "shard"),
        "table": (assembly.tables, "change"),
        "write": (assembly, "writing"),
        "sums": (membership, "_sum_held_shards"),
        "edges": (membership, "_fill_edges"),
    }


def before(runtime: DWDPRuntime, word: str, number: int, end: Callable[[], object]) -> None:
    """``end`` comes before the so-manieth call."""
    owner, name = parts(runtime)[word]
    real, left = getattr(owner, name), [number]

    def counted(*given: Any, **named: Any) -> Any:
        if not left[0]:
            end()
        left[0] -= 1
        return real(*given, **named)

    setattr(owner, name, counted)


def dies_before(word: str, number: int) -> Callable[[DWDPRuntime], None]:
    """A script: or at the end, if there are not so many calls."""

    def script(runtime: DWDPRuntime) -> None:
        prepare(runtime)
        before(runtime, word, number, lambda: os._exit(7))
        runtime.rebalance(timeout=SOON)

    return script


STEPS = {"word": 16, "numbers": 4, "read": 16, "table": 1, "write": 6, "sums": 1, "edges": 1}
TRIED = STEPS.keys() if "EVERY_POINT" in os.environ else ()
DEATHS = [
    (word, number)
    for word, count in STEPS.items()
    for number in (range(count) if word in TRIED else sorted({0, *range(3, count, 4), count - 1}))
]


def test_there_are_so_many_steps(tmp_path: Path) -> None:
    """At least, of each kind: so that what is killed above is all of it."""
    with published(CONFIG, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            prepare(runtime)
        with ExitStack() as watching:
            calls = {
                word: watching.enter_context(mock.patch.object(owner, name, wraps=getattr(owner, name)))
                for word, (owner, name) in parts(runtimes[1]).items()
            }
            assert rebalance(runtimes) > 0
        found = {word: each.call_count for word, each in calls.items()}
        assert found["word"] >= STEPS["word"]
        assert {**found, "word": STEPS["word"]} == STEPS


def read(runtime: DWDPRuntime) -> bool:
    """Whether this rank reads; then all bytes are right."""
    try:
        check_experts(runtime, OLD)
    except StateError as error:
        assert "weights are partly old and partly new" in str(error)  # noqa: PT017
        return False
    check_experts(runtime, OLD, "staged")
    return True


@pytest.mark.parametrize(("word", "number"), DEATHS)
def test_a_rank_that_dies_takes_no_expert_with_it(tmp_path: Path, word: str, number: int) -> None:
    with beside(CONFIG, tmp_path, OLD, dies_before(word, number)) as ranks:
        for runtime in ranks:
            prepare(runtime)

        def attempt(runtime: DWDPRuntime) -> str:
            try:
                runtime.rebalance(timeout=SOON)
            except ExchangeError as error:
                return str(error)
            return "done"

        told = in_threads(lambda n: attempt(ranks[n]), 2)
        assert any("rank 1" in sentence for sentence in told) or set(told) == {"done"}, told
        reads = [read(runtime) for runtime in ranks]
        for sentence, reading in zip(told, reads, strict=True):
            assert reading == (sentence == "done" or sentence.startswith("nothing was written")), sentence
        until_rank_1_has_died()
        back = DWDPRuntime(CONFIG, 1, "cpu", tmp_path, driver=HostDriver(PAGE))
        add_layers(back, OLD)
        back.rejoin()
        ask_for_tables(back, OLD)
        everybody = [ranks[0], back, ranks[1]]
        if not all([*reads, read(back)]):
            in_threads(lambda rank: write_all(everybody[rank], NEW), 3)
        model = OLD if all(reads) else NEW
        for runtime in everybody:
            check_experts(runtime, model)
            check_experts(runtime, model, "staged")
            runtime.check_integrity(verify=True)
        check_held(everybody, model)
        for runtime in everybody:
            route(runtime, {0: ranks[0].held_experts(0), 1: ranks[0].held_experts(1)})
        rebalance(everybody)
        for runtime in everybody:
            check_experts(runtime, model)
        assert back.close().open() == []


class _Raised(Exception):
    """Of this rank's own."""


@contextmanager
def broken_off(tmp_path: Path, word: str, number: int) -> Iterator[list[DWDPRuntime]]:
    """Three ranks, after the second has raised at a step, and the others with it."""
    with published(CONFIG, tmp_path, OLD) as runtimes:
        for runtime in runtimes:
            prepare(runtime)

        def end() -> None:
            raise _Raised

        before(runtimes[1], word, number, end)

        def attempt(rank: int) -> None:
            with suppress(_Raised, ExchangeError):
                runtimes[rank].rebalance(timeout=SOON)

        in_threads(attempt, 3)
        owner, name = parts(runtimes[1])[word]
        delattr(owner, name)
        yield runtimes


@pytest.mark.parametrize(("word", "number"), DEATHS)
def test_whatever_raises_on_one_rank_loses_no_expert(tmp_path: Path, word: str, number: int) -> None:
    """All live, and go on: by another rebalance, or once all that was being moved is written."""
    with broken_off(tmp_path, word, number) as runtimes:
        reads = [read(runtime) for runtime in runtimes]
        model = OLD
        if not all(reads):
            model = NEW
            in_threads(lambda rank: write_all(runtimes[rank], NEW), 3)
        for runtime in runtimes:
            check_experts(runtime, model)
            runtime.check_integrity(verify=True)
        check_held(runtimes, model)
        for runtime in runtimes:
            route(runtime, FAVOURITES)
        rebalance(runtimes)
        for runtime in runtimes:
            check_experts(runtime, model)


def test_what_was_being_moved_has_to_be_written_whole(tmp_path: Path) -> None:
    """By ranks that had not begun to write, too: what others wrote may have been theirs alone."""
    with broken_off(tmp_path, "table", 0) as runtimes:
        for runtime in runtimes:
            assert not read(runtime)
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.rebalance(timeout=1)
            with pytest.raises(ConfigError, match="may be half written by an update that was not finished"):
                runtime.update({}, timeout=1)
        in_threads(lambda rank: write_all(runtimes[rank], NEW), 3)
        for runtime in runtimes:
            check_experts(runtime, NEW)
        check_held(runtimes, NEW)
        orders = {tuple(runtime.held_experts(0, rank) for rank in range(3)) for runtime in runtimes}
        assert len(orders) == 1, "all go by one"

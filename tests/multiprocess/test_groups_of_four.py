"""Four ranks, of which one dies in a pass, in an update and in sleep: the others go on, and it comes back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, Model, add_layers, answered, check_pass, in_threads, join, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.allocator.host_driver import HostDriver

CONFIG = DWDPConfig(group_size=4, num_local_experts=4, host_experts=1, mode="in_place", checksums=True)
DEAD = 2
SHAPES = {number: {"w": ((12, 1777), torch.bfloat16)} for number in range(5)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)


def read(runtime: DWDPRuntime, model: Model) -> None:
    for mode in ("staged", "in_place"):
        check_pass(runtime, model, mode=mode)  # type: ignore[arg-type]


def update(runtime: DWDPRuntime, before_the_last: Callable[[], object] = bool) -> None:
    """One expert after another."""
    with runtime.updating(timeout=20) as writing:
        for number, weights in NEW.items():
            for owner in runtime.held_owners:
                for expert in runtime.local_experts(number, owner):
                    if number == len(NEW) - 1:
                        before_the_last()
                    writing.write(number, "w", weights["w"][expert], experts=expert, owner=owner)


def a_pass(runtime: DWDPRuntime) -> None:
    read(runtime, OLD)
    answered(runtime)  # of `publish`, for which the others may still wait
    runtime.acquire(1)
    os._exit(7)


def an_update(runtime: DWDPRuntime) -> None:
    update(runtime, lambda: os._exit(7))


def to_sleep(runtime: DWDPRuntime) -> None:
    runtime._assembly.give_back = lambda: os._exit(7)  # type: ignore[method-assign, assignment]
    runtime.sleep(timeout=20)


def to_wake(runtime: DWDPRuntime) -> None:
    runtime.sleep(timeout=20)
    answered(runtime)
    runtime._assembly.build = lambda: os._exit(7)  # type: ignore[method-assign, assignment]
    runtime.wake(timeout=20)


# What the one does that dies in it, and what the others do meanwhile.
DEATHS: dict[str, tuple[Callable[[DWDPRuntime], None], list[Callable[[DWDPRuntime], None]]]] = {
    "a pass": (a_pass, []),
    "an update": (an_update, [update]),
    "falling asleep": (to_sleep, [lambda runtime: runtime.sleep(timeout=20)]),
    "waking": (to_wake, [lambda runtime: runtime.sleep(timeout=20), lambda runtime: runtime.wake(timeout=20)]),
}


@pytest.mark.parametrize("death", DEATHS)
def test_one_of_four_dies(tmp_path: Path, death: str) -> None:
    dies, others_do = DEATHS[death]
    child = os.fork()
    if not child:
        try:
            dies(join(CONFIG, DEAD, tmp_path, OLD))
        finally:
            os._exit(1)
    living = [rank for rank in range(4) if rank != DEAD]
    ranks = dict(zip(living, in_threads(lambda n: join(CONFIG, living[n], tmp_path, OLD), 3), strict=True))

    def go_on(rank: int) -> None:
        with suppress(ExchangeError):
            for call in others_do:
                call(ranks[rank])

    in_threads(lambda n: go_on(living[n]), 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for runtime in ranks.values():
        if death == "an update":
            with pytest.raises(StateError, match="weights are partly old and partly new"):
                runtime.acquire(0)
            continue
        try:
            read(runtime, OLD)
        except StateError as error:
            assert death != "a pass"
            assert "the group sleeps" in str(error)  # noqa: PT017

    back = ranks[DEAD] = DWDPRuntime(CONFIG, DEAD, "cpu", tmp_path, driver=HostDriver(PAGE))
    add_layers(back, OLD)
    back.rejoin(timeout=20)
    for call in (lambda runtime: runtime.wake(timeout=20), update, lambda runtime: runtime.sleep(timeout=20)):
        in_threads(lambda rank, call=call: call(ranks[rank]), 4)  # type: ignore[misc]
    in_threads(lambda rank: ranks[rank].wake(timeout=20), 4)
    for runtime in ranks.values():
        read(runtime, NEW)
        runtime.check_integrity(verify=True)
    for runtime in ranks.values():
        assert runtime.close().open() == []

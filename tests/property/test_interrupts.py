"""An exception at any point of any call, followed by what the documentation says to do: every byte is right then.

A sample of the points; with EVERY_POINT=1 every place in the code, the first time that it is passed and the last; with
EVERY_POINT=3/8 the third of eight parts of them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from support.answering import Answering, AnsweringOverTCP
from support.drivers import CallFault, FailingDriver, NativeDriver, Refusal
from support.groups import PAGE
from support.interrupter import Alarm, How, Interrupted, Interrupter, sweep
from support.subjects import (
    Close,
    GiveUp,
    Group,
    LookUp,
    MakeDriver,
    Pass,
    PassGoneOn,
    Publish,
    Rebalance,
    Refresh,
    Reset,
    Settle,
    Sleep,
    StatedPass,
    Traced,
    Update,
    UpdateAndRead,
    Updating,
    Wake,
)

from vmm_dwdp import DriverError, DWDPConfig
from vmm_dwdp.config import Mode

IN_ORDER, OUT_OF_ORDER = [0, 1, 2, 3, 4], [1, 0, 4, 2, 3]
HOST = DWDPConfig(group_size=1, host_experts=4, checksums=True)
PAIR = DWDPConfig(group_size=2, num_local_experts=4, host_experts=1, checksums=True)  # which overlap
FOUR = replace(PAIR, group_size=4, num_local_experts=2)
AUTO = replace(PAIR, num_local_experts="auto")
MOVABLE = replace(HOST, mode="auto", resident_cache=4 * PAGE, movable_experts=True)
ISSUERS: dict[str, tuple[DWDPConfig, MakeDriver]] = {
    "launching thread": (HOST, FailingDriver),
    "thread": (replace(PAIR, slice_bytes=64), FailingDriver),  # so short that a layer has many
    "native thread": (HOST, NativeDriver),
}
MODES: dict[str, dict[str, Any]] = {
    "one slot": {"prefetch_depth": 1},
    "two slots": {},
    "in place": {"mode": "in_place"},
    "in place alone": {"mode": "in_place", "prefetch_depth": 0},
    "auto": {"mode": "auto", "resident_cache": 4 * PAGE},
    "bank": {"mode": "in_place", "expert_bank": 5 * 3 * PAGE},  # two experts of each layer
}


@pytest.fixture(params=ISSUERS)
def issuer(request: pytest.FixtureRequest) -> tuple[DWDPConfig, MakeDriver]:
    """A config, and a driver, with which copies are given so."""
    return ISSUERS[request.param]


@pytest.mark.parametrize("order", [IN_ORDER, OUT_OF_ORDER], ids=["in order", "out of order"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [Interrupted, Alarm])
def test_acquire_and_release(
    issuer: tuple[DWDPConfig, MakeDriver], mode: str, order: list[int], error: type[BaseException]
) -> None:
    config, driver = issuer
    config = replace(config, **MODES[mode])
    sweep(lambda: Pass(config, driver, order, None), lambda at: Interrupter(at, "line", error), most=25)


def test_acquire_and_release_by_signals(issuer: tuple[DWDPConfig, MakeDriver]) -> None:
    config, driver = issuer
    sweep(lambda: Pass(config, driver, IN_ORDER, None), lambda at: Interrupter(at, "signal"), most=60)


@pytest.mark.parametrize(("config", "most"), [(PAIR, 60), (FOUR, 20)], ids=["two", "four"])
def test_acquire_and_release_in_a_group(config: DWDPConfig, most: int) -> None:
    sweep(lambda: Pass(config, FailingDriver, OUT_OF_ORDER, None), lambda at: Interrupter(at), most=most)


@pytest.mark.parametrize("how", ["line", "signal"])
@pytest.mark.parametrize(("config", "most"), [(HOST, 60), (PAIR, 20)], ids=["one", "two"])
def test_look_up(config: DWDPConfig, most: int, how: How) -> None:
    config = replace(config, **MODES["bank"])
    sweep(lambda: LookUp(config, FailingDriver, OUT_OF_ORDER, None), lambda at: Interrupter(at, how), most=most)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_reset(issuer: tuple[DWDPConfig, MakeDriver], mode: Mode) -> None:
    config, driver = issuer
    config = replace(config, mode="in_place")
    sweep(lambda: Reset(config, driver, (), mode), lambda at: Interrupter(at), most=60)


def test_trace(issuer: tuple[DWDPConfig, MakeDriver]) -> None:
    config, driver = issuer
    sweep(lambda: Traced(config, driver, IN_ORDER, None), lambda at: Interrupter(at, "signal"), most=40)


@pytest.mark.parametrize("mode", ["two slots", "auto", "bank"])
@pytest.mark.parametrize("how", ["line", "signal"])
def test_update(mode: str, how: How) -> None:
    sweep(lambda: Update(replace(HOST, **MODES[mode]), FailingDriver), lambda at: Interrupter(at, how), most=60)


@pytest.mark.parametrize("how", ["line", "signal"])
def test_a_pass_that_is_stated_once(issuer: tuple[DWDPConfig, MakeDriver], how: How) -> None:
    config, driver = issuer
    config = replace(config, mode="in_place")
    sweep(lambda: StatedPass(config, driver, [0, 1, 2], "staged"), lambda at: Interrupter(at, how), most=10)


@pytest.mark.parametrize("how", ["line", "signal"])
def test_updating(how: How) -> None:
    sweep(lambda: Updating(replace(HOST, mode="in_place"), FailingDriver), lambda at: Interrupter(at, how), most=12)


@pytest.mark.parametrize("subject", [Update, Updating])
def test_update_of_a_group(subject: type[Update]) -> None:
    sweep(lambda: subject(PAIR, FailingDriver), lambda at: Interrupter(at), most=8)


@pytest.mark.parametrize("how", ["line", "signal"])
@pytest.mark.parametrize("mode", ["auto", "bank"])
@pytest.mark.parametrize("subject", [Sleep, GiveUp, Wake])
def test_sleep_and_wake(subject: type[Any], mode: str, how: How) -> None:
    config = replace(HOST, **MODES[mode])
    sweep(lambda: subject(config, FailingDriver), lambda at: Interrupter(at, how), most=5)


@pytest.mark.parametrize("subject", [Sleep, Wake])
def test_sleep_and_wake_of_a_group(subject: type[Any]) -> None:
    sweep(lambda: subject(PAIR, FailingDriver), lambda at: Interrupter(at), most=3)


@pytest.mark.parametrize("how", ["line", "signal"])
def test_rebalance_of_one(how: How) -> None:
    sweep(lambda: Rebalance(MOVABLE, FailingDriver), lambda at: Interrupter(at, how), most=8)


def test_rebalance_of_a_group() -> None:
    config = replace(MOVABLE, group_size=2, host_experts=1)
    sweep(lambda: Rebalance(config, FailingDriver), lambda at: Interrupter(at), most=8)


@pytest.mark.parametrize("subject", [Updating, Sleep, Wake, Rebalance])
def test_a_group_of_four(subject: type[Any]) -> None:
    config = replace(FOUR, mode="auto", movable_experts=True) if subject is Rebalance else FOUR
    sweep(lambda: subject(config, FailingDriver), lambda at: Interrupter(at), most=1)


@pytest.mark.parametrize("how", ["line", "signal"])
def test_settle_of_a_group(how: How) -> None:
    sweep(lambda: Settle(AUTO, FailingDriver), lambda at: Interrupter(at, how), most=3)


@pytest.mark.parametrize("how", ["line", "signal"])
def test_refresh_cache(how: How) -> None:
    config = replace(HOST, mode="in_place", resident_cache=4 * PAGE)
    sweep(lambda: Refresh(config, FailingDriver), lambda at: Interrupter(at, how), most=60)


@pytest.mark.parametrize("driver", [FailingDriver, NativeDriver])
@pytest.mark.parametrize("mode", ["two slots", "auto", "bank"])
@pytest.mark.parametrize("subject", [Publish, Close])
def test_publish_and_close(subject: type[Any], mode: str, driver: MakeDriver) -> None:
    config = replace(HOST, **MODES[mode])
    sweep(lambda: subject(config, driver), lambda at: Interrupter(at, "signal"), most=40)


def test_publish_of_a_group() -> None:
    sweep(lambda: Publish(PAIR, FailingDriver), lambda at: Interrupter(at, "signal"), most=5)


@pytest.mark.parametrize("answering", [Answering, AnsweringOverTCP])
def test_beginning_to_answer_others_at_every_point(answering: type[Answering]) -> None:
    sweep(answering, lambda at: Interrupter(at, "signal"), most=sys.maxsize)


def test_close_of_a_group() -> None:
    config, driver = ISSUERS["thread"]
    sweep(lambda: Close(config, driver), lambda at: Interrupter(at, "signal"), most=20)


# -- every call of the driver ------------------------------------------------------------------------------------------
def _faults(
    subject: type[Any],
    config: DWDPConfig,
    driver: MakeDriver,
    error: type[BaseException],
    *args: Any,
    most: int = 40,
) -> None:
    """A sweep over the driver's calls; of the latest driver that ``driver`` made."""
    made: list[FailingDriver] = []

    def make_driver() -> FailingDriver:
        made.append(driver())
        return made[-1]

    sweep(lambda: subject(config, make_driver, *args), lambda at: CallFault(made[-1], at, error), most=most)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", MODES)
def test_a_driver_call_of_a_pass(issuer: tuple[DWDPConfig, MakeDriver], mode: str, error: type[BaseException]) -> None:
    config, driver = issuer
    _faults(Pass, replace(config, **MODES[mode]), driver, error, OUT_OF_ORDER, None)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
def test_a_driver_call_of_look_up(error: type[BaseException]) -> None:
    _faults(LookUp, replace(HOST, **MODES["bank"]), FailingDriver, error, OUT_OF_ORDER, None)


def test_a_pass_goes_on_after_a_call_that_failed(issuer: tuple[DWDPConfig, MakeDriver]) -> None:
    config, driver = issuer
    _faults(PassGoneOn, config, driver, DriverError, OUT_OF_ORDER, None)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
@pytest.mark.parametrize("subject", [Reset, Traced])
def test_a_driver_call_of_reset_or_trace(subject: type[Any], error: type[BaseException]) -> None:
    _faults(subject, HOST, FailingDriver, error, IN_ORDER, "staged")


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
@pytest.mark.parametrize("subject", [Update, Refresh, Publish, Close])
def test_a_driver_call_of_what_comes_seldom(subject: type[Any], error: type[BaseException]) -> None:
    _faults(subject, replace(HOST, mode="in_place", resident_cache=4 * PAGE), FailingDriver, error)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
@pytest.mark.parametrize("subject", [Update, Publish, Close])
def test_a_driver_call_of_what_comes_seldom_with_a_bank(subject: type[Any], error: type[BaseException]) -> None:
    _faults(subject, replace(HOST, **MODES["bank"]), FailingDriver, error)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["auto", "bank"])
@pytest.mark.parametrize("subject", [Sleep, GiveUp, Wake])
def test_a_driver_call_of_sleep_and_wake(subject: type[Any], mode: str, error: type[BaseException]) -> None:
    _faults(subject, replace(HOST, **MODES[mode]), FailingDriver, error, most=8)


@pytest.mark.parametrize("error", [DriverError, KeyboardInterrupt])
def test_a_driver_call_of_rebalance(error: type[BaseException]) -> None:
    _faults(Rebalance, replace(MOVABLE, group_size=2, host_experts=1), FailingDriver, error, most=12)


@pytest.mark.parametrize("at", [0, 1, 5, 20])
@pytest.mark.parametrize("name", ISSUERS)
def test_close_on_a_device_that_fails_for_good(name: str, at: int) -> None:
    """As after a kernel that faulted: a sentence, the door shut, no thread left; the rest once the device is back."""
    changed = {"launching thread": {}, "thread": {"slice_bytes": 64}, "native thread": {}}[name]
    group = Group(replace(PAIR, **changed), ISSUERS[name][1])  # type: ignore[arg-type]
    other = group.others[0]
    with CallFault(group.driver, at, sticky=True), pytest.raises(DriverError, match="INJECTED"):
        group.runtime.close()
    alive, threads = other.peers()[0], [each for each in group.runtime.ledger.open() if each.startswith("threads")]
    group.close()
    assert not alive, "the others see this rank alive"
    assert not threads, f"close left {threads}"


@pytest.mark.parametrize("subject", [Pass, PassGoneOn])
@pytest.mark.parametrize("order", [IN_ORDER, OUT_OF_ORDER], ids=["in order", "out of order"])
def test_a_callback_of_the_native_thread(subject: type[Any], order: list[int]) -> None:
    made: list[NativeDriver] = []

    def make_driver() -> NativeDriver:
        made.append(NativeDriver())
        return made[-1]

    sweep(lambda: subject(HOST, make_driver, order, None), lambda at: Refusal(made[-1], at), most=60)


def test_a_callback_of_the_native_thread_after_an_update() -> None:
    made: list[NativeDriver] = []

    def make_driver() -> NativeDriver:
        made.append(NativeDriver())
        return made[-1]

    sweep(lambda: UpdateAndRead(HOST, make_driver), lambda at: Refusal(made[-1], at), most=20)


def test_the_three_issuers_are_what_they_are_called() -> None:
    for name, (config, driver) in ISSUERS.items():
        group = Group(config, driver)
        path = group.runtime.stats().copy_path
        group.close()
        assert path is not None
        assert path.issued_by == name

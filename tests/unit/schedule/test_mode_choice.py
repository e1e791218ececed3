"""The mode that auto chooses, against devices on which a pass takes as long as the test says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.groups import check_pass, join, random_model

from vmm_dwdp import ConfigError, DWDPConfig
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.config import Mode, ModeSetting
from vmm_dwdp.observe.guard import Guard
from vmm_dwdp.schedule.mode_choice import FORGET, RETRY, RETRY_TRIED, SAMPLES, TRIAL, ModeChooser, crossover

EXPERTS, TOP_K, LAYERS = 128, 8, 3
PassTime = Callable[[int, Mode], float]


class Clock:
    """What `ModeChooser` uses of a driver, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.behind = False  # whether the device has not come to the latest events yet
        self.captured = 0
        self._recorded: dict[int, float] = {}

    def create_event(self, timed: bool) -> int:
        assert timed
        self._recorded[len(self._recorded)] = 0.0
        return len(self._recorded) - 1

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        assert not self.captured
        self._recorded[event] = self.now

    def complete(self, event: int) -> bool:
        assert not self.captured
        return not self.behind

    def elapsed(self, start: int, end: int) -> float:
        return self._recorded[end] - self._recorded[start]

    def capture(self, stream: int) -> int:
        return self.captured


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chooser(clock: Clock) -> Iterator[ModeChooser]:
    ledger = Ledger()
    chooser = ModeChooser(clock, ledger, EXPERTS, LAYERS)  # type: ignore[arg-type]
    yield chooser
    chooser.close()
    assert ledger.open() == []


def begin(chooser: ModeChooser, tokens: int, asked: ModeSetting = "auto") -> Mode:
    mode = chooser.choose(0, asked, tokens, TOP_K, 0)
    chooser.acquired(0, mode)
    return mode


def run_pass(chooser: ModeChooser, clock: Clock, tokens: int, takes: PassTime) -> Mode:
    mode = begin(chooser, tokens)
    for layer in range(LAYERS):
        if layer > 0:
            assert chooser.choose(layer, "auto", None, None, 0) == mode
            chooser.acquired(layer, mode)
        clock.now += takes(tokens, mode) / LAYERS
        chooser.release(layer, 0)
    return mode


def distinct(tokens: int) -> float:
    return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)


def device(in_place_rate: float, compute_per_token: float = 0.05, skew: float = 1.0) -> PassTime:
    """In units of the copy of one expert. Reading in place reads a weight again for every 128 rows of an expert."""

    def takes(tokens: int, mode: Mode) -> float:
        compute = compute_per_token * tokens
        if mode == "staged":
            return max(float(EXPERTS), compute)
        again = max(1.0, tokens * TOP_K / EXPERTS / 128)
        return max(distinct(tokens) * skew * again / in_place_rate, compute)

    return takes


ALL_TOKENS = [*range(1, 17), *(2**power for power in range(5, 16)), 24, 48, 96, 192]


@pytest.mark.parametrize("in_place_rate", [0.05, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("compute_per_token", [0.001, 0.05, 2.0])
def test_auto_is_as_fast_as_the_faster_mode(
    chooser: ModeChooser, clock: Clock, in_place_rate: float, compute_per_token: float
) -> None:
    takes = device(in_place_rate, compute_per_token)
    for tokens in ALL_TOKENS * 2:
        for _ in range(4 * SAMPLES):
            run_pass(chooser, clock, tokens, takes)
    for tokens in ALL_TOKENS:
        better = min(takes(tokens, "staged"), takes(tokens, "in_place"))
        chosen = run_pass(chooser, clock, tokens, takes)
        if in_place_rate >= 0.2 or tokens > 8:  # nobody tries a pass of few tokens staged without having seen anything
            assert takes(tokens, chosen) <= 1.05 * better, (tokens, chosen)


@pytest.mark.parametrize("filled", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [1, 8, 24, 48, 96, 256, 1024, 8192])
def test_auto_tries_where_the_cache_can_make_a_difference(clock: Clock, tokens: int, filled: float) -> None:
    """With a quarter of the experts in it, reading in place is faster for hundreds of tokens."""
    takes = device(0.9, skew=1 - filled)
    with ModeChooser(clock, Ledger(), EXPERTS, LAYERS, cached=0.25) as chooser:  # type: ignore[arg-type]
        for _ in range(4 * SAMPLES):
            run_pass(chooser, clock, tokens, takes)
        better = min(takes(tokens, "staged"), takes(tokens, "in_place"))
        assert takes(tokens, run_pass(chooser, clock, tokens, takes)) <= 1.05 * better


def test_what_surely_is_slower_is_never_tried(chooser: ModeChooser, clock: Clock) -> None:
    takes = device(0.8)
    assert {run_pass(chooser, clock, tokens, takes) for tokens in (1, 2, 4) for _ in range(RETRY)} == {"in_place"}
    assert {run_pass(chooser, clock, tokens, takes) for tokens in (512, 32768) for _ in range(RETRY)} == {"staged"}


@pytest.mark.parametrize("tokens", [8, 12, 60])
@pytest.mark.parametrize("slower", [1.02, 1.1, 2.0, 8.0])
@pytest.mark.parametrize("better", ["staged", "in_place"])
def test_trials_cost_little_where_the_routing_stays(
    chooser: ModeChooser, clock: Clock, tokens: int, slower: float, better: Mode
) -> None:
    modes = [run_pass(chooser, clock, tokens, lambda _, mode: 1.0 if mode == better else slower) for _ in range(9000)]
    assert set(modes[RETRY:]) == {"staged", "in_place"}
    assert clock.now < 1.015 * len(modes)


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.1), (0.1, 1.0)])
def test_a_change_of_the_routing_is_noticed(chooser: ModeChooser, clock: Clock, before: float, after: float) -> None:
    for skew in (before, after):
        takes = device(0.8, skew=skew)
        for _ in range(2 * RETRY):
            run_pass(chooser, clock, 64, takes)
        modes = [run_pass(chooser, clock, 64, takes) for _ in range(RETRY)]
        better = min(("staged", "in_place"), key=lambda mode: takes(64, mode))
        assert modes.count(better) > 0.95 * len(modes)


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.75), (0.75, 1.0)])
def test_near_the_crossover_a_change_of_the_routing_is_noticed_soon(
    chooser: ModeChooser, clock: Clock, before: float, after: float
) -> None:
    """With even routing, staged passes of 48 tokens are 2 % faster; with skewed routing, those in place by a third."""
    for skew in (before, after):
        takes = device(0.935, skew=skew)
        better = min(("staged", "in_place"), key=lambda mode: takes(48, mode))
        modes = [run_pass(chooser, clock, 48, takes) for _ in range(2 * RETRY_TRIED)]
        settled = modes[RETRY_TRIED + 2 * SAMPLES :]
        assert len(settled) - settled.count(better) <= SAMPLES + 1  # one trial


@pytest.mark.parametrize(("before", "after"), [((48, 1.0), (64, 0.75)), ((64, 0.75), (48, 1.0))])
def test_beyond_a_border_a_change_of_the_routing_is_noticed(
    chooser: ModeChooser, clock: Clock, before: tuple[int, float], after: tuple[int, float]
) -> None:
    """Passes of one number of tokens move a border, and from then on there are only others, beyond it, for which the
    other mode is faster by an eighth with their routing."""
    for tokens, skew in (before, after):
        takes = device(0.85, skew=skew)
        better = min(("staged", "in_place"), key=lambda mode: takes(tokens, mode))
        modes = [run_pass(chooser, clock, tokens, takes) for _ in range(2 * FORGET)]
        settled = modes[FORGET + 2 * (SAMPLES + 1) :]
        assert settled.count(better) > 0.9 * len(settled)


@pytest.mark.parametrize("in_place_rate", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("stays", [FORGET // 8, FORGET + 1])
def test_trials_cost_little_where_the_number_of_tokens_changes(
    chooser: ModeChooser, clock: Clock, in_place_rate: float, stays: int
) -> None:
    """So slowly, too, that what was known of it is forgotten each time."""
    takes = device(in_place_rate)
    best = 0.0
    for tokens in [tokens for tokens in (8, 48, 16, 96, 24, 64, 32, 12) * 4 for _ in range(stays)]:
        run_pass(chooser, clock, tokens, takes)
        best += min(takes(tokens, "staged"), takes(tokens, "in_place"))
    assert clock.now < 1.01 * best


def test_only_passes_that_follow_one_of_their_own_mode_count(chooser: ModeChooser, clock: Clock) -> None:
    last: list[Mode] = ["staged"]

    def takes(tokens: int, mode: Mode) -> float:
        """The first staged pass finds layers in the slots, and the first in place finds the link busy."""
        changed = last[0] != mode
        last[0] = mode
        return {("staged", False): 2.0, ("in_place", False): 1.0, ("staged", True): 0.1, ("in_place", True): 9.0}[
            mode, changed
        ]

    for _ in range(50):
        run_pass(chooser, clock, 20, takes)
    choice = chooser.choice()
    assert choice is not None
    (seconds,) = choice.seconds.values()
    assert seconds == pytest.approx({"staged": 2.0, "in_place": 1.0})


def test_a_trial_whose_passes_cannot_be_timed_ends(chooser: ModeChooser, clock: Clock) -> None:
    """Every pass of 16 tokens follows one in place, so staged ones of its own are never comparable."""
    takes = device(0.8)
    modes = []
    for _ in range(RETRY):
        run_pass(chooser, clock, 1, takes)
        modes.append(run_pass(chooser, clock, 16, takes))
    assert modes.count("staged") <= TRIAL


def test_a_device_that_is_behind_is_not_waited_for(chooser: ModeChooser, clock: Clock) -> None:
    clock.behind = True
    takes = device(0.8)
    for _ in range(100):
        run_pass(chooser, clock, 20, takes)
    choice = chooser.choice()
    assert choice is not None
    assert all(not seconds for seconds in choice.seconds.values())
    clock.behind = False
    modes = [run_pass(chooser, clock, 20, takes) for _ in range(100)]
    assert modes[-1] == "in_place"


def test_a_pass_that_ended_early_is_not_timed(chooser: ModeChooser, clock: Clock) -> None:
    for _ in range(20):
        begin(chooser, 20)
        clock.now += 1000
        run_pass(chooser, clock, 20, device(0.8))
    choice = chooser.choice()
    assert choice is not None
    assert all(seconds < 1000 for modes in choice.seconds.values() for seconds in modes.values())


@pytest.mark.parametrize("asked", ["auto", "staged", "in_place"])
def test_a_pass_that_was_refused_is_neither_timed_nor_the_pass_before(
    chooser: ModeChooser, clock: Clock, asked: ModeSetting
) -> None:
    for _ in range(20):
        chooser.choose(0, asked, 20, TOP_K, 0)
        clock.now += 1000
        begin(chooser, 20, asked="in_place")  # so passes in place count, and staged ones do not
        chooser.release(LAYERS - 1, 0)
        run_pass(chooser, clock, 20, device(0.8))
    choice = chooser.choice()
    assert choice is not None
    (seconds,) = choice.seconds.values()
    assert list(seconds) == ["in_place"]
    assert seconds["in_place"] < 1000


def test_a_capture_takes_what_is_known_and_times_nothing(chooser: ModeChooser, clock: Clock) -> None:
    clock.captured = 1
    assert run_pass(chooser, clock, 20, device(0.1)) == "in_place"
    assert run_pass(chooser, clock, 32, device(0.1)) == "staged"
    clock.captured = 0
    for _ in range(20):
        run_pass(chooser, clock, 20, device(0.1))
    clock.captured = 2
    assert run_pass(chooser, clock, 20, device(0.1)) == "staged"


def test_the_supposed_crossover_is_where_both_take_the_same_time() -> None:
    tokens = crossover(EXPERTS, TOP_K, 0.8)
    assert math.isclose(EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens), 0.8 * EXPERTS)
    assert crossover(4, 4, 0.8) < 1  # every token uses all experts


MODEL = random_model({number: {"w": ((16, 1000), torch.float32)} for number in range(4)})


def test_a_runtime_chooses_for_whole_passes(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=12, mode="auto")
    runtime = join(config, 0, tmp_path / "rendezvous", MODEL)
    assert runtime.stats().mode_choice is None
    with pytest.raises(ConfigError, match="tell it when the first layer is acquired"):
        runtime.acquire(0)
    for tokens, in_place in ((1, 4), (1000, 4), (1, 8)):
        for number in MODEL:
            with runtime.layer(number, tokens=tokens, top_k=1):
                pass
        assert runtime.stats().in_place == in_place
    choice = runtime.stats().mode_choice
    assert choice is not None
    assert 1 < choice.in_place_below < choice.staged_from <= 1000
    check_pass(runtime, MODEL, mode="staged")
    assert runtime.close().open() == []


def test_a_runtime_times_its_trials(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=1, host_experts=12, mode="auto")
    with join(config, 0, tmp_path / "rendezvous", MODEL) as runtime:
        check_pass(runtime, MODEL, tokens=1)
        choice = runtime.stats().mode_choice
        assert choice is not None
        for _ in range(TRIAL):
            check_pass(runtime, MODEL, tokens=(choice.in_place_below + choice.staged_from) // 2)
        choice = runtime.stats().mode_choice
        assert choice is not None
        assert {"staged", "in_place"} in [set(seconds) for seconds in choice.seconds.values()]


def test_trials_are_no_reason_for_advice(tmp_path: Path) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=12, mode="auto"), 0, tmp_path / "rendezvous", MODEL)
    with mock.patch.object(Guard, "observe", side_effect=AssertionError):
        check_pass(runtime, MODEL, tokens=1000)
    assert runtime.stats().hits == len(MODEL)
    runtime.close()


def test_auto_that_the_config_does_not_provide_for(tmp_path: Path) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=12), 0, tmp_path / "rendezvous", MODEL)
    with pytest.raises(ConfigError, match="does not provide for mode auto, only for staged"):
        runtime.acquire(0, mode="auto", tokens=1)
    runtime.close()

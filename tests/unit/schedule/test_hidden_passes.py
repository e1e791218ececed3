"""Which passes are given whole, because compute hides their copies: by times that are stated here."""

from __future__ import annotations

import pytest

from vmm_dwdp.observe.timing import PassTimes
from vmm_dwdp.schedule.hidden import HiddenPasses


def decisions(
    hidden: HiddenPasses, times: list[PassTimes | None], tokens: list[int | None] | None = None
) -> list[bool]:
    """Of passes that are all timed: each begins after ``times`` of the one before was read."""
    return [
        hidden.hides(latest, count, 0.0, timed=True)
        for latest, count in zip(times, tokens or [None] * len(times), strict=True)
    ]


def test_runs_are_chosen_until_a_pass_was_measured() -> None:
    assert decisions(HiddenPasses(), [None, None]) == [False, False]


def test_a_pass_that_does_not_wait_makes_the_next_whole() -> None:
    assert decisions(HiddenPasses(), [None, PassTimes(0.040, 0.0)]) == [False, True]
    assert decisions(HiddenPasses(), [None, PassTimes(0.040, 0.0003)]) == [False, True], "less than a hundredth"


def test_where_copies_set_the_pace_runs_are_chosen() -> None:
    assert decisions(HiddenPasses(), [None, PassTimes(0.040, 0.010)] * 2) == [False] * 4


def test_a_pass_that_is_held_up_when_it_is_given_whole_goes_back_to_runs() -> None:
    """Copies take 52 ms when nothing is chosen and less than 40 when runs are: it is not tried at each pass."""
    chosen, whole = PassTimes(0.040, 0.0), PassTimes(0.052, 0.012)
    hidden = HiddenPasses()
    assert decisions(hidden, [None, chosen, whole]) == [False, True, False]
    again = decisions(hidden, [PassTimes(0.040, 0.0) for _ in range(40)])
    # after n of them 52 ms have become 52 * 0.99 ** n, which is below 40 from n = 27 on
    assert again == [False] * 26 + [True] * 14


def test_more_tokens_compute_longer() -> None:
    hidden = HiddenPasses()
    held_up = PassTimes(0.020, 0.015)  # with 1000 tokens: 5 ms of compute, 20 of copies
    assert decisions(hidden, [None, held_up, held_up, held_up], [1000, 3900, 4100, None]) == [False, False, True, False]


def test_tokens_are_those_of_the_pass_that_was_timed() -> None:
    """The one between is not timed: its 10 tokens have nothing to do with the 40 ms."""
    hidden = HiddenPasses()
    assert not hidden.hides(None, 4000, 0.0, timed=True)
    assert not hidden.hides(None, 10, 0.0, timed=False)
    hidden.hides(PassTimes(0.050, 0.010), 10, 0.0, timed=False)
    assert hidden.hides(hidden._seen, 5100, 0.0, timed=False), "40 ms for 4000: 51"
    assert not hidden.hides(hidden._seen, 4900, 0.0, timed=False)


@pytest.mark.parametrize("waited", [0.0, 0.02])
def test_a_measurement_counts_once(waited: float) -> None:
    hidden, latest = HiddenPasses(), PassTimes(0.040, waited)
    held_up = PassTimes(0.041, 0.030)
    hidden.hides(held_up, None, 0.0, timed=False)
    hidden.hides(latest, None, 0.0, timed=False)
    first = hidden._held_up_s
    for _ in range(100):
        hidden.hides(latest, None, 0.0, timed=False)
    assert hidden._held_up_s == first == (0.041 if waited else 0.041 * 0.99)


def test_copies_that_no_way_of_giving_them_could_hide_are_chosen() -> None:
    """At the link's rate they take 21 ms, and given whole 30 at best."""
    hidden, latest = HiddenPasses(), PassTimes(0.029, 0.0)
    assert not hidden.hides(latest, None, 0.0213, timed=False)
    assert hidden.hides(PassTimes(0.031, 0.0), None, 0.0213, timed=False)

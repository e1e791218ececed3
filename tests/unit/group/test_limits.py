"""Descriptors are reserved, and the soft limit is what it was when nobody needs more."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from vmm_dwdp import ConfigError
from vmm_dwdp.group.limits import DescriptorReservation


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """A soft limit close to what is open, and the hard limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    yield soft, before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_soft_limit_is_raised_as_long_as_anybody_needs_it(limits: tuple[int, int]) -> None:
    soft, hard = limits
    small = DescriptorReservation(2)
    assert soft_limit() == soft
    first, second = DescriptorReservation(100), DescriptorReservation(100)
    assert soft_limit() == hard
    for reservation in (first, second, small):
        reservation.settle()
    first.close()
    small.close()
    assert soft_limit() == hard, "what the second has opened is still open"
    second.close()
    assert soft_limit() == soft
    second.close()
    assert soft_limit() == soft


def test_a_limit_that_somebody_else_has_set_stays(limits: tuple[int, int]) -> None:
    _, hard = limits
    reservation = DescriptorReservation(100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    reservation.close()
    assert soft_limit() == hard - 1


def test_two_that_do_not_fit_together_are_not_both_promised(limits: tuple[int, int]) -> None:
    """Neither has opened anything yet when the second asks."""
    _, hard = limits
    most = (hard - len(os.listdir("/proc/self/fd"))) * 2 // 3
    first = DescriptorReservation(most)
    with pytest.raises(ConfigError, match=f"takes {most} file descriptors, but a process may open {hard}, and this"):
        DescriptorReservation(most)
    first.settle()
    second = DescriptorReservation(most)  # what the first has opened is counted by the kernel: it opened nothing
    for reservation in (first, second):
        reservation.close()

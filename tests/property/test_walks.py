"""Random walks over everything that a group can be told: `make soak` for a moment, and with other groups each time.

A walk that goes wrong prints its seed: `python tests/walks.py --seed N` walks it again.
"""

from __future__ import annotations

import pytest
from support.ranks import start_server
from support.walk import Walk

IN_THREADS = 60
IN_PROCESSES = 3
BANKED = (9, 12, 19)  # whose groups look up in banks: experts of other ranks and of host memory
STEPS = 60


@pytest.mark.parametrize("first", range(0, IN_THREADS, 10))
@pytest.mark.usefixtures("open_descriptors")
def test_in_threads(first: int) -> None:
    for seed in range(first, first + 10):
        Walk(seed).run(STEPS)


@pytest.fixture(scope="module")
def _server() -> None:
    start_server()


@pytest.mark.parametrize("seed", range(IN_PROCESSES))
@pytest.mark.usefixtures("_server", "open_descriptors")
def test_in_processes_that_die_and_come_back(seed: int) -> None:
    Walk(seed, processes=True).run(STEPS)


@pytest.mark.parametrize("seed", BANKED)
@pytest.mark.usefixtures("_server", "open_descriptors")
def test_with_banks_in_processes_that_die_and_come_back(seed: int) -> None:
    walk = Walk(seed, processes=True)
    assert walk.config.expert_bank
    walk.run(STEPS)
    looked_up = [place for place, step in enumerate(walk.steps) if "looked_up" in step and "done" in step]
    back = [place for place, step in enumerate(walk.steps) if "rejoin" in step and "done" in step]
    assert looked_up[0] < back[0] < looked_up[-1], "before a rank died, and after it came back"

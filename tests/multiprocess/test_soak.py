"""`make soak` for a moment."""

from __future__ import annotations

from soak import GROUP_SIZE, soak


def test_nothing_grows_while_ranks_are_killed_and_come_back() -> None:
    report = soak(passes=500, kills=1)
    assert (report.kills, report.left) == (1, [])
    assert report.passes >= 500
    assert report.updates
    assert report.verifications
    assert {0} <= set(report.grown) <= set(range(GROUP_SIZE))
    for grown in report.grown.values():
        assert grown[1:] == (0, 0, 0), grown
        assert grown.kilobytes < 4096

"""In runs that are chosen one by one."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_PULLS = ("tests/unit/schedule/test_pulls.py",)
_RULE = (
    "tests/unit/schedule/test_pulls.py::test_c_has_the_same_rule",
    "tests/unit/schedule/test_pulls.py::test_c_does_not_take_the_owner_itself_for_a_rank_that_is_nearer",
)
_BYTES = ("tests/unit/schedule/test_pulls.py::test_every_rank_reads_every_byte",)

BUGS: Final = (
    Bug(
        "C takes the owner from which most pull",
        "allocator/_turns.c",
        "pulled[owner] < pulled[best] ||",
        "pulled[owner] > pulled[best] ||",
        _RULE,
    ),
    Bug(
        "C takes a line for stale a moment too late",
        "allocator/_turns.c",
        "age < LINE_STALE_NS && age",
        "age <= LINE_STALE_NS && age",
        _RULE,
    ),
    Bug(
        "C counts the owner itself among those who are nearer",
        "allocator/_turns.c",
        "for (int step = 1; step < distance; step++) {",
        "for (int step = 1; step <= distance; step++) {",
        _RULE,
    ),
    Bug(
        "the end of a layer in runs is not recorded",
        "allocator/_pulls.c",
        "for (size_t i = 0; i < giving.num_lanes && !giving.call; i++)",
        "for (size_t i = 1; i < giving.num_lanes && !giving.call; i++)",
        _BYTES,
    ),
    Bug(
        "the last run of an owner is forgotten",
        "vmm_dwdp/schedule/fetches.py",
        "tuple(self._prepared(layer, pieces) for pieces in runs)",
        "tuple(self._prepared(layer, pieces) for pieces in runs[: max(1, len(runs) - 1)])",
        _BYTES,
    ),
    Bug(
        "the twin records the end of a layer before its runs",
        "vmm_dwdp/schedule/pulls.py",
        """            for lane in chosen.values():
                self._driver.wait(lane.stream, lane.after)
""",
        """            for lane in chosen.values():
                self._driver.wait(lane.stream, lane.after)
                self._driver.record(lane.then, lane.stream)
            lanes, chosen = [], {owner: lane._replace(then=lane.after) for owner, lane in chosen.items()}
""",
        _BYTES,
    ),
    Bug(
        "any file is mapped as the lines of a group",
        "vmm_dwdp/memory/lines.py",
        "is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS",
        "is_sealed = True",
        _PULLS,
    ),
)

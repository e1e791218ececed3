"""In runs that are chosen one by one."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_PULLS = ("tests/unit/schedule/test_pulls.py",)
_RULE = (
    "tests/unit/schedule/test_pulls.py::test_c_has_the_same_rule",
    "tests/unit/schedule/test_pulls.py::test_c_does_not_take_the_owner_itself_for_a_rank_that_is_nearer",
)
_AHEAD = ("tests/unit/schedule/test_layers_ahead.py",)
_DOCTOR = ("tests/unit/cli/test_doctor.py::test_connections_for_copies", "tests/unit/planning/test_run_gap.py")
_SIMULATED = ("tests/unit/planning/test_pulling.py",)
_HIDDEN = ("tests/unit/schedule/test_hidden_passes.py",)
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
        "C looks at no layer ahead",
        "allocator/_pulls.c",
        "const uint64_t *ahead = is_open ? second->left : NULL;",
        "const uint64_t *ahead = is_open && 0 ? second->left : NULL;",
        _AHEAD,
    ),
    Bug(
        "C takes the next layer's run though its slot is still read",
        "allocator/_pulls.c",
        "pulls->num_open == 2 && second->is_read && second->all",
        "pulls->num_open == 2 && second->all",
        _AHEAD,
    ),
    Bug(
        "the thread opens one job after the other",
        "allocator/_issue_thread.c",
        "} else if (issuer->pulls.num_open == MAX_OPEN || ",
        "} else if (issuer->pulls.num_open || ",
        _AHEAD,
    ),
    Bug(
        "C chooses runs of what it is told to give whole",
        "allocator/_issue_thread.c",
        "job->num_chosen && !job->is_whole && !issuer->gives_whole",
        "job->num_chosen && !job->is_whole",
        _AHEAD,
    ),
    Bug(
        "the thread of Python's chooses runs of what it is told to give whole",
        "vmm_dwdp/schedule/issue.py",
        "self._chooses = not (whole or self.whole)",
        "self._chooses = not self.whole",
        ("tests/unit/schedule/test_pulls.py::test_of_passes_that_compute_hides_nothing_is_chosen",),
    ),
    Bug(
        "a pass that was held up is forgotten with the next",
        "vmm_dwdp/schedule/hidden.py",
        "self._held_up_s *= 1 - FORGOTTEN",
        "self._held_up_s *= FORGOTTEN",
        _HIDDEN,
    ),
    Bug(
        "the tokens of a pass that is not timed pass for those of the one that was",
        "vmm_dwdp/schedule/hidden.py",
        "        if timed:\n            self._timed_tokens = tokens",
        "        self._timed_tokens = tokens",
        _HIDDEN,
    ),
    Bug(
        "what is hopeless is given whole",
        "vmm_dwdp/schedule/hidden.py",
        "return expected > max(self._held_up_s, copies_s / WHOLE_RATE)",
        "return expected > max(self._held_up_s, copies_s * WHOLE_RATE)",
        _HIDDEN,
    ),
    Bug(
        "a measurement is learned from again and again",
        "vmm_dwdp/schedule/hidden.py",
        "if latest is not None and latest is not self._seen:",
        "if latest is not None:",
        _HIDDEN,
    ),
    Bug(
        "C takes the next layer's run where as many pull",
        "allocator/_turns.c",
        "pulled[other] >= pulled[*owner]",
        "pulled[other] > pulled[*owner]",
        _RULE,
    ),
    Bug(
        "doctor takes a connection too few for enough",
        "vmm_dwdp/cli/connections.py",
        "if there < streams:",
        "if there < streams - 1:",
        _DOCTOR,
    ),
    Bug(
        "what a gap costs is spread over one run too many",
        "vmm_dwdp/planning/run_gap.py",
        "(2 * (RUNS - 1))",
        "(2 * RUNS)",
        _DOCTOR,
    ),
    Bug(
        "simulated ranks look no layer ahead",
        "vmm_dwdp/planning/pulling.py",
        "ahead = layers[1].left if self._turns.native and len(layers) > 1 else None",
        "ahead = None",
        _SIMULATED,
    ),
    Bug(
        "a simulated run is given only when the one before has ended",
        "vmm_dwdp/planning/pulling.py",
        "return self._flights[0].can_end - LEAD if self._flights else now",
        "return inf if self._flights else now",
        _SIMULATED,
    ),
    Bug(
        "a simulated layer is complete before the one before it",
        "vmm_dwdp/planning/pulling.py",
        "while self._layers and not self._layers[0].open:",
        "while self._layers and not layer.open and layer in self._layers:",
        _SIMULATED,
    ),
    Bug(
        "the planner takes chosen runs for a fixed order",
        "vmm_dwdp/planning/contention.py",
        "    if not chooses(config):",
        "    if True:",
        _SIMULATED,
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

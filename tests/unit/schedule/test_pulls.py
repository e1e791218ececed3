"""Runs that are chosen one by one: the C rule beside Python's, and that what others say is advice.

The groups here have runs of a page or two, so that a layer has many of each owner; by the native thread, whose driver
calls are the host driver's, and by its twin.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drivers import NativeDriver, Refusal
from support.groups import PAGE, add_layers, check_pass, fill_shards, in_threads, random_model
from support.native import compiled

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import DriverError, ExchangeError
from vmm_dwdp.layout import turns
from vmm_dwdp.layout.turns import NOBODY, Line, choose, choose_of_two, is_alone, pullers, settle
from vmm_dwdp.memory.lines import STALE_NS, VERSION, SharedLines

ALLOCATOR = Path(__file__).parents[3] / "allocator"
EXPORTED = """
#include "_turns.c"
#pragma GCC visibility push(default)
void pulled_of(Page *page, int64_t now, int *pulled) { count_pullers(page, now, pulled); }
int chosen_of(Page *page, uint64_t *left, int *pulled) { return choose_owner(page, left, pulled); }
int settled_of(Page *page, int owner, uint64_t *left, int before, int64_t now, int *pulled) {
    return settle_owner(page, owner, left, before, now, pulled);
}
int of_two(Page *page, uint64_t *first, uint64_t *second, int *pulled, int *owner) {
    return choose_of_two(page, first, second, pulled, owner);
}
int alone_of(Page *page, int64_t now) { return pulls_alone(page, now); }
"""


class Page(ctypes.Structure):
    _fields_ = (
        ("lines", ctypes.c_void_p),
        ("line_nbytes", ctypes.c_size_t),
        ("num_ranks", ctypes.c_int),
        ("rank", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of ``_turns.c``."""
    folder = tmp_path_factory.mktemp("rule")
    source = folder / "exported.c"
    source.write_text(EXPORTED)
    return ctypes.CDLL(str(compiled(folder, f"-I{ALLOCATOR}", sources=[source])))


NOW = 10 * STALE_NS


@st.composite
def pages(draw: st.DrawFn) -> tuple[int, list[int], list[Line], list[bool], bytes]:
    """A rank, its bytes left, what lines say, which of them count, and the bytes of the page."""
    size = draw(st.integers(2, 6))
    rank = draw(st.integers(0, size - 1))
    left = [0 if owner == rank else draw(st.sampled_from([0, 1, 7, 1 << 40])) for owner in range(size)]
    lines, alive, page = [], [], b""
    for other in range(size):
        version = draw(st.sampled_from([VERSION, VERSION, VERSION, 0, 9]))
        age = draw(st.sampled_from([0, STALE_NS - 1, STALE_NS, -STALE_NS, 1 - STALE_NS, 1 << 62]))
        pulls = draw(st.integers(0, 2))
        under_way = draw(st.lists(st.sampled_from([0, 0, 1, 2, (1 << 32) - 1]), min_size=size, max_size=size))
        lines.append(Line(pulls, under_way))
        alive.append(other != rank and version == VERSION and abs(age) < STALE_NS)
        page += struct.pack(f"=IIq{size}I", version, pulls, NOW - age, *under_way)
    return rank, left, lines, alive, page


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pages(), st.integers(0, 6), st.data())
def test_c_has_the_same_rule(rule: ctypes.CDLL, stated: Any, before: int, data: st.DataObject) -> None:
    rank, left = stated[:2]
    owner = data.draw(st.sampled_from([owner for owner, nbytes in enumerate(left) if nbytes] or [NOBODY]))
    second = [0 if owner == rank else data.draw(st.sampled_from([0, 1, 9])) for owner in range(len(left))]
    _compare_rules(rule, *stated, owner, before, second)


def _compare_rules(
    rule: ctypes.CDLL,
    rank: int,
    left: list[int],
    lines: list[Line],
    alive: list[bool],
    memory: bytes,
    owner: int,
    before: int,
    second: list[int],
) -> None:
    """``owner``, from whom something is left, was chosen when ``before`` pulled from it; or `NOBODY`. ``second``: what
    is left of the next layer."""
    size = len(left)
    held = ctypes.create_string_buffer(memory, len(memory))
    page = ctypes.byref(Page(ctypes.addressof(held), len(memory) // size, size, rank))
    now, bytes_left, pulled = ctypes.c_int64(NOW), (ctypes.c_uint64 * size)(*left), (ctypes.c_int * size)()

    rule.pulled_of(page, now, pulled)
    assert list(pulled) == pullers(rank, lines, alive)
    assert rule.chosen_of(page, bytes_left, pulled) == choose(rank, left, pullers(rank, lines, alive))
    assert bool(rule.alone_of(page, now)) == is_alone(rank, lines, alive)
    if owner != NOBODY:
        chosen = ctypes.c_int()
        for of_next in (second, None):
            given = None if of_next is None else (ctypes.c_uint64 * size)(*of_next)
            which = rule.of_two(page, bytes_left, given, pulled, ctypes.byref(chosen))
            assert (which, chosen.value) == choose_of_two(rank, left, of_next, list(pulled))
        settled = rule.settled_of(page, owner, bytes_left, before, now, pulled)
        assert settled == settle(rank, owner, left, before, lines, alive)


def test_c_does_not_take_the_owner_itself_for_a_rank_that_is_nearer(rule: ctypes.CDLL) -> None:
    """Whatever its line says of itself."""
    lines = [Line(1, [0, 0, 0]), Line(1, [0, 1, 0]), Line(1, [0, 0, 0])]
    page = b"".join(struct.pack("=IIq3I", VERSION, line.pulls, NOW, *line.under_way) for line in lines)
    _compare_rules(rule, 0, [0, 7, 7], lines, [False, True, True], page, 1, 0, [0, 0, 0])


# -- lines -------------------------------------------------------------------------------------------------------------


def test_each_sees_what_the_others_say_and_closing_clears_it() -> None:
    ledger = Ledger()
    first = SharedLines.make(ledger, 0, 3)
    second = SharedLines(first.share(), 1, 3)

    second.say(Line(1, [2, 0, 1]))
    lines, alive = first.read()
    assert lines[1] == Line(1, (2, 0, 1))
    assert alive == [False, True, False], "rank 2 never said anything, and one's own line does not count"

    again = SharedLines(first.share(), 1, 3)  # as a rank that comes back
    assert first.read()[0][1] == Line(0, (0, 0, 0))
    for each in (again, second, first):
        each.close()
        each.close()
    assert ledger.open() == []


def test_what_is_no_such_memory_is_refused_and_closed(tmp_path: Path) -> None:
    ledger = Ledger()
    plain = tmp_path / "file"
    plain.write_bytes(bytes(4096))
    short = os.memfd_create("short")
    for fd in (os.open(plain, os.O_RDWR), short):
        with pytest.raises(ExchangeError, match="who pulls from whom"):
            SharedLines(Descriptor(ledger, fd), 0, 3)
    assert ledger.open() == []


# -- groups ------------------------------------------------------------------------------------------------------------

SHAPES = {n: {"a": ((7, 3, 700 + n), torch.float32), "scales": ((7, 5), torch.float16)} for n in range(4)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)
DRIVERS: dict[str, Callable[[], Any]] = {"native": NativeDriver, "twin": lambda: HostDriver(PAGE)}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SHORTEST_RUN", turns.SMALLEST_RUN)


@contextmanager
def group(config: DWDPConfig, where: Path, make: Callable[[], Any]) -> Iterator[list[DWDPRuntime]]:
    drivers = [make() for _ in range(config.group_size)]

    def join(rank: int) -> DWDPRuntime:
        runtime = DWDPRuntime(config, rank, "cpu", where, driver=drivers[rank])
        add_layers(runtime, OLD)
        fill_shards(runtime, OLD)
        runtime.publish()
        return runtime

    runtimes = in_threads(join, config.group_size)
    try:
        yield runtimes
    finally:
        left = [runtime.close().open() for runtime in runtimes]
    assert left == [[]] * config.group_size


def lines_of(runtime: DWDPRuntime) -> SharedLines:
    lines = runtime._membership.lines
    assert lines is not None
    return lines


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "config",
    [
        DWDPConfig(group_size=3),
        DWDPConfig(group_size=4, prefetch_depth=1),
        DWDPConfig(group_size=3, host_experts=2, prefetch_depth=3),
        DWDPConfig(group_size=3, num_local_experts=4),
        DWDPConfig(group_size=3, assembly="tensor_list"),
    ],
    ids=["three", "four", "host memory", "overlap", "lists"],
)
def test_every_rank_reads_every_byte(driver: str, config: DWDPConfig, tmp_path: Path) -> None:
    with group(config, tmp_path / "r", DRIVERS[driver]) as runtimes:
        path = runtimes[0].stats().copy_path
        assert path is not None
        assert path.plan == "runs"

        def passes(rank: int) -> None:
            for _ in range(3):
                check_pass(runtimes[rank], OLD)

        in_threads(passes, config.group_size)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("attack", ["garbage", "all pull from all", "silence", "another version"])
def test_whatever_lines_say_every_byte_is_right(driver: str, attack: str, tmp_path: Path) -> None:
    """Another thread writes into all lines, also into those that are not its own, while three ranks run passes."""
    chance = random.Random(attack)
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS[driver]) as runtimes:
        memory = lines_of(runtimes[1])._memory
        over = threading.Event()

        def write() -> None:
            lied = struct.pack("=IIq3I", VERSION, 1, (1 << 62), 1, 1, 1)
            for at in itertools.cycle(range(0, len(memory), 4)):
                if over.is_set():
                    return
                match attack:
                    case "garbage":
                        memory[at : at + 4] = chance.randbytes(4)
                    case "all pull from all":
                        memory[0 : len(lied)] = lied
                    case "silence":
                        memory[:] = bytes(len(memory))
                    case _:
                        memory[0:4] = struct.pack("=I", chance.randrange(5))

        def passes(rank: int) -> None:
            for _ in range(4):
                check_pass(runtimes[rank], OLD)

        attacker = threading.Thread(target=write)
        attacker.start()
        try:
            in_threads(passes, 3)
        finally:
            over.set()
            attacker.join()


def test_a_rank_that_stands_still_holds_up_nobody(tmp_path: Path) -> None:
    """It says for good that it pulls from everybody; so it is taken for dead, and the others go on."""
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS["native"]) as runtimes:
        lines_of(runtimes[2]).say(Line(1, [1, 1, 0]))
        in_threads(lambda rank: [check_pass(runtimes[rank], OLD) for _ in range(3)], 2)


def test_two_groups_of_a_process_have_lines_of_their_own(tmp_path: Path) -> None:
    """As of a model and its draft model: neither says anything in the lines of the other, nor clears them."""
    config, make = DWDPConfig(group_size=3, slice_bytes="auto"), DRIVERS["native"]
    with group(config, tmp_path / "model", make) as model, group(config, tmp_path / "draft", make) as draft:
        first, second = ({os.fstat(lines_of(each)._descriptor.fd).st_ino for each in of} for of in (model, draft))
        assert (len(first), len(second), len(first & second)) == (1, 1, 0)
        in_threads(lambda n: [check_pass([*model, *draft][n], OLD) for _ in range(2)], 6)
        staging = model[2]._schedule._staging
        assert staging is not None
        staging.held()
        while lines_of(model[0]).read()[0][2] != Line(0, (0, 0, 0)):
            pass  # from then on its thread has nothing to say
        lines_of(model[2]).say(Line(0, (0, 7, 0)))
        in_threads(lambda rank: [check_pass(draft[rank], OLD) for _ in range(2)], 3)
        assert draft[2].close().open() == []
        assert lines_of(model[0]).read()[0][2].under_way == (0, 7, 0)


def test_runs_are_taken_first_from_whom_nobody_pulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 says that it pulls from rank 1: so rank 0 takes all that rank 2 has before anything of rank 1."""
    said = [Line(0, (0, 0, 0)), Line(0, (0, 0, 0)), Line(1, (0, 1, 0))], [False, True, True]
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS["twin"]) as runtimes:
        runtime = runtimes[0]
        staging = runtime._schedule._staging
        assert staging is not None
        staging.held()  # what publish asked for is not looked at
        monkeypatch.setattr(lines_of(runtime), "read", lambda: said)
        driver: Any = runtime._driver
        own, given = driver.copy, list[int]()
        monkeypatch.setattr(driver, "copy", lambda prepared, stream: (given.append(stream), own(prepared, stream)))
        check_pass(runtime, OLD)
        staging.held()
        lanes = {lane.owner: lane for lane in staging.layers[2]._lanes}  # the first that the pass fetches
        one, two = len(lanes[1].runs), len(lanes[2].runs)
        assert min(one, two) > 1
        assert given[: one + two] == [lanes[2].stream] * two + [lanes[1].stream] * one


@pytest.mark.parametrize("hides", [True, False])
def test_a_pass_is_held_against_what_its_copies_take(
    hides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its layers from the second on: the time of a pass ends where it comes to its last layer."""
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS["twin"]) as runtimes:
        staging = runtimes[0]._schedule._staging
        assert staging is not None
        choosing: Any = staging._issuer.choosing
        choosing.whole, choosing.seconds_per_byte = not hides, 0.5
        seen: list[Any] = []
        monkeypatch.setattr(
            staging._hidden, "hides", lambda latest, tokens, copies_s, *, timed: (seen.append(copies_s), hides)[1]
        )
        staging.begins(None)
        assert seen == [0.5 * sum(layer.nbytes for layer in staging.layers if layer.place > 0)]
        assert choosing.whole == hides


@pytest.mark.parametrize("driver", DRIVERS)
def test_of_passes_that_compute_hides_nothing_is_chosen(
    driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it does is asked at each pass, with its tokens."""
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS[driver]) as runtimes:
        runtime = runtimes[0]
        staging = runtime._schedule._staging
        assert staging is not None
        staging.held()  # what publish asked for was chosen
        asked = list[Any]()
        issuer: Any = staging._issuer
        gives, call = (issuer._thread, "_write") if driver == "native" else (issuer._puller, "_give_runs")
        runs = list[Any]()
        own = getattr(gives, call)
        monkeypatch.setattr(gives, call, lambda *of: (runs.append(of), own(*of)))
        hides = staging._hidden.hides

        def told(latest: Any, tokens: int | None, copies_s: float, *, timed: bool) -> bool:
            asked.append((tokens, timed, copies_s))
            hides(latest, tokens, copies_s, timed=timed)
            return True

        monkeypatch.setattr(staging._hidden, "hides", told)
        for tokens in 5, 7:
            for number, expected in OLD.items():
                with runtime.layer(number, tokens=tokens) as weights:
                    assert all(
                        torch.equal(weights[name].view(torch.uint8), whole.view(torch.uint8))  # type: ignore[union-attr]
                        for name, whole in expected.items()
                    )
                del weights
        staging.held()
        assert [tokens for tokens, *_ in asked] == [5, 7]
        assert asked[0][1], "the first passes are timed"
        assert (asked[0][2] > 0) == (driver == "native"), "which sees how long a run takes"
        assert not runs
        monkeypatch.setattr(staging._hidden, "hides", lambda *_, timed: False)
        check_pass(runtime, OLD)
        staging.held()
        assert runs


@pytest.mark.parametrize("comes_back", [0, 2])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_rank_that_comes_back_has_the_lines_of_the_others(driver: str, comes_back: int, tmp_path: Path) -> None:
    config, where = DWDPConfig(group_size=3), tmp_path / "r"
    with group(config, where, DRIVERS[driver]) as runtimes:
        assert runtimes[comes_back].close().open() == []
        runtime = DWDPRuntime(config, comes_back, "cpu", where, driver=DRIVERS[driver]())
        add_layers(runtime, OLD)
        runtime.rejoin()
        runtimes[comes_back] = runtime
        path = runtime.stats().copy_path
        assert path is not None
        assert path.plan == "runs"
        in_threads(lambda rank: [check_pass(runtimes[rank], OLD) for _ in range(2)], 3)
        assert len({os.fstat(lines_of(each)._descriptor.fd).st_ino for each in runtimes}) == 1, "it is the same memory"


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_update_is_read_by_all(driver: str, tmp_path: Path) -> None:
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS[driver]) as runtimes:

        def changes(rank: int) -> None:
            check_pass(runtimes[rank], OLD)
            own = runtimes[rank].local_experts(0)
            new = {
                (layer, name, rank): whole[own.start : own.stop]
                for layer, weights in NEW.items()
                for name, whole in weights.items()
            }
            runtimes[rank].update(new)
            check_pass(runtimes[rank], NEW)

        in_threads(changes, 3)


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_a_call_that_the_driver_refuses_costs_a_pass_and_no_byte(at: int, tmp_path: Path) -> None:
    with group(DWDPConfig(group_size=3), tmp_path / "r", DRIVERS["native"]) as runtimes:
        runtime = runtimes[0]
        driver: Any = runtime._driver
        with Refusal(driver, at) as refusal, suppress(DriverError):
            for _ in range(2):
                check_pass(runtime, OLD)
        assert refusal.where is not None, "later calls are of no interest: there are fewer"
        try:
            runtime.reset()
        except DriverError:
            runtime.reset()
        for _ in range(2):
            check_pass(runtime, OLD)

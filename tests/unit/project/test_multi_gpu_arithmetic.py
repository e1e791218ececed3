"""What `benchmarks/multi_gpu.py` makes of what it sees: its clock, its bytes, its ratios, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import common
import far_owners
import multi_gpu
import prefetch
import rank_copies
import ranks
from moe_stack import STACKS, route

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.driver import Driver

CPU = torch.device("cpu")


class Device:
    """Does what it is given in order, a pass in as many seconds as it is told, and stands where `Place` does."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = iter(seconds)
        self.given = 0
        self.queue_ends = 0.0
        self.done_until = 0.0
        self.waits: list[str] = []

    def run(self) -> None:
        self.given += 1
        self.queue_ends += next(self._seconds)

    def mark(self) -> Any:
        return SimpleNamespace(
            at=self.queue_ends,
            reach=lambda at=self.queue_ends: self._reach(at),
            seconds_to=lambda later, at=self.queue_ends: later.at - at,
        )

    def _reach(self, at: float) -> None:
        self.done_until = max(self.done_until, at)

    def wait(self) -> None:
        self.done_until = self.queue_ends
        self.waits.append(f"after {self.given}")


class Others:
    """Ranks that begin, and stop measuring, after they were asked so many times."""

    def __init__(self, begin_after: int, done_after: int) -> None:
        self._left = {"begun": begin_after, "done": done_after}
        self.said: list[str] = []

    def say(self, word: str) -> None:
        self.said.append(word)

    def is_said_by_all(self, word: str) -> bool:
        self._left[word] -= 1
        return self._left[word] < 0


def test_the_clock_runs_while_all_ranks_do_and_nothing_is_waited_for_inside_of_it() -> None:
    before, timed, after = [7.0, 7.0, 7.0], [1.0, 2.0, 6.0], [9.0, 9.0]
    device, others = Device([*before, *timed, *after]), Others(2, 2)

    found = ranks.steady(device, device.run, 3, others)  # type: ignore[arg-type]

    assert found == 3.0
    assert device.given == 3 + 3 + 2
    assert others.said == ["begun", "done"]
    assert device.waits == ["after 8"], "the device is idle only when all is done"


def test_passes_with_collectives_are_as_many_on_every_rank() -> None:
    device = Device([5.0, 1.0, 3.0])

    assert ranks.steady(device, device.run, 2) == 2.0  # type: ignore[arg-type]
    assert device.given == 3


def test_the_device_is_given_two_passes_ahead_and_no_more() -> None:
    device = Device([1.0] * 20)
    behind = []

    def run() -> None:
        behind.append(device.queue_ends - device.done_until)
        device.run()

    ranks.steady(device, run, 10)  # type: ignore[arg-type]

    assert max(behind) == ranks.AHEAD


def test_ranks_hear_each_other_by_files(tmp_path: Path) -> None:
    first, second = ranks.Together(tmp_path, 0, 2), ranks.Together(tmp_path, 1, 2)
    first.say("begun")
    assert not first.is_said_by_all("begun")
    second.say("begun")
    assert first.is_said_by_all("begun")
    assert not first.is_said_by_all("done")

    alone = ranks.Together(tmp_path / "alone", 0, 1)
    alone.say("begun")
    assert alone.is_said_by_all("begun")


@pytest.mark.parametrize(("depth", "certain"), [(1, 4 * 3 - 1), (2, 4 * 3 - 2), (9, 4 * 3 - 3)])
def test_layers_that_slots_held_before_are_not_counted(depth: int, certain: int) -> None:
    assert STACKS["tiny"].num_layers == 3
    assert rank_copies.moved(STACKS["tiny"], 4, depth, 100) == 100 * certain


def test_the_mean_and_the_worst_of_the_ranks_of_each_case() -> None:
    rows = [{"plan": "a", "rank": rank, "GB/s": rate} for rank, rate in enumerate((10.0, 20.0, 60.0))]
    rows.append({"plan": "b", "rank": 0, "GB/s": 5.0})

    assert rank_copies.of_ranks(rows, ["plan"]) == [
        {"plan": "a", "ranks": 3, "GB/s, mean": 30.0, "GB/s, worst": 10.0},
        {"plan": "b", "ranks": 1, "GB/s, mean": 5.0, "GB/s, worst": 5.0},
    ]


def test_a_product_is_compared_with_itself_alone_before_and_after() -> None:
    row = rank_copies.beside({"alone": [0.010, 0.014], "beside copies": [0.018]})

    assert row["alone ms"] == pytest.approx(12)
    assert row["beside copies ms"] == pytest.approx(18)
    assert row["beside / alone"] == pytest.approx(1.5)


def test_products_beside_copies_are_timed_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed function calls nothing but the product, as often as it says."""
    calls: list[str] = []
    device = Device([1.0] * 9)

    def steady(place: object, run: Callable[[], object], passes: int) -> float:
        run()
        return 40.0

    monkeypatch.setattr(rank_copies, "steady", steady)

    assert rank_copies.timed(device, lambda: calls.append("product")) == 40.0 / rank_copies.PRODUCTS  # type: ignore[arg-type]
    assert calls == ["product"] * rank_copies.PRODUCTS


@pytest.mark.parametrize("tokens", [1, 4, 32, 33])
def test_balanced_routing_gives_every_expert_as_many_tokens(tokens: int) -> None:
    stack = STACKS["tiny"]
    routed = route(stack, tokens, 1, CPU, balanced=True)

    assert int(routed.counts.sum()) == tokens * stack.top_k
    assert int(routed.counts.max() - routed.counts.min()) <= 1
    by_rank = [routed.counts, route(stack, tokens, 2, CPU, balanced=True).counts]
    if tokens % (stack.num_experts // stack.top_k) == 0:
        assert multi_gpu.imbalance(by_rank, 4) == 0
    experts = torch.repeat_interleave(torch.arange(stack.num_experts), routed.counts)
    by_token = torch.empty_like(experts)
    by_token[routed.order] = experts
    assert all(len(set(chosen.tolist())) == stack.top_k for chosen in by_token.view(tokens, stack.top_k))


def test_imbalance_is_of_the_busiest_rank_over_the_mean() -> None:
    first, second = torch.tensor([4, 0, 1, 1]), torch.tensor([2, 0, 0, 0])  # rows for four experts on two ranks

    assert multi_gpu.imbalance([first, second], 2) == pytest.approx(6 / 4 - 1)


def test_a_figure_above_the_link_ends_the_command() -> None:
    rows = [{"plan": "a", "GB/s": 391.0}, {"plan": "b"}, {"plan": "slices", "GB/s": 753.0}]

    common.require_within_link(rows[:2], 390.0, ["GB/s"])
    with pytest.raises(SystemExit, match=r"GB/s of .*slices.* cannot be: one large copy made 390.0 GB/s"):
        common.require_within_link(rows, 390.0, ["GB/s"])
    with pytest.raises(SystemExit, match="cannot be"):
        common.require_within_link([{"GB/s": float("nan")}], 390.0, ["GB/s"])


def test_a_share_of_a_link_is_held_against_the_fastest_copy_of_the_run() -> None:
    """A copy that was slow for once makes what follows it more than the whole of its link."""
    rows = [{"link": 44.0, "of link": 1.12}, {"link": 54.0, "of link": 0.9}, {"link": 50.0}]

    common.require_shares_within_link(rows, ["of link"])
    with pytest.raises(SystemExit, match=r"of link of .* cannot be: one large copy made 54.0 GB/s"):
        common.require_shares_within_link([*rows, {"link": 54.0, "of link": 1.12}], ["of link"])


@pytest.mark.parametrize(("rate", "refused"), [(389.0, False), (753.0, True)])
def test_multi_gpu_prints_no_figure_above_the_link(
    rate: float, refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"owners": 1, "plan": "auto", "pulling": "one rank", "rank": 0, "GB/s": rate}
    monkeypatch.setattr(
        sys, "argv", ["multi_gpu.py", "--gpus", "2", "--only", "prefetch", "--json", "--device", "cuda"]
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(common, "machine", lambda device: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(multi_gpu, "links", lambda count: [{"from": 0, "to": 1, "access": True, "GB/s": 390.0}])
    monkeypatch.setattr(multi_gpu, "prefetch", lambda *_: ([row], [row]))

    if refused:
        with pytest.raises(SystemExit) as ended:
            multi_gpu.main()
        assert "cannot be" in str(ended.value.code)
        assert capsys.readouterr().out == ""
    else:
        multi_gpu.main()
        assert str(rate) in capsys.readouterr().out


@pytest.mark.parametrize(("planned", "refused"), [(1.0, False), (0.5, True)])
def test_the_link_table_of_prefetch_refuses_it_too(
    planned: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``planned``: seconds of a layer's copies, for each second in which one large copy moves as many bytes."""
    rig = far_owners.FarOwners(CPU, DWDPConfig(group_size=2), far_owners.SHAPES["tiny-bf16"], 1)
    large = max(len(piece.bytes) for stream in rig.layers[0].plan.streams for piece in stream)
    large = max(large, len(next(iter(rig.layers[0].layouts.values())).shard_bytes(1)))
    taken = iter([1.0, planned * rig.layers[0].plan.fetched_bytes / large] * 4)

    def seconds(work: Callable[[], object]) -> float:
        work()
        return next(taken)

    monkeypatch.setattr(prefetch, "seconds", seconds)
    try:
        if refused:
            with pytest.raises(SystemExit, match="planned of"):
                prefetch.link(rig)
        else:
            assert prefetch.link(rig)["efficiency"] == pytest.approx(1.0)
    finally:
        driver: Driver = rig.driver
        driver.synchronize()
        rig.close()


def test_ranks_that_cannot_have_equal_parts_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["multi_gpu.py", "--device", "cpu", "--tiny", "--gpus", "3", "--only", "stack"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        multi_gpu.main()
    assert "tiny: expert and tensor parallelism cannot give 3 ranks equal parts" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_of_a_machine_have_equal_parts_of_every_stack(ranks: int) -> None:
    for stack in STACKS.values():
        assert stack.divides(ranks)
        assert stack.intermediate // ranks * 2 % 16 == 0, "rows of the last product, in bytes"

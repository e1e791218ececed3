"""What the demo is told, and when it is satisfied."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vmm_dwdp.cli import demo
from vmm_dwdp.cli.demo_group import RankReport as Rank
from vmm_dwdp.cli.demo_group import RankResult, Replays, Report
from vmm_dwdp.cli.demo_models import Generated
from vmm_dwdp.config import DWDPConfig


def test_options_go_before_the_config_file(tmp_path: Path) -> None:
    DWDPConfig(group_size=3, num_local_experts=8, host_experts=2).to_yaml(tmp_path / "dwdp.yaml")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    arguments = parser.parse_args(["--config", str(tmp_path / "dwdp.yaml"), "--group-size", "2"])

    assert demo.config_from(arguments) == DWDPConfig(group_size=2, num_local_experts=8, host_experts=2)


@pytest.fixture
def generated() -> Generated:
    logits = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    return Generated(prompt="To", text=" be", logits=logits, seconds=1.0)


def test_one_bit_makes_a_difference(generated: Generated) -> None:
    logits = generated.logits.copy()
    logits.view(np.uint32)[1, 2] ^= 1

    assert generated.same(dataclasses.replace(generated, logits=generated.logits.copy(), seconds=2.0))
    assert not generated.same(dataclasses.replace(generated, logits=logits))
    assert not generated.same(dataclasses.replace(generated, text=" me"))


def test_equal_bits_are_the_same_even_where_they_are_no_number(generated: Generated) -> None:
    nothing = dataclasses.replace(generated, logits=np.full((3, 4), np.nan, dtype=np.float32))

    assert nothing.same(nothing)


RANK = Rank(
    rank=0,
    device="cpu",
    experts_held=4,
    resident_bytes=1,
    staged_bytes=1,
    fetched_bytes=1,
    hits=1,
    misses=0,
    in_place=0,
    exposed_wait_s=0.0,
    tokens_per_s=1.0,
    identical=True,
    replays=None,
    not_captured="",
    prompt="",
    continuation="",
)


def report_of(*ranks: Rank, leaked: int = 0, driver: str = "host") -> Report:
    return Report(
        model="small",
        device="cpu",
        driver=driver,
        group_size=len(ranks),
        identical=all(rank.all_identical for rank in ranks),
        ranks=list(ranks),
        leaked={"handles": leaked, "mappings": 0},
        seconds=1.0,
    )


def problems(*ranks: Rank, leaked: int = 0, fetching: bool = True) -> list[str]:
    return report_of(*ranks, leaked=leaked).problems(fetching=fetching)


def test_nothing_to_complain_of() -> None:
    assert problems(RANK, RANK) == []


def test_rank_that_differs_is_named() -> None:
    assert problems(RANK, dataclasses.replace(RANK, rank=1, identical=False)) == [
        "small: rank 1 differs from the whole model"
    ]


def test_rank_that_fetched_nothing_proves_nothing() -> None:
    idle = dataclasses.replace(RANK, rank=1, fetched_bytes=0)

    assert len(problems(RANK, idle)) == 1
    assert "rank 1 fetched nothing" in problems(RANK, idle)[0]
    assert problems(RANK, idle, fetching=False) == []
    assert problems(RANK, dataclasses.replace(idle, in_place=1)) == []


def test_what_is_left_open_is_named() -> None:
    assert problems(RANK, leaked=2) == ["small: 2 handles left after close"]


REPLAYED = dataclasses.replace(RANK, replays=Replays(steps=2, tokens_per_s=30.5, identical=True))
WRONG = dataclasses.replace(RANK, rank=1, replays=Replays(steps=2, tokens_per_s=30.5, identical=False))


def test_replays_that_differ_are_named() -> None:
    assert problems(REPLAYED, WRONG) == ["small: replays of rank 1 differ from the whole model"]
    assert (REPLAYED.all_identical, WRONG.all_identical) == (True, False)


def test_replays_are_compared_with_the_whole_model(generated: Generated) -> None:
    other = dataclasses.replace(generated, text=" me", seconds=0.5)
    stats = argparse.Namespace(
        resident_bytes=1, staged_bytes=1, fetched_bytes=1, hits=1, misses=0, in_place=0, exposed_wait_s=0.0
    )
    ranks = [
        RankResult("cuda:0", 4, stats, eager, replayed, "", {}).compared(0, generated)  # type: ignore[arg-type]
        for eager, replayed in ((generated, other), (other, generated), (generated, None))
    ]

    assert [rank.identical for rank in ranks] == [True, False, True]
    assert [rank.replays for rank in ranks] == [Replays(2, 6.0, False), Replays(2, 3.0, True), None]
    assert [rank.tokens_per_s for rank in ranks] == [3.0, 6.0, 3.0]


def printed(report: Report, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    demo._print(report, with_text=False)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_what_a_gpu_replays_stands_beside(capsys: pytest.CaptureFixture[str]) -> None:
    without = dataclasses.replace(RANK, rank=2, not_captured="a step cannot be captured: no")
    _, heads, *rows = printed(report_of(REPLAYED, WRONG, without, driver="cuda"), capsys)

    assert heads[-6:] == ["waited", "tokens/s", "in", "a", "graph", "same"]
    assert [row[-3:] for row in rows[:3]] == [["1.0", "30.5", "yes"], ["1.0", "30.5", "NO"], ["1.0", "-", "yes"]]
    assert ["rank", "2:", "a", "step", "cannot", "be", "captured:", "no"] in rows


def test_without_a_gpu_there_is_no_such_column(capsys: pytest.CaptureFixture[str]) -> None:
    _, heads, row, *_ = printed(report_of(RANK), capsys)

    assert heads[-2:] == ["tokens/s", "same"]
    assert row[-2:] == ["1.0", "yes"]

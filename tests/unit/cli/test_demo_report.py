"""What the demo is told, and when it is satisfied."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vmm_dwdp.cli import demo
from vmm_dwdp.cli.demo_group import RankReport as Rank
from vmm_dwdp.cli.demo_group import Report
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
    prompt="",
    continuation="",
)


def problems(*ranks: Rank, leaked: int = 0, fetching: bool = True) -> list[str]:
    report = Report(
        model="small",
        device="cpu",
        driver="host",
        group_size=len(ranks),
        identical=all(rank.identical for rank in ranks),
        ranks=list(ranks),
        leaked={"handles": leaked, "mappings": 0},
        seconds=1.0,
    )
    return report.problems(fetching=fetching)


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

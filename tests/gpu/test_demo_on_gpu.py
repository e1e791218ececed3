"""``vmm-dwdp demo`` on a GPU, where a second model has experts that fill pages."""

import json
from pathlib import Path

import pytest

from vmm_dwdp import cli
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.cli.demo import RANDOM_NEW_TOKENS
from vmm_dwdp.cli.demo_models import LARGE_WEIGHT

pytestmark = pytest.mark.gpu


def run_demo(capsys: pytest.CaptureFixture[str], *options: str, new_tokens: int) -> dict:
    """The report of the model with large experts; of the other, nothing was wrong."""
    status = cli.main(["demo", "--device", "cuda", "--json", *options])

    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (report["driver"], report["identical"]) == ("cuda", True)
    for rank in report["ranks"]:
        assert rank["not_captured"] == ""
        assert (rank["replays"]["steps"], rank["replays"]["identical"]) == (new_tokens - 1, True)
    assert report["leaked"] == dict.fromkeys(KINDS, 0)
    return report


def test_four_ranks_compute_what_the_whole_model_computes(capsys: pytest.CaptureFixture[str]) -> None:
    """Eagerly, and in replays in which layers are staged."""
    report = run_demo(capsys, new_tokens=RANDOM_NEW_TOKENS)

    assert report["group_size"] == 4
    assert all(rank["fetched_bytes"] > LARGE_WEIGHT for rank in report["ranks"])


def test_replays_look_up_in_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one rank, whose other experts are in host memory."""
    file = tmp_path / "dwdp.yaml"
    file.write_text("group_size: 1\nhost_experts: 12\nmode: in_place\nprefetch_depth: 0\nexpert_bank: 1 GB\n")

    report = run_demo(capsys, "--config", str(file), "--generate", "24", new_tokens=24)

    assert report["ranks"][0]["in_place"] > 0

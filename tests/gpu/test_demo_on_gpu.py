"""``vmm-dwdp demo`` on a GPU, where a second model has experts that fill pages."""

import json

import pytest

from vmm_dwdp import cli
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.cli.demo_models import LARGE_WEIGHT


@pytest.mark.gpu
def test_four_ranks_compute_what_the_whole_model_computes(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["demo", "--device", "cuda", "--json"])

    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (report["driver"], report["group_size"], report["identical"]) == ("cuda", 4, True)
    assert all(rank["fetched_bytes"] > LARGE_WEIGHT for rank in report["ranks"])
    assert report["leaked"] == dict.fromkeys(KINDS, 0)

"""``vmm-dwdp doctor`` on this machine, whatever it is."""

import json
import resource
from pathlib import Path

import pytest
import torch

from vmm_dwdp import allocator, cli


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> dict:
    assert cli.main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_host_driver_shares_memory_by_descriptor_and_fabric_handle(report: dict) -> None:
    cpu = report["devices"]["cpu"]

    assert cpu["why_not"] is None
    assert cpu["driver"] == "host"
    assert cpu["memory"]["device"]["granularity"] == 2 << 20
    assert cpu["memory"]["device"]["handle_types"]["posix-fd"] == {"why_not": None}
    assert cpu["memory"]["device"]["handle_types"]["fabric"] == {"why_not": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_a_finding(report: dict) -> None:
    assert "cuda" in report["devices"]["cuda"]["why_not"]
    assert report["devices"]["cuda"]["memory"] == {}


def test_the_native_thread_is_there_if_it_was_compiled(report: dict) -> None:
    compiled = list(Path(allocator.__file__).parent.glob("_native*.so"))

    assert (report["native_thread"]["why_not"] is None) == bool(compiled)


def test_nothing_is_measured_unless_asked_for(report: dict) -> None:
    assert report["host_memory"] == {}


@pytest.mark.usefixtures("open_descriptors")
def test_calibrating_measures_host_memory_and_says_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--calibrate", "--json"]) == 0
    for host in json.loads(capsys.readouterr().out)["host_memory"].values():
        rates, staged_from = host["rates"], host["staged_from"]["qwen3-30b-a3b"]
        assert rates["copies"] > 0
        assert rates["in_place"] > 0
        experts, top_k = 128, 8
        used = experts * (1 - (1 - top_k / experts) ** staged_from)  # in the time of a copy of all
        assert used == pytest.approx(min(1, rates["in_place"] / rates["copies"]) * experts)


def test_limits_are_this_process_s(report: dict) -> None:
    assert report["descriptor_limit"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < report["devices"]["cpu"]["free_bytes"] <= report["devices"]["cpu"]["total_bytes"]


@pytest.mark.parametrize("kernel", ["grouped_gemm.torch", "tensor_list_grouped_gemm.torch"])
def test_torch_kernels_can_be_used_anywhere(report: dict, kernel: str) -> None:
    assert report["kernels"][kernel]["why_not"] is None
    assert report["kernels"][kernel]["supports"]


@pytest.mark.usefixtures("open_descriptors")
def test_no_descriptor_stays_open() -> None:
    assert cli.main(["doctor"]) == 0


def test_tables_name_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0

    out = capsys.readouterr().out
    assert "cpu" in out
    assert "cuda" in out

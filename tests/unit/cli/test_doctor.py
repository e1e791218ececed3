"""``vmm-dwdp doctor`` on this machine, whatever it is."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch

from vmm_dwdp import allocator, cli
from vmm_dwdp.cli import doctor
from vmm_dwdp.cli.connections import connections


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


@pytest.mark.parametrize(
    ("environment", "num_gpus", "for_copies", "why_not"),
    [
        ({}, 1, 8, None),
        ({}, 8, 8, None),
        ({}, 9, 8, "CUDA_DEVICE_MAX_CONNECTIONS is not set, which is 8: a rank copies on up to 9 streams"),
        (
            {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            0,
            1,
            "CUDA_DEVICE_MAX_CONNECTIONS is 1: a rank copies on up to 2 streams",
        ),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, 8, 1, "set CUDA_DEVICE_MAX_COPY_CONNECTIONS to 8 or more"),
        (
            {"CUDA_DEVICE_MAX_CONNECTIONS": "3"},
            4,
            3,
            "CUDA_DEVICE_MAX_CONNECTIONS is 3: a rank copies on up to 4 streams",
        ),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "4"}, 4, 4, None),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_DEVICE_MAX_COPY_CONNECTIONS": "8"}, 8, 8, None),
        (
            {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "CUDA_DEVICE_MAX_COPY_CONNECTIONS": "2"},
            4,
            2,
            "_COPY_CONNECTIONS is 2: ",
        ),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "31"}, 72, 31, "set CUDA_DEVICE_MAX_COPY_CONNECTIONS to 32"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, 72, 32, None),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "33"}, 1, None, "is '33', which is not a number from 1 to 32"),
        ({"CUDA_DEVICE_MAX_COPY_CONNECTIONS": ""}, 1, None, "is '', which is not a number from 1 to 32"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "\u0664"}, 1, None, "which is not a number from 1 to 32"),
    ],
)
def test_connections_for_copies(
    environment: dict[str, str], num_gpus: int, for_copies: int | None, why_not: str | None
) -> None:
    found = connections({"PATH": "/bin", **environment}, num_gpus)

    assert (found.for_copies, found.stated) == (for_copies, environment)
    assert found.why_not is None if why_not is None else why_not in str(found.why_not)


def test_too_few_connections_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", raising=False)
    assert cli.main(["doctor"]) == 0

    out = capsys.readouterr().out
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in out
    assert "those that share a connection wait for each other" in out


def test_limits_are_this_process_s(report: dict) -> None:
    assert report["descriptor_limit"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < report["devices"]["cpu"]["free_bytes"] <= report["devices"]["cpu"]["total_bytes"]


def test_without_a_gpu_runs_are_as_the_runtime_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["doctor", "--calibrate", "--json"]) == 0
    (runs,) = json.loads(capsys.readouterr().out)["runs"].values()

    assert (runs["longest_bytes"], runs["under_way"], runs["under_way_alone"]) == (128 << 20, 1, 2)
    assert (runs["gap_s"], runs["worth_from_bytes"]) == (None, None)
    assert "there is no GPU" in runs["why_not"]


@pytest.mark.gpu
def test_what_a_gap_between_runs_costs_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--calibrate", "--json"]) == 0
    for runs in json.loads(capsys.readouterr().out)["runs"].values():
        assert runs["why_not"] is None
        assert 0 <= runs["gap_s"] < 1e-3, "a run takes less than that"
        if runs["link_rate"] is not None:
            assert runs["worth_from_bytes"] == pytest.approx(runs["gap_s"] * runs["link_rate"] / 0.02, abs=1)


def test_measured_runs_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def examined(*, calibrate: bool) -> doctor.Report:
        return dataclasses.replace(report, runs={"cuda:0": found})

    found = doctor.Runs(gap_s=6.4e-6, link_rate=390e9, worth_from_bytes=124_800_000)
    report = doctor.examine(calibrate=False)
    monkeypatch.setattr(doctor, "examine", examined)
    assert cli.main(["doctor", "--calibrate"]) == 0

    out = capsys.readouterr().out
    lines = {line.strip() for line in out[out.index("Runs whose owner is chosen") :].splitlines()}
    assert "Runs whose owner is chosen (slice_bytes: auto), cuda:0" in lines
    for what, value in (
        ("longest run", "128.0 MiB"),
        ("lost by each run more", "6.4 microseconds"),
        ("that is at most 2% of a run from", "119.0 MiB"),
    ):
        assert any(line.startswith(what) and line.endswith(value) for line in lines)


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

"""``vmm-dwdp bench``: which benchmarks it runs, what it prints, and what it writes for ``plan --gpu``."""

import json
from pathlib import Path

import pytest
import torch

from vmm_dwdp import cli
from vmm_dwdp.cli import bench
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning import calibrate
from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import Efficiency, load_gpu, write_gpu

GOOD = 'import json; print(json.dumps({"machine": {}, "speeds": [{"way": "fast", "GB/s": 12.3456}]}))'
BAD = 'raise SystemExit("no luck today")'


def test_every_benchmark_of_a_suite_exists() -> None:
    named = {name for suite in bench.SUITES.values() for name in suite}

    assert [name for name in named if not (bench.BENCHMARKS / f"{name}.py").exists()] == []


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU whose one benchmark is the caller's to write."""
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(bench, "SUITES", {0: {"one": ()}})
    return tmp_path


def test_bench_prints_one_table(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (benchmarks / "one.py").write_text(GOOD)

    assert cli.main(["bench"]) == 0

    assert "speeds  way fast, GB/s 12.35" in capsys.readouterr().out


def test_bench_says_what_failed(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (benchmarks / "one.py").write_text(BAD)

    assert cli.main(["bench", "--json"]) == 1

    assert json.loads(capsys.readouterr().out) == {"reports": {}, "failures": {"one": "no luck today"}}


def test_bench_needs_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "nowhere")

    assert cli.main(["bench"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_calibration_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--calibrate"]) == 2

    assert "there is none here" in capsys.readouterr().err


@pytest.mark.gpu
def test_calibration_writes_what_plan_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SUSTAINED", 0.0)
    monkeypatch.setattr(calibrate, "TOKENS_PER_EXPERT", (16, 1024))
    monkeypatch.setattr(calibrate, "MOST_TOKENS", 8192)
    output = tmp_path / "gpu.yaml"
    torch.cuda.reset_peak_memory_stats()

    assert cli.main(["bench", "--calibrate", "--output", str(output)]) == 0

    assert torch.cuda.max_memory_allocated() < 4 << 30, "activations of more than one layer are kept"
    measured = load_gpu(str(output))
    assert 0.2 < measured.efficiency.host <= 1
    few, many = (measured.efficiency.grouped_gemm[tokens] for tokens in (16.0, 512.0))
    assert 0 < few < many <= 1, "what is slow under a sanitizer too is slower with fewer tokens an expert"


@pytest.mark.parametrize(
    ("product", "preset"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GB200", "gb200"), ("AMD Instinct MI355X", "mi355x")],
)
def test_a_product_has_the_preset_of_its_name(product: str, preset: str) -> None:
    assert preset_of(product) == preset


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(ConfigError, match="--base"):
        preset_of("GeForce 256")


def test_a_written_gpu_is_read_back(tmp_path: Path) -> None:
    gpu = load_gpu("h100")

    write_gpu(gpu, tmp_path / "gpu.yaml", {"efficiency": "made up"})

    assert load_gpu(str(tmp_path / "gpu.yaml")) == gpu


def test_grouped_gemm_is_interpolated_over_logarithms() -> None:
    efficiency = Efficiency(grouped_gemm={16: 0.1, 64: 0.3, 256: 0.4})

    assert efficiency.grouped_gemm_at(1) == 0.1
    assert efficiency.grouped_gemm_at(32) == pytest.approx(0.2)
    assert efficiency.grouped_gemm_at(1e6) == 0.4
    assert Efficiency(grouped_gemm=0.5).grouped_gemm_at(32) == 0.5

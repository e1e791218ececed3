"""The planner and the simulator against published figures (arXiv 2604.01621): what docs/validation.md promises."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vmm_dwdp.planning.contention import meeting_shares, serial_efficiency
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.roofline import all_to_all, layer_operations


@pytest.fixture(scope="module")
def validation() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks/validation.py"
    spec = importlib.util.spec_from_file_location("validation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


def test_meetings_are_exact_by_the_formula(validation: ModuleType) -> None:
    for size, published in validation.MEETINGS.items():
        assert tuple(round(100 * share, 2) for share in meeting_shares(size)[: len(published)]) == published
        assert sum(meeting_shares(size)) == pytest.approx(1)


@pytest.mark.parametrize("size", [2, 3, 4, 9, 72])
def test_serial_efficiency_is_the_mean_share_of_a_link(size: int) -> None:
    mean = sum(share / (others + 1) for others, share in enumerate(meeting_shares(size)))

    assert serial_efficiency(size) == pytest.approx(mean)


def test_the_simulator_meets_as_often_as_the_formula_says(validation: ModuleType) -> None:
    simulated = validation.simulated_meetings(4, 400)

    for others, share in enumerate(meeting_shares(4)):
        assert simulated[others] == pytest.approx(100 * share, abs=1.5)


def test_compute_and_times_of_a_layer_are_within_ten_percent(validation: ModuleType) -> None:
    model, gpu = validation.MODEL, validation.PERFECT
    for tokens, (ratio, speedup) in validation.ROOFLINE.items():
        batch = validation.Batch.of(tokens)
        prefetch = Estimate(model, gpu, validation.DWDPConfig(group_size=4), batch).prefetch_seconds
        whole = validation.products(layer_operations(model, gpu, batch))
        share = validation.products(layer_operations(model, gpu, batch, experts=64))

        assert whole / prefetch == pytest.approx(ratio, rel=0.1)
        exchanged = share + all_to_all(model, gpu, tokens, 4)
        assert exchanged / max(whole, prefetch) == pytest.approx(speedup, rel=0.1)


def test_the_iteration_is_within_three_percent(validation: ModuleType) -> None:
    iteration, copying = validation.predicted_iteration()

    assert iteration == pytest.approx(validation.PREFETCHING, rel=0.03)
    assert copying == pytest.approx(validation.COPYING, rel=0.05)


@pytest.mark.parametrize(("ratio", "sign"), [(1.05, "better"), (2.64, "none")])
def test_slices_help_where_compute_barely_covers_the_copies(validation: ModuleType, ratio: float, sign: str) -> None:
    tokens = validation.tokens_for(ratio)
    effect = (
        validation.throughput(tokens, validation.SLICE, 4) / validation.throughput(tokens, validation.IN_TURN, 1) - 1
    )

    assert validation.sign(100 * effect) == sign


def test_small_batches_lose(validation: ModuleType) -> None:
    for model, gpu in (("gpt-oss-120b", "mi355x"), ("deepseek-r1-fp8", "mi355x"), ("deepseek-r1-nvfp4", "gb200")):
        config = validation.DWDPConfig(group_size=4)
        estimate = Estimate(validation.load_model(model), validation.load_gpu(gpu), config, validation.Batch.of(4096))
        assert estimate.speedup < 0.9

"""Rooflines, memory and estimates, against sums written out and against the simulator."""

import dataclasses

import pytest

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.estimate import Estimate, disturbed_seconds, recommend, steady_period
from vmm_dwdp.planning.gpus import Efficiency, GpuSpec, load_gpu
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.roofline import Batch, all_to_all, layer_operations
from vmm_dwdp.planning.simulator import Group, LayerWork, Phase, simulate
from vmm_dwdp.planning.work import GEMM_SENSITIVITY, slowdown

PERFECT = Efficiency(dense_gemm=1, grouped_gemm=1, attention=1, memory=1, elementwise=1, link=1, host=1)
GPU = GpuSpec(
    name="simple", memory_bytes=80e9, memory_bandwidth=1e12, peak_flops={"bf16": 1e15}, link_bandwidth=1e11,
    host_bandwidth=5e10, max_group=8, efficiency=PERFECT,
)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 12, 1)])
def test_pairs_are_those_of_a_causal_mask(lengths: tuple[int, ...], window: int | None) -> None:
    reach = window or max(lengths)
    counted = sum(query - key < reach for n in lengths for query in range(n) for key in range(query + 1))

    assert Batch(lengths).pairs(window) == counted


def test_a_batch_is_cut_into_requests() -> None:
    assert Batch.of(10, 4).lengths == (4, 4, 2)
    assert Batch.of(10).lengths == (10,)
    with pytest.raises(ConfigError):
        Batch.of(0)


def test_long_passes_are_bound_by_arithmetic_and_short_ones_by_memory() -> None:
    model = load_model("mixtral-8x7b")

    def experts(tokens: int) -> float:
        return layer_operations(model, GPU, Batch.of(tokens))[-1].seconds

    assert experts(1 << 16) == pytest.approx(2 * (1 << 16) * 2 * 3 * 4096 * 14336 / 1e15)
    one_token = 8 * (1 - (7 / 8) ** 2) / 8 * model.layer_expert_bytes  # 2 of 8 experts, which may be the same
    assert experts(1) == pytest.approx(one_token / 1e12, rel=1e-3)


def test_all_to_all_moves_each_token_to_its_experts_and_back() -> None:
    model = load_model("mixtral-8x7b")

    assert all_to_all(model, GPU, 1000, 4) == pytest.approx(1000 * 2 * 0.75 * 4096 * (2 + 2) / 1e11)
    assert all_to_all(model, GPU, 1000, 1) == 0


def test_memory_bound_operations_share_the_bandwidth_with_copies() -> None:
    assert slowdown("memory", GPU, from_host=False) == pytest.approx(1 / (1 - 0.2))
    assert slowdown("memory", GPU, from_host=True) == pytest.approx(1 / (1 - 0.05))
    assert slowdown("attention", GPU, from_host=False) == pytest.approx(1 + GEMM_SENSITIVITY * 0.2)
    gb200 = load_gpu("gb200")
    assert slowdown("attention", gb200, from_host=False) == gb200.copy_slowdown["attention"]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("copying", [0.5, 2.0, 3.9, 6.0])
def test_the_steady_period_is_what_the_simulator_settles_at(depth: int, copying: float) -> None:
    work = LayerWork((Phase(2.0, 1.25), Phase(1.0)), (Phase(1.5),))
    spec = dataclasses.replace(load_model("mixtral-8x7b").expert_weights["w2"], shape=(4, 1 << 20))
    group = Group(
        config=DWDPConfig(group_size=2, prefetch_depth=depth),
        weights={"w": spec},
        num_layers=12,
        granularity=4096,
        rates=Rates(reader=(4 << 20) / copying, owner=1e12, host_reader=1.0, host=1.0),
    )

    ends = simulate(group, [[work] * 6] * 2).pass_end[0]

    # Without the first pass, which fills the slots, and the last, after which nothing is fetched.
    assert (ends[-2] - ends[0]) / 4 / 12 == pytest.approx(steady_period(work, copying, depth), rel=1e-3)


def test_disturbance_ends_with_the_copies() -> None:
    work = LayerWork((Phase(2.0, 2.0),), (Phase(1.0, 3.0),))

    assert disturbed_seconds(work, 0) == 3
    assert disturbed_seconds(work, 2) == 1 * 2 + 1 + 1
    assert disturbed_seconds(work, 5.5) == 4 + 1.5 + 0.5
    assert disturbed_seconds(work, 100) == 7


def estimate(size: int = 4, tokens: int = 8192, model: str = "deepseek-r1-nvfp4", gpu: str = "gb200") -> Estimate:
    return Estimate(load_model(model), load_gpu(gpu), DWDPConfig(group_size=size), Batch.of(tokens))


def test_what_is_fetched_is_what_others_hold() -> None:
    example = estimate()

    assert example.plan.fetched_bytes == example.model.layer_expert_bytes * 3 // 4
    assert example.prefetch_seconds == pytest.approx(example.plan.fetched_bytes / (0.88 * 900e9))


def test_it_pays_from_where_the_speedup_reaches_one() -> None:
    example = estimate()
    assert example.pays_from is not None

    assert example.with_tokens(example.pays_from).speedup >= 1
    assert example.with_tokens(example.pays_from * 95 // 100).speedup < 1
    assert example.with_tokens(1024).speedup < 1


def test_imbalance_is_paid_by_expert_parallelism_only() -> None:
    even, uneven = estimate(), dataclasses.replace(estimate(), imbalance=0.2)

    assert uneven.dwdp_seconds == even.dwdp_seconds
    assert 1.1 < uneven.expert_parallel_seconds / even.expert_parallel_seconds < 1.2


def test_the_recommendation_fits_and_is_no_slower() -> None:
    example = estimate(tokens=16384)
    best = recommend(example)

    assert best is not None
    assert best.memory.kv_tokens >= 16384
    assert best.dwdp_seconds <= example.dwdp_seconds * 1.01


def test_a_group_that_does_not_fit_is_told_what_would() -> None:
    with pytest.raises(ConfigError, match=r"does not fit on GB200 in a group of 2.*GiB more than it has; a group of"):
        estimate(2).require_fit()
    with pytest.raises(ConfigError, match="no group of up to 8 fits"):
        estimate(8, model="kimi-k2", gpu="h100").require_fit()
    estimate(4).require_fit()


def test_a_group_beyond_the_link_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8 H100"):
        estimate(16, gpu="h100")

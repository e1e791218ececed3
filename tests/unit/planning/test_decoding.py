"""Tokens a second of decoding, against sums written out, banks of plain sets, and passes that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bank_model import BankModel

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.decoding import KERNELS, OF_BOUND, REST, Decoding
from vmm_dwdp.planning.formats import WeightFormat
from vmm_dwdp.planning.gpus import Efficiency, GpuSpec, load_gpu
from vmm_dwdp.planning.models import AttentionSpec, ModelSpec, load_model
from vmm_dwdp.planning.routing import RoutingTrace, read_trace

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PERFECT = Efficiency(dense_gemm=1, grouped_gemm=1, attention=1, memory=1, elementwise=1, link=1, host=1)
GPU = GpuSpec(
    name="simple", memory_bytes=80e9, memory_bandwidth=1e12, peak_flops={"bf16": 1e15}, link_bandwidth=1e11,
    host_bandwidth=5e10, max_group=8, efficiency=PERFECT,
)  # fmt: skip
LINK_ALONE = replace(GPU, memory_bandwidth=1e30, peak_flops={"bf16": 1e30})
IN_HOST_MEMORY = DWDPConfig(group_size=1, host_experts=128, mode="in_place", prefetch_depth=0)
QWEN = load_model("qwen3-30b-a3b")
VALUES = 3 * 2048 * 768  # of one of its experts


def trace(name: str) -> RoutingTrace:
    return read_trace(BENCHMARKS / "traces" / f"{name}.npz")


def kept(table: str, **which: object) -> float:
    rows = json.loads((BENCHMARKS / "results" / "routing.json").read_text())[table]
    (row,) = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return float(row["hits"])


@pytest.mark.parametrize(
    ("stored", "nbytes"),
    [
        (WeightFormat.BF16, 2 * VALUES),
        (WeightFormat.FP8_BLOCK, VALUES + 4 * VALUES // 128**2),
        (WeightFormat.MXFP4, VALUES // 2 + VALUES // 32),
        (WeightFormat.NVFP4, VALUES // 2 + VALUES // 16),
    ],
)
def test_the_bound_is_what_a_token_uses_over_the_link(stored: WeightFormat, nbytes: int) -> None:
    decoding = Decoding(QWEN.stored_as(stored), LINK_ALONE, IN_HOST_MEMORY, sequences=1)

    assert decoding.expert_bytes == nbytes
    assert decoding.missed_bytes == pytest.approx(48 * 8 * nbytes)
    assert 1 / decoding.bound_seconds == pytest.approx(5e10 / (48 * 8 * nbytes))
    faster = replace(decoding, link=54e9)
    assert 1 / faster.bound_seconds == pytest.approx(54e9 / (48 * 8 * nbytes))
    assert decoding.limit == "the link to host memory"


def test_sequences_share_experts_and_a_bank_holds_its_share_of_even_routing() -> None:
    decoding = Decoding(QWEN, LINK_ALONE, IN_HOST_MEMORY, sequences=4)
    banked = decoding.with_bank(decoding.bank_for(1 / 4))

    assert decoding.uses.from_host == pytest.approx(128 * (1 - (120 / 128) ** 4))
    assert banked.rows == 32
    assert banked.uses == decoding.uses._replace(hits=0.25)
    assert banked.bound_seconds == pytest.approx(0.75 * decoding.bound_seconds)


def test_links_to_ranks_and_to_host_memory_work_side_by_side() -> None:
    config = DWDPConfig(group_size=4, host_experts=64, mode="in_place", prefetch_depth=0)
    decoding = Decoding(QWEN, LINK_ALONE, config, sequences=1)
    expert = 48 * 2 * VALUES

    assert (decoding.uses.from_host, decoding.uses.from_ranks) == (pytest.approx(4), pytest.approx(3))
    assert decoding.bound_seconds == pytest.approx(4 * expert / 5e10)
    crowded = replace(decoding, gpu=replace(LINK_ALONE, host_memory_bandwidth=1e11))
    assert crowded.bound_seconds == pytest.approx(4 * expert / (1e11 / 4)), "four ranks read host memory at once"
    slow = replace(decoding, gpu=replace(LINK_ALONE, link_bandwidth=1e10))
    assert (slow.limit, slow.bound_seconds) == ("the links to other GPUs", pytest.approx(3 * expert / 1e10))
    with pytest.raises(ConfigError, match="both on other GPUs and in host memory"):
        replace(decoding, link=5e10)


def test_the_rest_of_the_model_reads_weights_cache_and_head() -> None:
    on_gpu = DWDPConfig(group_size=1, mode="in_place", prefetch_depth=0)
    decoding = Decoding(QWEN, GPU, on_gpu, sequences=2)
    # Per layer: the weights of the projections, and of the experts that one of 16 even choices hits; activations of
    # two tokens are little beside them. The head is in bf16, and a KV cache has 4 heads of 128 values, twice.
    attention = 2 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128)
    experts = 128 * (1 - (127 / 128) ** 16) * 2 * VALUES
    least = (48 * (attention + experts) + 2 * 151936 * 2048) / 1e12

    assert least < decoding.gpu_seconds < 1.02 * least
    assert decoding.bound_seconds == decoding.gpu_seconds, "nothing is remote"
    assert decoding.limit == "the GPU"
    longer = replace(decoding, context=1000)
    cached = 2 * 1000 * 48 * 2 * 4 * 128 * 2
    assert longer.gpu_seconds - decoding.gpu_seconds == pytest.approx(cached / 1e12)


@pytest.mark.parametrize("room", [1 / 16, 1 / 4, 1 / 2])
@pytest.mark.parametrize("name", ["mixed-0.01", "mixed-0.001"])
def test_hits_are_those_that_the_benchmark_replays(name: str, room: float) -> None:
    decoding = Decoding(QWEN, GPU, IN_HOST_MEMORY, sequences=1, trace=trace(name))
    banked = decoding.with_bank(decoding.bank_for(room))

    policy = "the bank's"
    assert banked.uses.hits == pytest.approx(kept("hits", trace=name, room=room, policy=policy))
    assert banked.uses.from_host == 8


def test_hits_of_sequences_together_are_those_that_the_benchmark_replays() -> None:
    decoding = Decoding(QWEN, GPU, IN_HOST_MEMORY, sequences=4, trace=trace("mixed-0.01"))
    banked = decoding.with_bank(decoding.bank_for(1 / 4))

    policy = "the bank's"
    assert banked.uses.hits == pytest.approx(kept("together", trace="mixed-0.01", sequences=4, policy=policy))


def plain(recorded: RoutingTrace, remote: range, room: int) -> tuple[float, float]:
    """Remote experts that a step of a sequence uses, and which share of them a bank of plain sets has."""
    uses = hits = 0
    for sequence in range(len(recorded.kinds)):
        for layer in range(recorded.num_layers):
            bank = BankModel(recorded.num_experts, room, own=set(range(recorded.num_experts)) - set(remote))
            for chosen in recorded.prefill[sequence, :, layer].tolist():
                bank.look_up(chosen, copies=True)
            before = bank.counts.copy()
            for chosen in recorded.decode[sequence, :, layer].tolist():
                bank.look_up(chosen, copies=True)
            uses, hits = uses + bank.counts[0] - before[0], hits + bank.counts[1] - before[1]
    return uses / recorded.decode[..., 0].size, hits / uses


def test_own_experts_take_no_room_and_cross_no_link() -> None:
    demo = trace("demo")
    few = replace(demo, prefill=demo.prefill[::8], decode=demo.decode[::8, :64], kinds=demo.kinds[::8])
    small = replace(QWEN, num_experts=16, top_k=4)
    config = DWDPConfig(group_size=2, mode="in_place", prefetch_depth=0)
    decoding = Decoding(small, GPU, config, sequences=1, trace=few)
    banked = decoding.with_bank(decoding.bank_for(1 / 4))
    ranks = [plain(few, remote, 4) for remote in (range(8, 16), range(8))]

    used, hits = max(ranks, key=lambda rank: rank[0] * (1 - rank[1]))
    assert banked.rows == 4
    assert banked.uses == (0.0, pytest.approx(used), pytest.approx(hits))


def layers_alone(count: int) -> ModelSpec:
    """What benchmarks/bank.py times: layers of Qwen3-30B-A3B's experts, without the rest."""
    nothing = AttentionSpec(heads=1, key_dim=1, value_dim=1, projections=((1, 1), (1, 1)), cached_values=1)
    return replace(
        QWEN, num_layers=count, moe_layers=tuple(range(count)), windows=(None,) * count, attention=nothing, vocabulary=0
    )


def measured() -> list[dict[str, Any]]:
    _, rows = json.loads((BENCHMARKS / "results/bank-h100.json").read_text()).values()
    return list(rows)


def fastest() -> float:
    """GB/s of the run's fastest copy: one beside a row was slow, and the link is no slower than any."""
    return max(row["link"] for row in measured())


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['batch']} of {row['routing']}")
def test_what_is_expected_was_measured(row: dict[str, Any]) -> None:
    gpu = load_gpu("h100")
    in_place = Decoding(layers_alone(6), gpu, IN_HOST_MEMORY, sequences=row["batch"], link=fastest() * 1e9)
    if row["routing"] == "none hits":  # which is no routing that is drawn, as the planner's is
        return
    assert row["gpu"] / 1e3 == pytest.approx(in_place.gpu_seconds + 6 * KERNELS, abs=6 * 4e-6)
    traced = replace(in_place, trace=trace(row["routing"]))
    banked = traced.with_bank(traced.bank_for(1 / 4))

    assert banked.rows == 32
    assert banked.uses.hits == pytest.approx(row["replayed"], abs=0.08), "of all sequences, not the first"
    alone = traced.expected_seconds - 6 * REST / OF_BOUND  # there is no rest of a layer
    assert 0.93 < 1e3 * alone / row["in place"] < 1.07


def test_what_passes_reach_of_their_bound_is_the_least_that_was_measured() -> None:
    missed = [(row["of bound"] * row["bank"] - row["gpu"]) * row["link"] / fastest() for row in measured()]
    reached = [(ms + row["gpu"]) / row["bank"] for ms, row in zip(missed, measured(), strict=True)]
    assert max(reached) < 1
    assert min(reached) == pytest.approx(OF_BOUND, abs=0.005)


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize(
    ("name", "model", "stored"),
    [
        ("fp8", "qwen3-30b-a3b", WeightFormat.FP8_BLOCK),
        ("mxfp4", "qwen3-30b-a3b", WeightFormat.MXFP4),
        ("gpt-oss", "gpt-oss-120b", WeightFormat.MXFP4),
    ],
)
def test_what_is_expected_of_whole_models_was_measured(name: str, model: str, stored: WeightFormat, gpu: str) -> None:
    """Whose bytes missed, and what a copy reached, are those of the run: the hits of one sequence are its own."""
    _, rows = json.loads((BENCHMARKS / f"results/whole_model-{name}-{gpu}.json").read_text()).values()
    for row in rows[:2]:
        decoding = Decoding(load_model(model).stored_as(stored), load_gpu(gpu), IN_HOST_MEMORY, sequences=1)
        missed = row["GB"] / row["link"]
        expected = (missed + decoding.gpu_seconds + decoding.kernels_seconds) / OF_BOUND

        if row["experts"] == "in place":
            assert decoding.missed_bytes / 1e9 == pytest.approx(row["GB"], rel=0.005)
        assert 0.9 < 1e3 * expected / row["ms"] < 1.1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sequences": 0}, "needs a sequence at least"),
        ({"context": -1}, "no fewer than 0 tokens"),
        ({"trace": trace("demo")}, "the trace is of layers of 16 experts, 4 a token, and qwen3-30b-a3b has 128 and 8"),
        ({"trace": trace("mixed-0.01"), "sequences": 33}, "the trace has 32 sequences, fewer than 33"),
        ({"config": replace(IN_HOST_MEMORY, group_size=9)}, "at most 8 simple"),
        (
            {"config": replace(IN_HOST_MEMORY, expert_bank=10**9), "sequences": 33},
            "more than 32 tokens brings no expert",
        ),
        ({"config": replace(IN_HOST_MEMORY, expert_bank=10**9)}, r"room for 2 experts.*needs \d+ bytes at least"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        replace(Decoding(QWEN, GPU, IN_HOST_MEMORY, sequences=1), **change)


def test_a_bank_and_a_context_that_do_not_fit_are_refused() -> None:
    decoding = Decoding(QWEN, GPU, IN_HOST_MEMORY, sequences=1)
    whole = decoding.with_bank(decoding.bank_for(1.0))

    decoding.require_fit()
    assert whole.rows == 128
    assert whole.left == decoding.left - whole.bank_nbytes
    assert whole.bank_nbytes >= 48 * 128 * 2 * VALUES
    whole.require_fit()
    with pytest.raises(ConfigError, match=r"does not fit on simple: \d+\.\d GiB more than it has, with 54"):
        replace(whole, context=10**6).require_fit()

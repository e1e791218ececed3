"""Decoding in `benchmarks/multi_gpu.py`: what is chosen, what it makes of what it sees, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import decode_over_links
from decode_over_links import QWEN3, TINY, Case
from decode_steps import Steps, nothing_hits, recorded, uses

from vmm_dwdp.planning.caches import Replay, bank_policy, replay
from vmm_dwdp.planning.routing import read_trace, used_experts

MIXED = read_trace(decode_over_links.TRACES / "mixed-0.01.npz").mixed()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [QWEN3, TINY], ids=lambda case: case.trace)
def test_where_nothing_is_to_hit_nothing_does_and_as_much_is_copied_as_may_be(case: Case, ranks: int) -> None:
    """But of the tiny model, and with more ranks, a few hit."""
    shape = case.shape
    each = shape.experts // ranks
    for batch in case.sequences:
        table = nothing_hits(shape, batch, ranks, case.steps)
        assert table.shape == (case.steps, shape.layers, batch, shape.top_k)
        assert all(len(set(token.tolist())) == shape.top_k for token in table.view(-1, shape.top_k))
        used = used_experts(table.numpy().astype(np.uint16), shape.experts).any(2)
        for rank in range(ranks):
            own = slice(rank * each, (rank + 1) * each)
            assert len(set(used[..., own].sum(-1).flatten().tolist())) == 1, "each step reads as much of each rank"
            remote = used.copy()
            remote[..., own] = False
            rounds = np.concatenate([remote] * 8)  # as the table comes round
            found = replay(rounds, round(decode_over_links.BANK * shape.experts), bank_policy)
            later = Replay(*(part[2 * case.steps :] for part in found))
            assert later.share() <= (0 if (case, ranks) == (QWEN3, 2) else decode_over_links.MOST_HITS)
            assert later.copied() == pytest.approx(1 / 8, rel=0.02), "more the planner lets no routing bring about"


def test_each_rank_has_other_sequences_in_decoding() -> None:
    shape = QWEN3.shape._replace(layers=MIXED.num_layers)
    tables = [recorded(MIXED, shape, 16, rank, 64) for rank in range(2)]
    for rank, table in enumerate(tables):
        assert table.shape == (64, 10, 16, 8)
        assert table[5, 3, 2].tolist() == MIXED.decode[16 * rank + 2, 5, 3].tolist()
    assert not torch.equal(*tables)


def test_experts_are_used_once_in_a_step_however_many_choose_them() -> None:
    table = torch.tensor([[[[0, 4], [4, 5]]], [[[1, 2], [2, 1]]]])  # two steps, one layer, two tokens
    assert uses(table, 8, range(4)) == ([2, 0], 5)
    assert uses(table, 8, range(4, 8)) == ([1, 2], 5)


def test_steps_take_the_rows_of_the_table_in_turn() -> None:
    shape = TINY.shape._replace(layers=2)
    steps = Steps(shape, 1, 3, torch.device("cpu"))
    table = torch.arange(3 * 2 * shape.top_k).view(3, 2, 1, shape.top_k)
    seen: list[int] = []

    def mix(layer: int, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        seen.append(int(chosen[0, 0]))
        return torch.full_like(x, float(chosen[0, 0]))

    steps.begin(table)
    for _ in range(4):
        steps.step(mix)
    assert seen == [0, 4, 8, 12, 16, 20, 0, 4]
    added = steps.kept.float() - steps.x.float()
    assert [round(added[step].mean().item()) for step in range(3)] == [4, 20, 36]
    steps.begin(table)
    assert not steps.kept.isfinite().any(), "no state of an earlier way is taken for that of this one"


def row(experts: str, ms: float, **others: Any) -> dict[str, Any]:
    about = {"weights": "fp8", "sequences": 4, "routing": "mixed", "experts": experts, "graph": True, "ms": ms}
    figures = {"hits": None, "copied": None, "GB": 0.0, "used GB": 0.1, "identical": True, "error": None}
    return about | figures | others


def parallel(experts: str, ms: float, error: float = 0.01) -> dict[str, Any]:
    return row(experts, ms, **dict.fromkeys(("GB", "used GB", "identical")), error=error)


FOUND = [
    [
        row("own", 0.5),
        row("in place", 2.0, GB=0.4),
        row("bank", 1.5, GB=0.2, hits=0.5, copied=0.1),
        parallel("all-to-all", 1.0),
        parallel("all-gather", 0.5),
    ],
    [
        row("own", 1.5),
        row("in place", 4.0, GB=0.6),
        row("bank", 2.5, GB=0.1, hits=0.75, copied=0.2),
        parallel("all-to-all", 1.0),
        parallel("all-gather", 1.0, 0.02),
    ],
]


def test_ranks_are_one_row_and_their_bound_is_what_crossed_and_a_step_in_own_memory() -> None:
    own, in_place, bank, to_all, gather = decode_over_links.of_ranks(FOUND, 400.0)
    assert (in_place["ms, mean"], in_place["ms, worst"]) == (3.0, 4.0)
    assert in_place["over the bound, mean"] == pytest.approx((2.0 / 1.5 + 4.0 / 3.0) / 2)
    assert bank["over the bound, worst"] == pytest.approx(1.5 / 1.0)
    assert own["over the bound, mean"] == 1
    assert (bank["hits"], bank["copied"], bank["GB"]) == (0.625, pytest.approx(0.15), pytest.approx(0.15))
    assert (own["hits"], own["copied"]) == (None, None)
    assert in_place["GB/s"] == pytest.approx(200)
    assert bank["over in place"] == pytest.approx(2 / 3)
    assert bank["over expert parallel"] == pytest.approx(2 / 0.75)
    assert to_all["over expert parallel"] == pytest.approx(1 / 0.75)
    assert (gather["GB"], gather["over the bound, mean"], gather["error"]) == (None, None, 0.02)
    assert all(list(other) == list(own) for other in (in_place, bank, to_all, gather))


def test_where_nothing_hits_there_is_no_expert_parallelism_to_compare_with() -> None:
    none = [[one | {"routing": "none hits"} for one in of_one[:3]] for of_one in FOUND]
    both = [mine + theirs for mine, theirs in zip(none, FOUND, strict=True)]
    rows = decode_over_links.of_ranks(both, None)
    assert [one["routing"] for one in rows] == ["mixed"] * 5 + ["none hits"] * 3
    assert rows[-1]["over expert parallel"] is None
    assert rows[-1]["over in place"] == pytest.approx(2 / 3)
    assert "over the bound, mean" not in rows[0]


def test_a_step_that_was_not_captured_on_every_rank_is_said() -> None:
    found = [[one | {"graph": rank == 0} for one in of_one] for rank, of_one in enumerate(FOUND)]
    assert not any(one["graph"] for one in decode_over_links.of_ranks(found, None))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, None),
        ({"identical": False}, "states have other bits than with all experts in a rank's own memory"),
        ({"routing": "none hits", "hits": 0.26}, "something hits"),
        ({"routing": "none hits", "hits": 0.0}, None),
        ({"GB": 1.7}, r"GB/s of .* cannot be: one large copy made 400\.0 GB/s"),
        ({"used GB": 13.3}, None),
        ({"used GB": 13.5}, "the GPU's memory is slower"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], sentence: str | None) -> None:
    found = [[row("in place", 4.0, **{"GB": 0.6} | changed)]]
    if sentence is None:
        decode_over_links.require_possible(found, 400.0, "h100")
    else:
        with pytest.raises(SystemExit, match=sentence):
            decode_over_links.require_possible(found, 400.0, "h100")


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_expert_parallelism_with_other_experts_is_refused(error: float) -> None:
    with pytest.raises(SystemExit, match="states are not those of the same experts"):
        decode_over_links.require_possible([[parallel("all-gather", 1.0, error)]], 400.0, "h100")

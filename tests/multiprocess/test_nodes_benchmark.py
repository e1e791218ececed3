"""The benchmark over nodes runs, and what it compares is equal: four ranks that share the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.nodes import Shape, run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = Shape(2, 2)


def as_place(function: Callable[[int], Any], shape: Shape, node: int, rank: int) -> Any:
    return function(node * shape.ranks + rank)


def test_over_nodes_the_bytes_fall_and_the_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import nodes
    from moe_stack import STACKS
    from ranks import Place

    monkeypatch.setattr(nodes, "run_group", lambda function, *_: run(SHAPE, partial(as_place, function)))
    tables = nodes.tables(Place("cpu", True), [STACKS["tiny"]], SHAPE.nodes, SHAPE.world, None, None)

    rows = tables["nodes, gloo"]
    assert [(row["spread"], row["rank"]) for row in rows] == [(s, r) for s in ("equal", "unequal") for r in range(4)]
    for row in rows:
        assert row["identical"] is True
        assert row["over nodes error"] < 1e-2, "two sums in bfloat16 instead of one"
        assert row["over nodes error"] <= row["over nodes error, a token"] < 2e-2
        assert row["expert parallel error"] <= row["expert parallel error, a token"] < 1e-6
        assert 0 < row["sent bytes"] <= row["tokens"] * 64 * 2, "each token at most once, and 64 values of it"
    (of_layer,) = tables["bytes"]
    assert of_layer["ratio"] == 3.0
    assert [(row["way"], row["spread"]) for row in tables["nodes crossover, gloo"]] == [
        (way, spread) for way in ("dwdp staged", "over nodes") for spread in ("equal", "unequal")
    ]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"over nodes error": 0.1}, "a result differs"),
        ({"over nodes error": float("nan")}, "a result differs"),
        ({"over nodes error, a token": 0.4}, "a result differs"),
        ({"expert parallel error, a token": float("nan")}, "a result differs"),
        ({"identical": False}, "a result differs"),
        ({"over nodes ms": 1e-3}, "cannot be: one large copy made 400.0 GB/s"),
        ({"expert parallel ms": 1e-3}, "cannot be: the GPU's peak is 989 TFLOP/s"),
    ],
    ids=str,
)
def test_what_the_hardware_cannot_have_is_refused(
    changed: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import nodes
    from moe_stack import STACKS
    from ranks import Place

    row = {"rank": 0, "tokens": 4096, "dwdp staged ms": 150.0, "over nodes ms": 60.0, "expert parallel ms": 60.0}
    row |= {f"{way} error{of}": 0.0 for way in ("over nodes", "expert parallel") for of in ("", ", a token")}
    row |= {"identical": True, "sent bytes": 1 << 24}
    row |= {"stack": "gpt-oss-120b", "network": "NVLink", "mean tokens": 4096, "spread": "equal"}

    def measured(of: dict[str, Any]) -> Callable[..., list[dict[str, Any]]]:
        return lambda place, stack, count, ranks, case, gpu: [dict(of) | {"rank": rank} for rank in range(ranks)]

    arguments = Place("cuda", False), [STACKS["gpt-oss-120b"]], 2, 4, "h100", 400.0
    monkeypatch.setattr(nodes, "run_case", measured(row))
    assert len(nodes.tables(*arguments)["nodes, NVLink"]) == 8, "such figures are possible"
    monkeypatch.setattr(nodes, "run_case", measured(row | changed))
    with pytest.raises(SystemExit, match=sentence):
        nodes.tables(*arguments)

"""docs/routing.md against what is kept, and what is kept against traces replayed by other means."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import plots
import routing

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning import caches
from vmm_dwdp.planning.routing import read_trace

ROOT = Path(__file__).parents[3]
KEPT = json.loads((ROOT / "benchmarks/results/routing.json").read_text())
PAGE = (ROOT / "docs/routing.md").read_text()
MIXED = ("mixed-0.01", "mixed-0.001")
SHOWN = ("least recently used", "decayed frequency, half-life 16", "the bank's", "foresight")


def kept(table: str, **which: object) -> dict[str, float]:
    (row,) = [row for row in KEPT[table] if all(row[name] == value for name, value in which.items())]
    return row


def percent(values: Sequence[float], decimals: int = 1) -> list[str]:
    return [f"{100 * value:.{decimals}f}" for value in values]


def lines_of_hits() -> Iterator[list[str]]:
    for policy in (*routing.POLICIES, "static, the same kind", "static, another kind"):
        shares = [
            kept("hits", trace=trace, room=room, policy=policy)["hits"]
            for trace in (*MIXED, "demo")
            for room in (1 / 8, 1 / 4, 1 / 2)
        ]
        yield [policy, *percent(shares)]


def lines_of_copied() -> Iterator[list[str]]:
    for policy in routing.POLICIES:
        shares = [
            kept("hits", trace=trace, room=room, policy=policy)["copied"]
            for trace in (*MIXED, "demo")
            for room in (1 / 8, 1 / 4, 1 / 2)
        ]
        yield [policy, *percent(shares)]


def lines_of_against() -> Iterator[list[str]]:
    for policy in routing.POLICIES:
        rows = [row for row in KEPT["against"] if (row["trace"], row["policy"]) == (MIXED[0], policy)]
        yield [policy, *percent([row[share] for row in rows for share in ("hits", "copied")])]


def lines_of_together() -> Iterator[list[str]]:
    for sequences in (1, 2, 4, 8, 16, 32):
        line = [str(sequences)]
        for trace in MIXED:
            rows = [kept("together", trace=trace, sequences=sequences, policy=policy) for policy in SHOWN]
            line += [*percent([rows[0]["experts used"]], 0), *percent([row["hits"] for row in rows])]
        yield line


def lines_of_topic() -> Iterator[list[str]]:
    for policy in routing.POLICIES:
        rows = [row for row in KEPT["topic"] if (row["trace"], row["policy"]) == (MIXED[0], policy)]
        yield [policy, *percent([row[f"after {which} kind"] for which in ("the same", "another") for row in rows])]


def lines_of_reuse() -> Iterator[list[str]]:
    for trace, last in ((MIXED[0], 9), (MIXED[1], 9), ("demo", 5)):
        for layer in ("all", 0, last):
            row = kept("reuse", trace=trace, layer=layer)
            tokens = [row[name] for name in ("median", "9 of 10 within", "shuffled median", "by chance")]
            yield [trace, str(layer), *percent([row["of the next token's"]]), *(f"{value:.0f}" for value in tokens)]


def lines_of_owners() -> Iterator[list[str]]:
    for row in KEPT["owners"]:
        if row["trace"] in MIXED:
            yield [
                value if isinstance(value, str) else f"{value:.{2 * isinstance(value, float)}f}"
                for value in row.values()
            ]


@pytest.mark.parametrize(
    "lines",
    [
        lines_of_hits,
        lines_of_copied,
        lines_of_against,
        lines_of_together,
        lines_of_topic,
        lines_of_reuse,
        lines_of_owners,
    ],
    ids=lambda f: f.__name__,
)
def test_the_page_has_the_figures_that_are_kept(lines: Callable[[], Iterator[list[str]]]) -> None:
    stated = [line for line in lines() if f"\n| {' | '.join(line)} |\n" not in PAGE]

    assert stated == []


def test_the_bank_hits_nearly_what_the_best_policy_does_that_does_not_know_the_future() -> None:
    """And whatever is chosen, it copies an eighth at most."""
    for table, across in (("hits", "room"), ("together", "sequences")):
        for of_bank in (row for row in KEPT[table] if row["policy"] == "the bank's"):
            others = [row for row in KEPT[table] if (row["trace"], row[across]) == (of_bank["trace"], of_bank[across])]
            online = [row for row in others if row["policy"] in routing.POLICIES and row["policy"] != "foresight"]
            assert of_bank["hits"] >= 0.97 * max(row["hits"] for row in online)
    assert max(row["copied"] for row in KEPT["against"] if row["policy"] == "the bank's") == 1 / 8


def test_without_a_limit_half_of_what_comes_in_pairs_would_be_copied_and_nothing_hit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "USES_A_COPY", 1)
    rows = list(routing.against(routing.recorded(routing.TRACES / "mixed-0.01.npz")))
    (row,) = [row for row in rows if (row["routing"], row["policy"]) == ("half of them, in pairs", "the bank's")]
    assert (row["hits"], row["copied"]) == (0, 0.5)


def test_the_page_has_what_the_picture_shows_of_others() -> None:
    for name, points in plots.PUBLISHED.items():
        model, tracker, number = re.fullmatch(r"(\S+) \((\w+), (\d+)\)", name).groups()  # type: ignore[union-attr]
        lines = PAGE.partition("## What others have published")[2]
        part = lines[lines.index(f"| {model}") :].partition(f"[{tracker}, {number}]")[0] if number != "1359" else lines
        assert all(re.search(rf"(?<![\d.]){re.escape(f'{100 * hits:.1f}')}(?!\d)", part) for _, hits in points)


@pytest.mark.parametrize("name", ["demo", "mixed-0.01"])
def test_hits_of_least_recently_used_are_those_of_stack_distances(name: str) -> None:
    """A use hits in room for R if fewer than R other experts were used since: no bank is simulated. Of one layer."""
    trace = read_trace(routing.TRACES / f"{name}.npz")
    layer, room = 1, trace.num_experts // 4
    chosen = np.concatenate([trace.prefill, trace.decode], axis=1)[:, :, layer]
    hits = 0
    for sequence in chosen.tolist():
        recent: list[int] = []  # the latest first; of one step, lower numbers first
        for step, experts in enumerate(sequence):
            if step >= trace.prefill.shape[1]:
                hits += sum(expert in recent[:room] for expert in experts)
            recent = experts + [expert for expert in recent if expert not in experts]
    replayed = routing.recorded(routing.TRACES / f"{name}.npz")
    of_layer = replayed._replace(prefill=replayed.prefill[:, :, [layer]], decode=replayed.decode[:, :, [layer]])

    assert routing.warm(of_layer, 1 / 4, routing.least_recently_used).share() == hits / trace.decode[:, :, layer].size


def test_what_is_kept_is_what_is_replayed_today() -> None:
    """The demo's trace whole, by all tables: the others take longer."""
    found = routing.tables([routing.TRACES / "demo.npz"], list(routing.TABLES))

    for table, rows in found.items():
        before = [row for row in KEPT[table] if row["trace"] == "demo"]
        for row, now in zip(before, rows, strict=True):
            assert row == {
                name: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                for name, value in now.items()
            }


def test_the_traces_page_has_what_was_seen_in_training() -> None:
    page = (routing.TRACES / "README.md").read_text()
    both = [read_trace(routing.TRACES / f"{name}.npz").facts for name in MIXED]
    seen = [facts["training"][-1] for facts in both]
    lines = [
        ["parameters", *(f"{facts['parameters']:,}" for facts in both)],
        ["seconds of training, steps", *(f"{last['seconds']:.0f}, {last['step']:,}" for last in seen)],
        ["tokens seen", *(f"{last['tokens']:,}" for last in seen)],
        ["loss of the last step, nats a token", *(f"{last['loss']:.3f}" for last in seen)],
        ["balancing loss then, 1 if a layer chooses evenly", *(f"{last['imbalance']:.3f}" for last in seen)],
    ]
    for kind in both[0]["held_out_bits_per_byte"]:
        name = kind if kind in {"prose", "manuals"} else kind.capitalize()
        name = f"bits a byte, text not trained on: {name}" if kind == "prose" else name
        lines.append([name, *(f"{facts['held_out_bits_per_byte'][kind]:.3f}" for facts in both)])

    assert [line for line in lines if f"\n| {' | '.join(line)} |\n" not in page] == []


def test_a_trace_of_few_sequences_has_the_rows_that_it_can_have(tmp_path: Path) -> None:
    trace = read_trace(routing.TRACES / "demo.npz")
    few, path = [0, 1, 16, 17], tmp_path / "few.npz"
    facts, kinds = np.array(json.dumps(dict(trace.facts))), np.array(["novels"] * 2 + ["plays"] * 2)
    np.savez(path, prefill=trace.prefill[few, :2], decode=trace.decode[few, :40], kinds=kinds, facts=facts)
    found = routing.tables([path], list(routing.TABLES))

    assert {row["sequences"] for row in found["together"]} == {1, 2, 4}
    assert {row["tokens since"] for row in found["topic"]} == {"1 to 8", "9 to 32"}
    assert {(row["ranks"], row["sequences a rank"]) for row in found["owners"]} == {(2, 1), (4, 1)}
    numbers = [value for rows in found.values() for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()


def test_traces_of_one_kind_of_text_are_refused(tmp_path: Path) -> None:
    trace = read_trace(routing.TRACES / "demo.npz")
    path = tmp_path / "one.npz"
    facts = np.array(json.dumps(dict(trace.facts)))
    np.savez(path, prefill=trace.prefill[:4], decode=trace.decode[:4], kinds=np.array(["novels"] * 4), facts=facts)

    with pytest.raises(ConfigError, match=r"one\.npz cannot be compared by kinds of text"):
        routing.recorded(path)

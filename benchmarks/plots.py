"""The README's pictures, from what is kept in benchmarks/results: nothing is measured here, and nothing drawn by hand.

    python benchmarks/plots.py docs

Each file carries the figures that it shows, as JSON under "Description", so that a test finds a picture that is old.


prefill.png   a pass over MoE layers on four GPUs against the tokens of a GPU, beside expert parallelism, and the number
              of tokens from which prefetching is no slower
decode.png    tokens a second through MoE layers whose experts are in host memory: copied ahead, read in place, and in
              place with a cache for a quarter of them; beside experts in GPU memory
routing.png   hits of cache policies over recorded routing, by room and by sequences decoded together; with what others
              have published of larger models
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from vmm_dwdp.observe.figures import new_figure

RESULTS = Path(__file__).parent / "results"
PREFILL, DECODE, ROUTING = "multi_gpu-4-h200.json", "decode-cache-h100.json", "routing.json"
ROUTED = "mixed-0.01"
LINES = {  # by policy: colour, marker
    "foresight": ("#8a8a8a", "^"),
    "the bank's": ("#1f6fb4", "o"),
    "least recently used": ("#d1603d", "s"),
    "random": ("#b08a2e", "v"),
    "static, the same kind": ("#7fb0da", "D"),
    "static, another kind": ("#b9c6d2", "x"),
}
PUBLISHED = {  # hits of least recently used on other models, by the part of a layer's experts that there is room for
    "Qwen3-30B-A3B (imp, 1359)": [(0.40, 0.947), (0.40, 0.900), (0.40, 0.953)],
    "Qwen3.8-Flash-Next (imp, 2061)": [(93 / 512, 0.435), (186 / 512, 0.620), (279 / 512, 0.720), (372 / 512, 0.789)],
    "OLMoE-1B-7B (colibri, 1092)": [(16 / 64, 0.514)],
}
OURS, THEIRS = "#1f6fb4", "#d1603d"  # also told apart by their markers, and named in the legends
SHADES = ("#b9c6d2", "#7fb0da", OURS, "#8a8a8a")


class Line(NamedTuple):
    """Passes over one stack, one way: mean tokens of a GPU, and milliseconds, the mean of the ranks."""

    tokens: list[int]
    milliseconds: list[float]


class Prefill(NamedTuple):
    """One stack of layers, for each ``spread`` of tokens ("equal", "unequal") both ways, and where they cross."""

    name: str
    dwdp: dict[str, Line]
    expert_parallel: dict[str, Line]
    crossover: dict[str, int]


class Decode(NamedTuple):
    """One model at one number of sequences: tokens a second through its layers, by where the experts are."""

    name: str
    rates: dict[str, float]


class Routing(NamedTuple):
    """Hits by policy, of one model's routing: by the part of the experts in the bank, and by sequences at a quarter."""

    by_room: dict[str, list[tuple[float, float]]]
    by_sequences: dict[str, list[tuple[int, float]]]
    published: dict[str, list[tuple[float, float]]]


def prefill() -> list[Prefill]:
    kept = json.loads((RESULTS / PREFILL).read_text())
    stacks = []
    for name in dict.fromkeys(row["stack"] for row in kept["stack"]):
        rows = [row for row in kept["stack"] if row["stack"] == name]
        found = [row for row in kept["crossover"] if row["stack"] == name]
        crossover = {row["spread"]: int(row["no slower than expert parallel from"]) for row in found}
        ways = ("dwdp staged ms", "expert parallel ms")
        staged, parallel = ({spread: _line(rows, spread, way) for spread in crossover} for way in ways)
        stacks.append(Prefill(name, staged, parallel, crossover))
    return stacks


def _line(rows: list[dict[str, Any]], spread: str, way: str) -> Line:
    tokens = sorted({row["mean tokens"] for row in rows})
    ranks = [[row[way] for row in rows if (row["mean tokens"], row["spread"]) == (mean, spread)] for mean in tokens]
    return Line(tokens, [statistics.mean(each) for each in ranks])


def decode() -> list[Decode]:
    """Eager passes: layers whose experts are in GPU memory were not timed in a graph."""
    kept = json.loads((RESULTS / DECODE).read_text())
    cases = []
    for title, rows in kept.items():
        for row in rows if title != "machine" else ():
            eager = {
                "copied ahead": row["staged"],
                "read in place": row["in place"],
                "in place, a quarter cached": row["cached"],
                "in GPU memory": row["gpu"],
            }
            tokens = row["batch"]
            name = f"{title.partition(':')[0]}\n{tokens} token{'s' * (tokens > 1)} a pass"
            cases.append(Decode(name, {where: 1e3 * tokens / ms for where, ms in eager.items()}))
    return cases


def routing() -> Routing:
    kept = json.loads((RESULTS / ROUTING).read_text())
    points: dict[str, dict[str, list[Any]]] = {"room": {}, "sequences": {}}
    for table, across in (("hits", "room"), ("together", "sequences")):
        for row in kept[table]:
            if row["trace"] == ROUTED and row["policy"] in LINES:
                points[across].setdefault(row["policy"], []).append((row[across], row["hits"]))
    return Routing(points["room"], points["sequences"], PUBLISHED)


def draw_prefill() -> Any:
    stacks = prefill()
    figure = new_figure(9, 3.6)
    for axes, stack in zip(figure.subplots(1, len(stacks)), stacks, strict=True):
        for spread, style in (("equal", "-"), ("unequal", "--")):
            tokens = "as many tokens each" if spread == "equal" else "half to one and a half"
            axes.plot(*stack.expert_parallel[spread], f"s{style}", color=THEIRS, label=f"expert parallel, {tokens}")
            axes.plot(*stack.dwdp[spread], f"o{style}", color=OURS, label=f"vmm-dwdp, {tokens}")
        crossing = stack.crossover["equal"]
        axes.axvline(crossing, ymax=0.3, color="#8a8a8a", linewidth=0.8)
        said, at = f"  no slower from {crossing:,} tokens on  ", (crossing, 0.04)
        side = "left" if 2 * crossing < axes.get_xlim()[1] else "right"
        axes.annotate(said, at, xycoords=("data", "axes fraction"), ha=side, fontsize=8)
        axes.set(title=stack.name, xlabel="tokens a GPU", xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks(stack.dwdp["equal"].tokens)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds of a pass")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw_decode() -> Any:
    cases = decode()
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(SHADES)
    for number, (where, shade) in enumerate(zip(cases[0].rates, SHADES, strict=True)):
        places = [place + (number - (len(SHADES) - 1) / 2) * width for place in range(len(cases))]
        bars = axes.bar(places, [case.rates[where] for case in cases], width * 0.94, color=shade, label=where)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=1)
    axes.set_yscale("log")
    axes.set(ylabel="tokens a second through these layers")
    axes.set_xticks(range(len(cases)), [case.name for case in cases])
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=len(SHADES), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def draw_routing() -> Any:
    shown = routing()
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, lines in ((left, shown.by_room), (right, shown.by_sequences)):
        for policy, (colour, marker) in LINES.items():
            if policy in lines:
                axes.plot(*zip(*lines[policy], strict=True), f"{marker}-", color=colour, markersize=4, label=policy)
        axes.spines[["top", "right"]].set_visible(False)
    for (model, points), marker in zip(shown.published.items(), "*Px", strict=True):
        said = f"published, least recently used: {model}"
        left.plot(*zip(*points, strict=True), marker, color="black", markersize=6, label=said)
    left.set(xlabel="room in the cache, part of a layer's experts", ylabel="hits", ylim=(0, 1), xlim=(0, 0.8))
    left.set_title("one sequence", fontsize=10)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
    right.set(xlabel="sequences decoded together")
    right.set_title("room for a quarter of the experts", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, ncols=3, loc="outside lower center")
    return figure


PICTURES = {
    "prefill.png": (prefill, draw_prefill),
    "decode.png": (decode, draw_decode),
    "routing.png": (routing, draw_routing),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where they are written")
    folder = parser.parse_args().folder
    for name, (figures, draw) in PICTURES.items():
        about = {"Software": None, "Description": json.dumps(figures())}
        draw().savefig(folder / name, dpi=130, metadata=about)


if __name__ == "__main__":
    main()

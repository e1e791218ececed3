"""What README.md and "is it for me" claim, against what is kept in benchmarks/results."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
README = " ".join((ROOT / "README.md").read_text().split())  # wherever its lines end
DECISION = (ROOT / "docs/is-it-for-me.md").read_text().partition("\n## What was measured\n")[2]
WHOLE, TWELVE = "end_to_end-h100.json", "end_to_end-12-layers-h100.json"
ENGINE, DECODE, MXFP4 = (
    "sglang_multi_gpu-4-h200.json",
    "sglang_multi_gpu-decode-2-h200.json",
    "whole_model-mxfp4-h200.json",
)
BOTH = "Qwen3-30B-A3B, mxfp4: 48 layers, the bytes of 48; mixed-0.01; a bank of 0.25"
PARALLEL = "no slower than expert parallel from"
RATE, STEP = "tokens/s a GPU", "ms a step"
MIXES = ("8 of 4K", "4 of 8K", "2 of 32K", "4 of 4K to 28K")  # with chunks of 32,768, which were better for both

# What README.md says, and where each of its figures is: (file, way into it).
CLAIMS: dict[str, list[tuple[str, str]]] = {
    **{
        f"| {mix} | {{:,.0f}} | {{:,.0f}} | {{:.2f}} |": [
            (ENGINE, f"prefill > {6 + number} > {RATE}"),
            (ENGINE, f"prefill > {30 + number} > {RATE}"),
            (ENGINE, f"compared > {6 + number} > over ep"),
        ]
        for number, mix in enumerate(MIXES)
    },
    "a step of 1, 4 and 16 sequences a GPU took {:.1f}, {:.1f} and {:.1f} ms, and {:.1f}, {:.1f} and {:.1f} by": [
        (DECODE, f"decode > {number} > {STEP}") for number in (0, 1, 2, 6, 7, 8)
    ],
    "{:,.0f} tokens a second with 4 prompts of 8K, instead of {:,.0f}": [
        (ENGINE, f"prefill > 43 > {RATE}"),
        (ENGINE, f"prefill > 7 > {RATE}"),
    ],
    "| {:.0f}, {:.0f} | {:.0f}, all in GPU memory |": [(MXFP4, f"{BOTH} > {number} > tokens/s") for number in range(3)],
    "from {:,.0f} tokens a GPU on for layers with DeepSeek-R1's bytes, and from {:,.0f} for gpt-oss-120b's": [
        ("multi_gpu-4-h200.json", f"crossover > 0 > {PARALLEL}"),
        ("multi_gpu-4-h200.json", f"crossover > 2 > {PARALLEL}"),
    ],
    "a pass of 8,192 tokens | {:.2f} s | {:.2f} s, accelerate's offloading |": [
        (TWELVE, "12 layers > 5 > seconds"),
        (TWELVE, "12 layers > 17 > seconds"),
    ],
    "a pass of 32,768 tokens | {:.2f} s with {:.1f} GB of GPU memory | {:.2f} s with {:.1f} GB, all in GPU memory |": [
        (WHOLE, "48 layers > 5 > seconds"),
        (WHOLE, "48 layers > 5 > GPU memory GB"),
        (WHOLE, "48 layers > 2 > seconds"),
        (WHOLE, "48 layers > 2 > GPU memory GB"),
    ],
}
PRINTED = ["242,567 | 198,786, SGLang", "21.17 | 92.41"]  # rows of README.md that results/sglang-h100.md has


def kept(file: str, way: str) -> float:
    found: Any = json.loads((ROOT / "benchmarks/results" / file).read_text())
    for step in way.split(" > "):
        found = found[int(step) if isinstance(found, list) else step]
    return float(found)


@pytest.mark.parametrize("claim", CLAIMS)
def test_readme_says_what_was_measured(claim: str) -> None:
    assert claim.format(*(kept(*where) for where in CLAIMS[claim])) in README


@pytest.mark.parametrize("claim", PRINTED)
def test_readme_says_what_sglang_printed(claim: str) -> None:
    printed = (ROOT / "benchmarks/results/sglang-h100.md").read_text()

    assert claim in README
    for figure in re.findall(r"[\d.,]*\d", claim):
        assert f"| {figure.replace(',', '')} |" in printed


def test_no_row_of_the_readme_is_unchecked() -> None:
    rows = re.findall(r"^\| .*\d.* \|$(?!\n\|-)", (ROOT / "README.md").read_text(), re.MULTILINE)  # no heads
    said = [claim.format(*(kept(*where) for where in ways)) for claim, ways in CLAIMS.items()] + PRINTED

    assert len(rows) == len(MIXES) + 5
    assert [row for row in rows if not any(text in row for text in said)] == []


@pytest.mark.parametrize("row", re.findall(r"^\|(.*`.*)\|$", DECISION, re.MULTILINE))
def test_a_leaf_has_its_figure(row: str) -> None:
    _, _, seen, where = map(str.strip, row.split("|"))
    file, way = re.fullmatch(r"`(\S+)`(?:: (.+))?", where).groups()  # type: ignore[union-attr]
    if way is None:
        assert f"| {seen} " in (ROOT / "benchmarks/results" / file).read_text()
        return
    decimals = len(seen.partition(".")[2])
    assert f"{kept(file, way):.{decimals}f}" == seen


def test_every_leaf_is_in_the_table() -> None:
    page = (ROOT / "docs/is-it-for-me.md").read_text()
    leaves = [title.lower() for title in re.findall(r"^## (.+)$", page, re.MULTILINE)]

    assert leaves.pop() == "what was measured"
    assert [leaf for leaf in leaves if f"| {leaf} |" not in DECISION.lower()] == []


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks/plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_show_what_is_kept_today(plots: ModuleType) -> None:
    """By the figures that `benchmarks/plots.py` wrote into them."""
    image = pytest.importorskip("PIL.Image")

    for name, (figures, _) in plots.PICTURES.items():
        with image.open(ROOT / "docs" / name) as picture:
            assert json.loads(picture.text["Description"]) == json.loads(json.dumps(figures()))


def test_the_picture_of_prefill_has_the_means_that_validation_has(plots: ModuleType) -> None:
    validated = (ROOT / "docs/validation.md").read_text()

    for stack in plots.prefill():
        for spread in ("equal", "unequal"):
            ours, theirs = stack.dwdp[spread], stack.expert_parallel[spread]
            for tokens, mine, other in zip(ours.tokens, ours.milliseconds, theirs.milliseconds, strict=True):
                row = rf"\| {stack.name} \| {tokens} \| {spread} \| {mine:.0f} \|[^|]+\|[^|]+\| {other:.0f} \|"
                assert re.search(row, validated), row


def test_the_picture_of_decode_has_the_rates_that_the_page_has(plots: ModuleType) -> None:
    """docs/decode.md rounds milliseconds to a tenth, and lists two of the four ways."""
    page = (ROOT / "docs/decode.md").read_text().partition("## A cache of the experts that are used most")[2]

    for case in plots.decode():
        tokens = int(re.search(r"(\d+) tokens?", case.name)[1])  # type: ignore[index]
        shown = [f"{1e3 * tokens / case.rates[way]:.1f}" for way in ("read in place", "in place, a quarter cached")]
        assert f"| {tokens} | {shown[0]} | {shown[1]} |" in page


def test_pictures_are_drawn_of_those_figures(plots: ModuleType) -> None:
    lines = [line for axes in plots.draw_prefill().axes for line in axes.get_lines() if len(line.get_xdata()) == 3]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    bars = [round(bar.get_height(), 6) for axes in plots.draw_decode().axes for bar in axes.patches]

    for stack in plots.prefill():
        for line in (*stack.dwdp.values(), *stack.expert_parallel.values()):
            assert (line.tokens, line.milliseconds) in drawn
    assert sorted(bars) == sorted(round(rate, 6) for case in plots.decode() for rate in case.rates.values())

"""The house: what each room is about, which rooms it may import, and how long a file and a function may be."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[3]
MOST_LINES: Final = 400  # of a file
MOST_CODE: Final = 60  # lines of a function that have code: no docstring, no comment, no empty line

ROOMS: Final = {  # from the bottom up: what it is about, in a word, and all that it may import
    "version": ("number", ""),
    "errors": ("refusals", ""),
    "config": ("choices", "errors"),
    "model_folder": ("names", "errors"),
    "temporary": ("remains", "errors"),
    "allocator": ("device", "errors"),
    "testing": ("processes", "errors allocator"),
    "kernels": ("products", "errors"),
    "layout": ("integers", "errors config"),
    "nodes": ("tokens", "errors layout"),
    "observe": ("figures", "errors config layout allocator"),
    "memory": ("pages", "errors config layout allocator kernels observe"),
    "schedule": ("time", "errors config layout allocator observe memory"),
    "group": ("others", "errors config layout allocator observe memory"),
    "rank": ("lifetime", "errors config temporary layout allocator observe memory schedule group"),
    "together": ("changes", "errors layout group rank"),
    "runtime": ("passes", "errors config layout allocator observe memory schedule group together"),
    "operators": ("compilers", "errors runtime"),
    "checkpoint": ("files", "errors config layout allocator runtime"),
    "planning": ("paper", "errors config layout allocator kernels observe memory schedule runtime"),
    "integrations": (
        "engines",
        "errors config model_folder layout nodes allocator kernels observe memory schedule group runtime checkpoint",
    ),
    "cli": (
        "commands",
        "version errors config testing model_folder temporary layout allocator kernels observe memory schedule group"
        " runtime checkpoint planning integrations",
    ),
}
# Public modules that only say where the names are now, and what `python -m` runs.
DOORS: Final = {"stats", "metrics", "trace", "mode_choice", "__main__"}


@functools.cache
def modules() -> dict[str, Path]:
    """By dotted name; what is compiled has its types in a file of its own. Links in the package are not followed."""
    found = {}
    for folder, prefix in (("vmm_dwdp", ""), ("allocator", "vmm_dwdp."), ("kernels", "vmm_dwdp.")):
        for path in sorted(path for path in (ROOT / folder).rglob("*.py*") if path.suffix in {".py", ".pyi"}):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] not in {("vmm_dwdp", "allocator"), ("vmm_dwdp", "kernels")}:
                found[prefix + ".".join(parts).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    return [*module.split("."), "vmm_dwdp"][1]


def imports(module: str) -> Iterator[str]:
    """Of this package's, wherever they stand: inside of functions and for types alone, too."""
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from {whole if whole in modules() else node.module or ""} & modules().keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules().keys()


INSIDE = sorted(modules().keys() - {"vmm_dwdp"} - {f"vmm_dwdp.{door}" for door in DOORS})


def test_every_room_has_a_word_and_imports_only_what_is_below() -> None:
    assert {room(module) for module in INSIDE} == ROOMS.keys()
    assert len({word for word, _ in ROOMS.values()}) == len(ROOMS)
    order = list(ROOMS)
    for name, (_, allowed) in ROOMS.items():
        assert set(allowed.split()) <= set(order[: order.index(name)]), f"{name} may import what is above it"


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_downward(module: str) -> None:
    _, allowed = ROOMS[room(module)]

    assert [name for name in imports(module) if room(name) not in {room(module), *allowed.split()}] == []


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter({module: {*imports(module)} for module in INSIDE}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_file_and_no_function_is_long(module: str) -> None:
    text = modules()[module].read_text()
    lines = text.splitlines()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    assert len(lines) <= MOST_LINES
    assert [node.name for node in functions if code_lines(node, lines) > MOST_CODE] == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    first = function.body[0]
    explained = range(0)
    if ast.get_docstring(function) is not None:
        explained = range(first.lineno, (first.end_lineno or 0) + 1)
    numbers = set(range(function.lineno, (function.end_lineno or 0) + 1)) - set(explained)
    return sum(bool(line) and not line.startswith("#") for line in (lines[n - 1].strip() for n in numbers))

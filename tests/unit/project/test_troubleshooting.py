"""docs/troubleshooting.md lists only sentences that the code can print."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FIRST_CELLS = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
SENTENCES = [sentence for cell in FIRST_CELLS for sentence in re.findall(r"`([^`]+)`", cell)]
DRIVER_ERROR = re.compile(r"(\S+) failed with .* while trying to (?:.*: )?(.+)")  # the code has its parts


@functools.cache
def printable() -> list[str]:
    """Every string of the code, in which what is filled in is ``...``; and the calls that it makes."""
    found = []
    for folder in ("vmm_dwdp", "allocator", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.Attribute):
                    found.append(node.attr)
    return found


def is_printable(sentence: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, sentence.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in printable())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentence_is_in_the_code(sentence: str) -> None:
    parts = DRIVER_ERROR.fullmatch(sentence)

    assert all(map(is_printable, [sentence] if parts is None else parts.groups()))


def test_there_are_sentences() -> None:
    assert len(SENTENCES) > 30

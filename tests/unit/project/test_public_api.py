"""docs/public-api.md against the reference and the code: what is public is explained, and nothing else is."""

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/public-api.md").read_text()
REFERENCE = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
EXPLAINED = set(re.findall(r"^(?:::: |`)(vmm_dwdp\.[\w.]+)", REFERENCE, re.MULTILINE))


def promised() -> set[str]:
    names = set()
    for module, cell in re.findall(r"^\| `(vmm_dwdp[\w.]*)` \| (.*) \|$", PAGE, re.MULTILINE):
        listed = set(re.findall(r"`(\w+)`", cell))
        if "__all__" in listed:
            listed = listed - {"__all__"} | set(importlib.import_module(module).__all__)
        names |= {f"{module}.{name}" for name in listed}
    return names


def test_the_reference_explains_what_is_promised_and_nothing_else() -> None:
    assert promised() == EXPLAINED


def parts(public: object) -> Iterator[tuple[str, str]]:
    """The name and the explanation of ``public`` and of all that it has."""
    explained = inspect.getdoc(public) or ""
    yield "", explained
    if not inspect.isclass(public):
        return
    for name, member in vars(public).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield name, inspect.getdoc(member) or ""
    fields = [field.name for field in dataclasses.fields(public)] if dataclasses.is_dataclass(public) else []
    members = list(public.__members__) if issubclass(public, enum.Enum) else []
    for name in [*fields, *members, *getattr(public, "_fields", ())]:
        line = re.search(rf"^ *(?:\w+, )*{name}(?:, \w+)*: (.+)$", explained, re.MULTILINE)
        yield name, line[1] if line else ""


@pytest.mark.parametrize("name", sorted(EXPLAINED - {"vmm_dwdp.HOST"}))
def test_every_part_of_it_has_a_docstring(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    if module == "vmm_dwdp.metrics":
        pytest.importorskip("prometheus_client")

    public = getattr(importlib.import_module(module), attribute)

    assert [part for part, explanation in parts(public) if not explanation] == []


def test_what_the_environment_may_say_is_public() -> None:
    folders = (ROOT / folder for folder in ("vmm_dwdp", "allocator", "kernels"))
    read = {name for folder in folders for path in folder.rglob("*.py") for name in variables(path)}

    assert read == variables(ROOT / "docs/public-api.md")


def variables(path: Path) -> set[str]:
    return set(re.findall(r"VMM_DWDP_\w+", path.read_text()))

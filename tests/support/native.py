"""The thread that gives copies to the driver, compiled for a test."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

SOURCES = sorted((Path(__file__).parents[2] / "allocator").glob("*.c"))


def compiled(folder: Path, *options: str, sources: Sequence[Path] = SOURCES) -> Path:
    library = folder / "_native.so"
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    include = sysconfig.get_path("include")
    command = ["cc", "-O1", *strict, *options, "-shared", "-fPIC", f"-I{include}", *sources, "-o", library]
    subprocess.run(command, check=True)
    return library


def loaded(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

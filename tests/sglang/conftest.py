"""These tests run against a real SGLang, of which `tests/sglang/run` installs the versions that are supported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = importlib.util.find_spec("sglang")
    if found is not None and found.origin is not None:  # else it is this folder, seen as a namespace
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs sglang: make test-sglang"))

"""These tests run against a real SGLang, of which `tests/sglang/run` installs the versions that are supported."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from vmm_dwdp.testing import run_group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = importlib.util.find_spec("sglang")
    if found is not None and found.origin is not None:  # else it is this folder, seen as a namespace
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs sglang: make test-sglang"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE with random weights."""
    import checkpoints

    return checkpoints.qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"))


@pytest.fixture(scope="session")
def ordinary(checkpoint: Path) -> list[list[int]]:
    """What SGLang answers without this library."""
    import answers

    [(tokens, spread)] = run_group(partial(answers.generate, checkpoint=checkpoint, size=1, environment={}), 1)
    assert spread == 0
    assert [len(answer) for answer in tokens] == [8] * len(answers.PROMPTS)
    assert len({token for answer in tokens for token in answer}) > 8
    return tokens

"""The code of docs/model-runners.md runs as it stands, and every shape of runner computes the same."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[3] / "docs/model-runners.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("runner", ["run_loop", "run_offloaded", "run_managed", "run_compiled", "run_twice_with_a_nap"])
def test_a_runner_computes_what_ordinary_layers_do(page: dict[str, Any], runner: str) -> None:
    layers = [page["Experts"]() for _ in range(page["LAYERS"])]
    page["load"](layers)
    x = expected = torch.randn(5, page["HIDDEN"], generator=torch.Generator().manual_seed(1))
    for layer in layers:
        expected = layer(expected, expert=3)

    assert torch.equal(page[runner](x), expected)
    assert not torch.equal(expected, x)

"""SGLang's own offline engine, on the CPU: the same tokens with its experts spread as without, prefill and decode."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from answers import TWO_RANKS, Tokens, generate

from vmm_dwdp.testing import run_group

pytestmark = pytest.mark.timeout(900)  # engines start slowly beside other tests

ROOM = 3 * 4 * (3 << 20)  # an expert of a layer has 3 MiB


def test_an_engine_with_two_ranks(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    """Whose shares overlap, with experts in host memory besides: ranks hold 3 of 8 each, from 0 and 2 on. Passes of few
    tokens read in place, others are staged."""
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 2\nnum_local_experts: 3\nhost_experts: 3\nmode: auto\n")
    environment = TWO_RANKS | {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=checkpoint, size=2, environment=environment, dwdp_size=2)

    assert run_group(run, 1) == [(ordinary, 2)]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_an_engine_that_looks_up_in_a_bank(checkpoint: Path, ordinary: Tokens, tmp_path: Path, ranks: int) -> None:
    """With room for 4 of 8 experts of each of its layers; of other ranks' experts, and of host memory's."""
    config = tmp_path / "dwdp.yaml"
    config.write_text(f"group_size: {ranks}\nhost_experts: 4\nmode: in_place\nexpert_bank: {ROOM}\n")
    environment = (TWO_RANKS if ranks > 1 else {}) | {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=checkpoint, size=ranks, environment=environment, dwdp_size=ranks)

    assert run_group(run, 1) == [(ordinary, ranks)]


def test_an_engine_with_experts_in_host_memory(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 5\nmode: auto\n")
    environment = {"VMM_DWDP_CONFIG": str(config)}
    run = partial(generate, checkpoint=checkpoint, size=1, environment=environment, save=True)

    assert run_group(partial(run, ep_num_redundant_experts=2), 1) == [(ordinary, 1)]

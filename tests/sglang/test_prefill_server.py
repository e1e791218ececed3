"""A prefill server whose ranks spread their experts, and a decode server: SGLang's, on the CPU, by Mooncake over TCP.

Both are started as docs/sglang.md says, and asked as a router asks them: both are sent every request, with a number by
which they find each other. The decode server has the first token and the KV cache from the prefill server and computes
what follows.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from answers import PROMPTS, TWO_RANKS, Tokens
from ports import free_port
from test_server import EVERY, LONGEST, environment, servers, with_our_memory

from vmm_dwdp.integrations.sglang import contract

pytestmark = pytest.mark.timeout(900)  # servers start slowly beside other tests
PAIR = [command for command in EVERY if "--disaggregation-mode" in command[1]]
BY_TCP = {"SGLANG_HOST_IP": "127.0.0.1"}  # where the servers offer their KV caches


@pytest.fixture
def mooncake() -> None:
    if contract.version() != "0.5.17":
        pytest.skip("by SGLang 0.5.17 alone: 0.5.23 registers a decode server's host memory with CUDA, also on the CPU")
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        pytest.skip(f"needs mooncake-transfer-engine-non-cuda, and libibverbs.so.1 for it: {error}")


def test_the_page_has_both_commands() -> None:
    assert [after.strip() for _, after in PAIR] == [
        "--disaggregation-mode prefill --tp-size 4 --dwdp-size 4",
        "--disaggregation-mode decode --base-gpu-id 4 --port 30001",
    ]


def pair(model: Path, prefill: str, decode: str, given: dict[str, str], folder: Path) -> tuple[list[Tokens], list[int]]:
    """Of a prefill and a decode server with these options: what both answer, and how many processes of each have our
    memory."""
    door, common = free_port(), f"--model-path {model} --disaggregation-transfer-backend mooncake_tcp"
    where: dict[str, Any] = {"bootstrap_host": "127.0.0.1", "bootstrap_port": door}
    where["bootstrap_room"] = [1 + number for number in range(len(PROMPTS))]  # SGLang takes 0 for none
    wanted = (
        (f"{common} {prefill} --disaggregation-bootstrap-port {door}", environment(BY_TCP | given), folder / "prefill"),
        (f"{common} {decode}", environment(BY_TCP), folder / "decode"),
    )
    with servers(*wanted) as both, ThreadPoolExecutor() as threads:
        asked = [threads.submit(each.tokens, PROMPTS, 8, LONGEST, **where) for each in both]
        return [each.result() for each in asked], [with_our_memory(each) for each in both]


@pytest.mark.usefixtures("mooncake")
def test_ranks_that_spread_their_experts(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    """By the documented commands, with a pair of ranks in the place of four and without what is of GPUs."""
    prefill, decode = (after.partition("--base-gpu-id")[0].replace("4", "2") for _, after in PAIR)

    found = pair(checkpoint, prefill, decode, TWO_RANKS, tmp_path)

    assert found == ([[answer[:1] for answer in ordinary], ordinary], [2, 0]), (tmp_path / "prefill").read_text()[
        -4000:
    ]


@pytest.mark.long
@pytest.mark.usefixtures("mooncake")
def test_experts_in_host_memory(checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    config = tmp_path / "dwdp.yaml"
    config.write_text("group_size: 1\nhost_experts: 5\n")

    roles = ("--disaggregation-mode prefill", "--disaggregation-mode decode")
    found = pair(checkpoint, *roles, {"VMM_DWDP_CONFIG": str(config)}, tmp_path)

    assert found == ([[answer[:1] for answer in ordinary], ordinary], [1, 0]), (tmp_path / "prefill").read_text()[
        -4000:
    ]

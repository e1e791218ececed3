"""The command lines of docs/sglang.md, as a user types them: SGLang's server, on the CPU, answers over HTTP with the
tokens of an engine that is started without this library."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from answers import PROMPTS, TWO_RANKS, Tokens

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from engine_processes import Failed
from free_ports import DERIVED, ports
from sglang_servers import Server

pytestmark = pytest.mark.timeout(900)  # servers start slowly beside other tests
PAGE = (Path(__file__).parents[2] / "docs/sglang.md").read_text()
EVERY = re.findall(r"^(.*)python -m sglang\.launch_server --model-path \.\.\.(.*)$", PAGE, re.MULTILINE)
COMMANDS = [command for command in EVERY if "--disaggregation-mode" not in command[1]]  # others: test_prefill_server.py
ON_THE_CPU = (
    "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--moe-runner-backend triton --disable-cuda-graph --max-total-tokens 2048 --max-running-requests 4 --random-seed 0"
)
WITHOUT_A_TOKENIZER = "--skip-tokenizer-init"  # the checkpoint has none
LONGEST = 900.0  # seconds until a server is given up


@contextmanager
def servers(*wanted: tuple[str, dict[str, str], Path]) -> Iterator[list[Server]]:
    """Those of such options, in such environments, that say what they do to such files; they start side by side."""
    begun = []
    try:
        for (options, given, log), port in zip(wanted, ports(), strict=False):
            options = f"{options} {ON_THE_CPU} {WITHOUT_A_TOKENIZER}"
            begun.append(Server(shlex.split(options), given, port, log))
        for each, (_, _, log) in zip(begun, wanted, strict=True):
            try:
                each.wait_until_ready(LONGEST)
            except Failed:
                pytest.fail(log.read_text()[-4000:])
        yield begun
    finally:
        for each in begun:
            each.kill()


def environment(given: dict[str, str]) -> dict[str, str]:
    """That of this process, but of this library only what is given."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VMM_DWDP")} | given


def with_our_memory(server: Server) -> int:
    """How many of its processes have it."""
    every = psutil.Process(server.pid).children(recursive=True)
    return sum("memfd:vmm_dwdp" in Path(f"/proc/{each.pid}/maps").read_text() for each in every)


def answered(options: str, given: dict[str, str], log: Path) -> tuple[Tokens, int]:
    """What a server answers, and how many of its processes have our memory."""
    with servers((options, environment(given), log)) as [started]:
        return started.tokens(PROMPTS, 8, LONGEST), with_our_memory(started)


def test_the_ports_that_sglang_derives_are_kept_free() -> None:
    from sglang.srt import server_args

    rendezvous = server_args.ZMQ_TCP_PORT_DELTA
    wanted = {0, server_args.DP_ATTENTION_HANDSHAKE_PORT_DELTA, *range(rendezvous, rendezvous + 7)}
    assert wanted == set(DERIVED), "the rendezvous of ranks, and six sockets after it"


def test_the_page_has_these_commands() -> None:
    assert [("VMM_DWDP_CONFIG" in before, after.strip()) for before, after in COMMANDS] == [
        (False, "--tp-size 4 --dwdp-size 4"),
        (True, ""),
        (True, "--tp-size 2"),
        (True, "--tp-size 4 --dwdp-size 4"),
    ]


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[pytest.mark.long] * (place > 0)) for place, command in enumerate(COMMANDS)],
    ids=[" ".join(command) for command in COMMANDS],
)
def test_a_documented_command(command: tuple[str, str], checkpoint: Path, ordinary: Tokens, tmp_path: Path) -> None:
    """As it stands there, but for the model, a pair of ranks where there are more, and what the CPU needs."""
    before, after = command
    options = after.replace("4", "2")
    size = 2 if "--tp-size" in options else 1
    given = TWO_RANKS if size == 2 else {}
    if "VMM_DWDP_CONFIG" in before:
        (tmp_path / "dwdp.yaml").write_text(
            f"group_size: {size if '--dwdp-size' in options else 1}\nhost_experts: auto\nmemory_bytes: 60 MiB\n"
        )
        given = given | {"VMM_DWDP_CONFIG": str(tmp_path / "dwdp.yaml")}

    found = answered(f"--model-path {checkpoint} {options}", given, tmp_path / "log")

    assert found == (ordinary, size), (tmp_path / "log").read_text()[-4000:]

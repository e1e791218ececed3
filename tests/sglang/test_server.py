"""The command lines of docs/sglang.md, as a user types them: SGLang's server, on the CPU, answers over HTTP with the
tokens of an engine that is started without this library."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from answers import PROMPTS, TWO_RANKS, Tokens
from ports import free_port

pytestmark = pytest.mark.timeout(900)  # servers start slowly beside other tests
PAGE = (Path(__file__).parents[2] / "docs/sglang.md").read_text()
COMMANDS = re.findall(r"^(.*)python -m (sglang\.launch_server) --model-path \.\.\.(.*)$", PAGE, re.MULTILINE)
ON_THE_CPU = (
    "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--moe-runner-backend triton --disable-cuda-graph --max-total-tokens 2048 --max-running-requests 4 --random-seed 0"
)
WITHOUT_A_TOKENIZER = "--skip-tokenizer-init"  # the checkpoint has none
LONGEST = 900.0  # seconds until a server is given up


@contextmanager
def server(options: str, environment: dict[str, str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server that is ready, and its process; what it says goes to ``log``."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", *shlex.split(options), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    begun, ready = threading.Event(), []

    def read() -> None:
        assert process.stdout is not None
        with log.open("w") as told:
            for line in process.stdout:
                told.write(line)
                told.flush()
                if "ready to roll" in line:
                    ready.append(line)
                    begun.set()
        begun.set()  # it has ended

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        begun.wait(LONGEST)
        assert ready, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.kill()
        process.wait()
        reader.join(LONGEST)


def answered(options: str, given: dict[str, str], log: Path) -> tuple[Tokens, int]:
    """What a server answers, and how many of its processes have our memory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VMM_DWDP")} | given
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with server(f"{options} {ON_THE_CPU} {WITHOUT_A_TOKENIZER}", environment, log) as (address, process):
        sent = {"input_ids": PROMPTS, "sampling_params": greedy}
        asked = Request(f"{address}/generate", json.dumps(sent).encode(), {"Content-Type": "application/json"})
        with urlopen(asked, timeout=LONGEST) as response:
            answers = json.load(response)
        maps = [Path(f"/proc/{each.pid}/maps").read_text() for each in process.children(recursive=True)]
        return [each["output_ids"] for each in answers], sum("memfd:vmm_dwdp" in each for each in maps)


def test_the_page_has_these_commands() -> None:
    assert [("VMM_DWDP_CONFIG" in before, after.strip()) for before, _, after in COMMANDS] == [
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
def test_a_documented_command(
    command: tuple[str, str, str], checkpoint: Path, ordinary: Tokens, tmp_path: Path
) -> None:
    """As it stands there, but for the model, a pair of ranks where there are more, and what the CPU needs."""
    before, _, after = command
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

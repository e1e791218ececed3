"""The benchmarks' servers: how they start, end and fail, and which figures of SGLang's client are refused."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import sglang_prefill_server
import sglang_serving
from engine_processes import Failed
from sglang_checkpoint import Shape
from sglang_servers import Server

from vmm_dwdp.planning.gpus import load_gpu

SMALL = Shape(2, 256, 4, 128, heads=2, kv_heads=1, experts_per_token=2, vocabulary=512)
SERVES = """
import http.server, json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = [{"output_ids": [*prompt, child.pid]} for prompt in asked["input_ids"]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
served = http.server.HTTPServer(("127.0.0.1", 0), Answers)
print("at", served.server_port, "ready to roll", flush=True)
served.serve_forever()
"""


@contextmanager
def server(code: str, folder: Path) -> Iterator[Server]:
    """One that runs this code in the place of SGLang."""
    (folder / "served.py").write_text(code)
    started = Server([], os.environ | {"PYTHONPATH": str(folder)}, 1, folder / "log", module="served")
    try:
        yield started
    finally:
        started.kill()


def test_it_answers_and_its_children_end_with_it(tmp_path: Path) -> None:
    with server(SERVES, tmp_path) as started:
        assert started.wait_until_ready(60) > 0
        started.address = f"http://127.0.0.1:{(tmp_path / 'log').read_text().split()[1]}"
        [[*prompt, child]] = started.tokens([[3, 4]], 1, 60)
        assert prompt == [3, 4]
        lives = select.poll()
        lives.register(os.pidfd_open(child))
        assert not lives.poll(0)
    ended = lives.poll(20_000)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    assert ended


def test_one_that_dies_has_its_sentence(tmp_path: Path) -> None:
    with (
        server("raise RuntimeError('no memory is left')", tmp_path) as started,
        pytest.raises(Failed, match=r"is left$"),
    ):
        started.wait_until_ready(60)


def test_one_that_does_not_start_is_given_up(tmp_path: Path) -> None:
    with server("input()", tmp_path) as started, pytest.raises(Failed, match=r"not ready after 0 s|EOF"):
        started.wait_until_ready(0)


def task() -> argparse.Namespace:
    sizes = {"prompts": 3, "concurrency": 2, "prompt_tokens": 8, "new_tokens": 2, "limit": 9.0, "shape": SMALL}
    return argparse.Namespace(**sizes)


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path, found: dict[str, Any], code: int = 0) -> dict[str, Any]:
    """What is made of what the client wrote into its file after a line of another run."""
    (folder / "file").write_text("{}\n" + json.dumps(found) + "\n")
    done = SimpleNamespace(returncode=code, stderr="a\nno server answers")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    return sglang_serving.asked(SimpleNamespace(address="http://x"), folder, task(), 2, folder / "file")  # type: ignore[arg-type]


WORK = {"completed": 6, "total_input_tokens": 48, "total_output_tokens": 12}


def test_the_clients_last_run_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert asked(monkeypatch, tmp_path, WORK) == WORK


@pytest.mark.parametrize("name", WORK)
def test_other_work_than_was_asked_for_has_no_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(Failed, match=r"not \(6, 48, 12\)"):
        asked(monkeypatch, tmp_path, WORK | {name: WORK[name] - 1})


def test_a_client_that_fails_has_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no server answers"):
        asked(monkeypatch, tmp_path, WORK, code=1)


def test_no_gpu_computes_prompts_faster_than_its_peaks() -> None:
    h100 = load_gpu("h100")
    most = 8 / sglang_serving.least_prefill_seconds(SMALL, [[8]], h100, fp8=False)
    sglang_serving._require_possible(task(), 0.99 * most, h100)
    with pytest.raises(Failed, match="prompt tokens/s cannot be"):
        sglang_serving._require_possible(task(), 1.01 * most, h100)


class Answering:
    """A server that answers with its name, and remembers where requests were to meet."""

    def __init__(self, name: int) -> None:
        self.name, self.met = name, []  # type: ignore[var-annotated]

    def tokens(self, prompts: list[list[int]], new_tokens: int, seconds: float, **more: Any) -> list[list[int]]:
        self.met.append(more)
        return [[self.name]] * len(prompts)


def test_both_servers_of_a_pair_are_told_where_each_request_meets() -> None:
    first, second = Answering(1), Answering(2)
    pair = sglang_prefill_server.Pair(first, second, 77)  # type: ignore[arg-type]
    rooms = iter(range(5, 99))

    assert pair.answered([[1], [2]], 4, rooms, 9)[0] == [[2], [2]], "what the decode server says"
    pair.answered([[3]], 4, rooms, 9)

    assert [each["bootstrap_room"] for each in first.met] == [[5, 6], [7]], "of their own each time"
    assert first.met == second.met
    assert {(each["bootstrap_host"], each["bootstrap_port"]) for each in first.met} == {("127.0.0.1", 77)}


def test_one_server_is_asked_once_and_meets_nobody() -> None:
    one = Answering(1)
    found, first, whole = sglang_prefill_server.Pair(one, one, 0).answered([[1]], 4, iter([]), 9)  # type: ignore[arg-type]
    assert (found, one.met) == ([[1]], [{}])
    assert first == whole > 0

"""Benchmarks that start engines and servers, cut by a signal: nothing that they started is left, and what they measured
is printed. SGLang is a stub of it, whose processes tell of themselves."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import cuts
from engine_processes import NoneLeft

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

TELLS = """
import os, subprocess, sys, threading

def tell():
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with open(os.environ["TOLD"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")

class Engine:
    def __init__(self, **_):
        tell()
        threading.Event().wait()
"""
SERVES = """
import http.server, json, sys
import sglang
class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "bootstrap_room" in asked and "decode" in sys.argv:
            sglang.tell()
            sglang.threading.Event().wait()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([{"output_ids": [1]} for prompt in asked["input_ids"]]).encode())
served = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answers)
sglang.tell()
print("ready to roll", flush=True)
served.serve_forever()
"""
HANGS = "import sglang; sglang.Engine()"
CLIENT = """
import json, sys
import sglang

def cli_main():
    given = dict(zip(sys.argv[1:], sys.argv[2:]))
    if given["--output-file"].endswith("run-3.jsonl"):  # the first of the second server
        sglang.tell()
        sglang.threading.Event().wait()
    numbers = ("--num-prompts", "--random-input-len", "--random-output-len")
    count, asked, answered = (int(given[name]) for name in numbers)
    found = {"completed": count, "total_input_tokens": count * asked, "total_output_tokens": count * answered}
    found |= dict.fromkeys(("input_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms"), 1.0)
    with open(given["--output-file"], "w") as file:
        json.dump(found, file)
"""
WORDS = {
    "sglang_serving.py": ["--servers", "one", "host", "--repeats", "1", "--tiny"],
    "sglang_prefill_server.py": ["--servers", "one", "host", "--repeats", "1", "--tiny"],
    "sglang_multi_gpu.py": ["--variants", "dwdp", "ep", "--tiny"],
    "sglang_engine.py": ["--variants", "gpu", "host", "--load-format", "dummy"],
}


@contextmanager
def begun(script: str, folder: Path, serves: str, tells: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The benchmark, and those that it started, which have told of themselves so often, each with a child."""
    package = folder / "sglang"
    for inner in (package / "srt/entrypoints", package / "srt/layers"):
        inner.mkdir(parents=True)
    for file, text in {"__init__": TELLS, "launch_server": serves, "bench_serving": CLIENT}.items():
        (package / f"{file}.py").write_text(text)
    for file in ("srt/__init__", "srt/entrypoints/__init__"):
        (package / f"{file}.py").touch()
    (package / "srt/entrypoints/engine.py").write_text("from sglang import Engine\n")
    (folder / "sglang-0.0.dist-info").mkdir()
    (folder / "sglang-0.0.dist-info/METADATA").write_text("Name: sglang\nVersion: 0.0\n")
    os.mkfifo(folder / "told")
    told = os.open(folder / "told", os.O_RDWR)  # so that it never ends
    ways = os.pathsep.join([str(folder), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    around = os.environ | {"PYTHONPATH": ways, "TOLD": str(folder / "told"), "TMPDIR": str(folder)}
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), "--device", "cpu", "--json", *WORDS[script]]
    ran = subprocess.Popen(command, env=around, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended, said, pids = os.pidfd_open(ran.pid), "", []
    try:
        while said.count("\n") < tells:
            if select.select([told, ended], [], [])[0] == [ended]:
                pytest.fail(ran.communicate()[1])
            said += os.read(told, 4096).decode()
        pids += map(int, said.split())
        yield ran, pids
    finally:
        for pid in [ran.pid, *pids]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        ran.communicate()
        os.close(told)
        os.close(ended)


def cut(ran: subprocess.Popen[str], pids: list[int], number: int) -> tuple[str, str]:
    """What it said, with all of them ended."""
    lives = [os.pidfd_open(pid) for pid in pids]
    ran.send_signal(number)
    assert ran.wait() == 1
    for each in lives:
        assert select.select([each], [], [], 20.0)[0], "one is left"
        os.close(each)
    return ran.communicate()


@pytest.mark.parametrize("script", WORDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_what_is_starting(script: str, number: signal.Signals, tmp_path: Path) -> None:
    with begun(script, tmp_path, HANGS, 2) as (ran, pids):
        _, errors = cut(ran, pids, number)
    assert errors.splitlines()[-1] == f"cut by {number.name}: not all was measured"


@pytest.mark.parametrize(("script", "tells"), [("sglang_serving.py", 3), ("sglang_prefill_server.py", 4)])
def test_rows_that_were_measured_are_printed(script: str, tells: int, tmp_path: Path) -> None:
    """The second server does not answer."""
    with begun(script, tmp_path, SERVES, tells) as (ran, pids):
        printed, _ = cut(ran, pids, signal.SIGTERM)
    [row] = json.loads(printed)["servers"]
    assert (row.get("server", row.get("servers")), row["over one"], row["failure"]) == ("one", 1.0, None)


class Killed:
    """A process that is there before a signal comes that cuts its start, and another that cuts its end."""

    def __init__(self, left: list[Killed], number: int) -> None:
        self._left = left
        left.append(self)
        os.kill(os.getpid(), number)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        self._left.remove(self)


@pytest.fixture
def cutting() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in cuts.SIGNALS}
    cuts.raise_when_cut()
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("cutting")
def test_who_is_cut_while_one_starts_or_is_killed_leaves_none() -> None:
    left: list[Killed] = []

    def run() -> None:
        with NoneLeft() as started:
            started.start(lambda: Killed(left, 0))
            started.start(lambda: Killed(left, signal.SIGTERM))

    with pytest.raises(cuts.Cut, match="cut by SIGTERM"):
        run()
    assert left == []


@pytest.mark.usefixtures("cutting")
def test_who_is_cut_at_the_end_leaves_none() -> None:
    left: list[Killed] = []

    def run() -> None:
        with NoneLeft() as started:
            for _ in range(3):
                started.start(lambda: Killed(left, 0))

    with pytest.raises(cuts.Cut, match="cut by SIGINT"):
        run()
    assert left == []

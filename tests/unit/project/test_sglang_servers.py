"""The benchmarks' servers: how they start, end and fail, and which figures of SGLang's client are refused."""

from __future__ import annotations

import argparse
import contextlib
import http.server
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import free_ports
import sglang_prefill_server
import sglang_serving
from engine_processes import Failed
from free_ports import ports
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
served = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answers)
print("ready to roll", flush=True)
served.serve_forever()
"""
LOSES = """
import signal, socket, sys
try:
    socket.create_server(("127.0.0.1", int(sys.argv[-1])))
except OSError as error:
    print("[a time] ERROR:    [Errno 98] error while attempting to bind on address: address already in use")
print("another answered: ready to roll", flush=True)
signal.pause()
"""


@contextmanager
def server(code: str, folder: Path, port: int | None = None) -> Iterator[Server]:
    """One that runs this code in the place of SGLang."""
    (folder / "served.py").write_text(code)
    around = os.environ | {"PYTHONPATH": str(folder)}
    started = Server([], around, port or next(ports()), folder / "log", module="served")
    try:
        yield started
    finally:
        started.kill()


def test_it_answers_and_its_children_end_with_it(tmp_path: Path) -> None:
    with server(SERVES, tmp_path) as started:
        assert started.wait_until_ready(60) > 0
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
        pytest.raises(Failed, match=r"^RuntimeError: no memory is left$"),
    ):
        started.wait_until_ready(60)


def test_one_that_does_not_start_is_given_up(tmp_path: Path) -> None:
    with server("input()", tmp_path) as started, pytest.raises(Failed, match=r"not ready after 0 s|EOF"):
        started.wait_until_ready(0)


def test_one_that_could_not_bind_is_not_ready_although_it_says_so(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as anothers,
        server(LOSES, tmp_path, anothers.getsockname()[1]) as started,
        pytest.raises(Failed, match=r"does not listen on port \d+: .*address already in use$"),
    ):
        started.wait_until_ready(60)


def test_where_nobody_is_named_who_listens_the_port_is_taken_for_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everybody = psutil.net_connections
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [each._replace(pid=None) for each in everybody(kind)])
    with server(SERVES, tmp_path) as started:
        assert started.wait_until_ready(60) > 0


def end(started: Server) -> None:
    """As one that crashes."""
    lives = select.poll()
    lives.register(os.pidfd_open(started.pid))
    os.kill(started.pid, signal.SIGKILL)
    assert lives.poll(20_000)


def test_one_that_ended_after_it_was_ready_has_its_sentence(tmp_path: Path) -> None:
    code = SERVES.replace("served.serve", "print('MemoryError: too much', flush=True)\nserved.serve")
    with server(code, tmp_path) as started:
        started.wait_until_ready(60)
        assert started.tokens([[3]], 1, 60)
        end(started)
        for ask in (started.require_alive, partial(started.wait_until_ready, 60)):
            with pytest.raises(Failed, match="it ended although it had been ready: MemoryError: too much"):
                ask()


class Answers(http.server.BaseHTTPRequestHandler):
    """Of another server."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'[{"output_ids": [1]}]')


def test_what_another_answers_is_not_its_answer(tmp_path: Path) -> None:
    port = next(ports())
    with server(SERVES, tmp_path, port) as started:
        started.wait_until_ready(60)
        end(started)
        with pytest.raises(Failed, match="it ended although it had been ready"):
            started.tokens([[3]], 1, 60)
        with http.server.HTTPServer(("127.0.0.1", port), Answers) as another:
            threading.Thread(target=another.handle_request).start()
            with pytest.raises(Failed, match="it ended although it had been ready"):
                started.tokens([[3]], 1, 60)


@pytest.mark.parametrize("more", [0, 13, 233, 239])
def test_ports_of_which_one_is_taken_are_not_used(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = next(ports())
    monkeypatch.setattr(free_ports, "FIRST", port)
    monkeypatch.setattr(free_ports, "END", port + free_ports.APART)
    assert next(ports()) == port
    with socket.create_server(("127.0.0.1", port + more)), pytest.raises(SystemExit, match="no ports are free"):
        next(ports())


def test_no_port_is_derived_from_two() -> None:
    taken = [port + more for port in ports_there_are() for more in free_ports.DERIVED]
    assert len(taken) == len(set(taken)) > 100


def ports_there_are() -> Iterator[int]:
    with contextlib.suppress(SystemExit):
        yield from ports()


def task() -> argparse.Namespace:
    sizes = {"prompts": 3, "concurrency": 2, "prompt_tokens": 8, "new_tokens": 2, "limit": 9.0, "shape": SMALL}
    return argparse.Namespace(**sizes)


class Living:
    """A server that ends after it has been asked about so often."""

    address = "http://x"

    def __init__(self, times: int = 9) -> None:
        self._times = times

    def require_alive(self) -> None:
        self._times -= 1
        if self._times < 0:
            raise Failed("the server ended")


class Counting:
    """A client that finds this, or fails."""

    def __init__(self, found: dict[str, Any] | None) -> None:
        self._found = found

    def figures(self, options: str, seconds: float) -> dict[str, Any]:
        if self._found is None:
            raise Failed("no server answers")
        return self._found


def asked(found: dict[str, Any] | None, server: Living | None = None) -> dict[str, Any]:
    return sglang_serving.asked(server or Living(), Counting(found), Path("model"), task(), 2)  # type: ignore[arg-type]


WORK = {"completed": 6, "total_input_tokens": 48, "total_output_tokens": 12}


def test_what_the_client_found() -> None:
    assert asked(WORK) == WORK


@pytest.mark.parametrize("name", WORK)
def test_other_work_than_was_asked_for_has_no_figures(name: str) -> None:
    with pytest.raises(Failed, match=r"not \(6, 48, 12\)"):
        asked(WORK | {name: WORK[name] - 1})


def test_who_ended_is_the_reason() -> None:
    with pytest.raises(Failed, match="no server answers"):
        asked(None)
    for found in (None, WORK):
        with pytest.raises(Failed, match="the server ended"):
            asked(found, Living(0))


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

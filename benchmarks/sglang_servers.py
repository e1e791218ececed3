"""SGLang's servers as processes that start side by side, and what they answer over HTTP.

What answers on a port may be another's server, an earlier run's for example: SGLang says that it is ready where it
could not bind its port and another answered its first request.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import torch
from engine_processes import Failed, reason

READY = "ready to roll"  # SGLang's server, after its own first request
SECONDS_TO_READ = 1.0  # the last words of one that has ended

Tokens = list[list[int]]


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark of servers, with ``gpus``; the CPU counts as two. Ends it where it cannot be run."""
    given = parser.parse_args()
    if importlib.util.find_spec("sglang") is None:
        parser.error("SGLang is not installed here: pip install '.[sglang]'")
    if given.device.type != "cuda" and not given.tiny:
        parser.error("these sizes need a GPU; --tiny shows without one that everything runs")
    given.gpus = torch.cuda.device_count() if given.device.type == "cuda" else 2
    return given


def options_of(device: torch.device, attention_backend: str, *, graphs: bool = False) -> str:
    """With which servers start fast and several share a GPU; graphs are of decode only."""
    common = "--sampling-backend pytorch --grammar-backend none --moe-runner-backend triton --random-seed 0"
    if device.type == "cpu":
        return f"{common} --device cpu --dtype float32 --attention-backend torch_native --disable-cuda-graph"
    kept = "--disable-prefill-cuda-graph" if graphs else "--disable-cuda-graph"
    together = "--mem-fraction-static 0.85 --enforce-disable-flashinfer-allreduce-fusion"
    return f"{common} --attention-backend {attention_backend} {kept} {together}"


def environment_of(device: torch.device, ranks: int) -> dict[str, str]:
    """That of this process, without what it says of this library, and what ``ranks`` need that share a machine."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("VMM_DWDP")}
    found["SGLANG_HOST_IP"] = "127.0.0.1"
    found["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
    found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"  # other servers take memory meanwhile
    if device.type == "cpu" and ranks > 1:
        found["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % 2) for rank in range(ranks))
        found["SGLANG_NCCL_SO_PATH"] = "none"  # a CUDA build of torch brings it, and SGLang uses it on the CPU too
    return found


class Server:
    """A server, which leads a process group with which it is killed.

    Args:
        options: of ``sglang.launch_server``.
        environment: all of it.
        port: of ``free_ports.ports``.
        log: a file, for what the server says.
        module: another that is run, which is ready when it says so in a line with ``ready``.
    """

    def __init__(
        self,
        options: Iterable[str],
        environment: Mapping[str, str],
        port: int,
        log: Path,
        *,
        module: str = "sglang.launch_server",
        ready: str = READY,
    ) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._port, self._log, self._ready_line = port, log, ready
        self._begun, self._is_ready = threading.Event(), False
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *options, "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self, seconds: float) -> float:
        """The seconds that it took to start.

        Raises:
            Failed: it died, or was not ready so many seconds after its start, or does not listen on its port.
        """
        begun = self._begun.wait(max(0.0, self._begin + seconds - time.monotonic()))
        if not begun:
            raise Failed(f"not ready after {seconds:.0f} s")
        if not self._is_ready:
            raise Failed(reason(self._log))
        self.require_alive()
        if not self._listens():
            raise Failed(f"it does not listen on port {self._port}: {reason(self._log)}")
        return self._ready_after

    def require_alive(self) -> None:
        """Raise `Failed` if it has ended after it was ready: what answers at its address is not it."""
        if self._process.poll() is not None:
            self._reader.join(SECONDS_TO_READ)
            raise Failed(f"it ended although it had been ready: {reason(self._log)}")

    def ask(self, path: str, sent: Any, seconds: float) -> Any:
        """What it answers to JSON. Raises `OSError` if it does not within so many seconds, `Failed` if it has ended."""
        given = Request(self.address + path, json.dumps(sent).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(given, timeout=seconds) as response:
                answer = json.load(response)
        except OSError:
            self.require_alive()  # else that is why
            raise
        self.require_alive()
        return answer

    def tokens(self, prompts: Tokens, new_tokens: int, seconds: float, **more: Any) -> Tokens:
        """What follows the prompts, greedily; ``more`` of the request's fields."""
        parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        answers = self.ask("/generate", {"input_ids": prompts, "sampling_params": parameters, **more}, seconds)
        return [answer["output_ids"] for answer in answers]

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """It and those that it started end at once. May be called again."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(SECONDS_TO_READ)

    def _listens(self) -> bool:
        """Whether it, or one that it started, listens on its port; or somebody whom the system does not name: the port
        was free before."""
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == self._port:
                with contextlib.suppress(ProcessLookupError):  # that one has just ended
                    if each.pid is None or os.getpgid(each.pid) == self.pid:
                        return True
        return False

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("w") as told:
            for line in self._process.stdout:
                told.write(line)
                told.flush()
                if self._ready_line in line and not self._is_ready:
                    self._ready_after = time.monotonic() - self._begin
                    self._is_ready = True
                    self._begun.set()
        self._begun.set()  # it has ended

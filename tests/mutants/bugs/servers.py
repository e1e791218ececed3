"""In how benchmarks start SGLang's engines, servers and client, ask them and end them."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_SERVERS = ("tests/unit/project/test_sglang_servers.py",)
_CLIENT = ("tests/unit/project/test_sglang_client.py",)
_CUT = ("tests/unit/project/test_cut_benchmarks.py",)

BUGS: Final = (
    Bug(
        "what an engine started lives on",
        "benchmarks/engine_processes.py",
        "            os.killpg(self._group, signal.SIGKILL)\n",
        "            pass\n",
        ("tests/unit/project/test_engine_processes.py",),
    ),
    Bug(
        "an engine that hangs is waited for",
        "benchmarks/engine_processes.py",
        "self._pipe.poll(max(0.0, end - time.monotonic()))",
        "self._pipe.poll(None)",
        ("tests/unit/project/test_engine_processes.py",),
    ),
    Bug(
        "engines do not wait for their turn",
        "benchmarks/engine_processes.py",
        "        pipe.send(time.monotonic())  # all processes have this clock\n        return pipe.recv()\n",
        "        pipe.send(time.monotonic())  # all processes have this clock\n",
        ("tests/unit/project/test_engine_processes.py",),
    ),
    Bug(
        "what a server started lives on",
        "benchmarks/sglang_servers.py",
        "            os.killpg(self.pid, signal.SIGKILL)\n",
        "            self._process.kill()\n",
        _SERVERS,
    ),
    Bug(
        "a server that died is taken for ready",
        "benchmarks/sglang_servers.py",
        "        if not self._is_ready:\n            raise",
        "        if False:\n            raise",
        _SERVERS,
    ),
    Bug(
        "a client that counted less work has figures",
        "benchmarks/sglang_serving.py",
        "    if work != wanted:\n",
        "    if work > wanted:\n",
        _SERVERS,
    ),
    Bug(
        "figures of an earlier run count",
        "benchmarks/sglang_client.py",
        'f"run-{self._runs}.jsonl"',
        '"run.jsonl"',
        _CLIENT,
    ),
    Bug(
        "a client that hangs is asked again",
        "benchmarks/sglang_client.py",
        "                self.kill()\n                self._begin()\n",
        "                pass\n",
        _CLIENT,
    ),
    Bug(
        "a server that cannot bind its port is taken for ready",
        "benchmarks/sglang_servers.py",
        "        if not self._listens():\n",
        "        if False:\n",
        _SERVERS,
    ),
    Bug(
        "what another answers counts",
        "benchmarks/sglang_servers.py",
        "        self.require_alive()\n        return answer\n",
        "        return answer\n",
        _SERVERS,
    ),
    Bug(
        "a server that ended after it was ready is taken for ready",
        "benchmarks/sglang_servers.py",
        "        self.require_alive()\n        if not",
        "        if not",
        _SERVERS,
    ),
    Bug(
        "figures count whose server has ended",
        "benchmarks/sglang_serving.py",
        "    server.require_alive()\n    work = ",
        "    work = ",
        _SERVERS,
    ),
    Bug(
        "ports that SGLang derives may be taken",
        "benchmarks/free_ports.py",
        "all(_is_free(port + more) for more in DERIVED)",
        "_is_free(port)",
        _SERVERS,
    ),
    Bug(
        "two servers have a port of each other",
        "benchmarks/free_ports.py",
        "20000, 250",
        "20000, 220",
        _SERVERS,
    ),
    Bug(
        "SIGINT ends a benchmark in another way",
        "benchmarks/cuts.py",
        "SIGNALS = (signal.SIGTERM, signal.SIGINT)",
        "SIGNALS = (signal.SIGTERM,)",
        _CUT,
    ),
    Bug(
        "a server that starts when a benchmark is cut is left",
        "benchmarks/engine_processes.py",
        "        with uncut():\n            made = make()\n            self._begun.callback(made.kill)\n",
        "        made = make()\n        self._begun.callback(made.kill)\n",
        _CUT,
    ),
    Bug(
        "servers are left by a benchmark that is cut while it ends them",
        "benchmarks/engine_processes.py",
        "        with uncut():\n            self._begun.close()\n",
        "        self._begun.close()\n",
        _CUT,
    ),
    Bug(
        "what came while a benchmark could not be cut is forgotten",
        "benchmarks/cuts.py",
        "            signal.raise_signal(number)\n",
        "            pass\n",
        _CUT,
    ),
    Bug(
        "SIGTERM leaves the servers that the client asks",
        "benchmarks/sglang_serving.py",
        "    raise_when_cut()\n",
        "",
        _CUT,
    ),
    Bug(
        "rows of pairs are lost where a benchmark is cut",
        "benchmarks/sglang_prefill_server.py",
        "            if rows:\n                report",
        "            if sys.exc_info()[0] is None:\n                report",
        _CUT,
    ),
    Bug(
        "SIGTERM leaves engines",
        "benchmarks/sglang_multi_gpu.py",
        "    raise_when_cut()\n",
        "",
        _CUT,
    ),
    Bug(
        "SIGTERM leaves the engines of variants",
        "benchmarks/sglang_engine.py",
        "    raise_when_cut()\n",
        "",
        _CUT,
    ),
    Bug(
        "a pair of servers gives what the prefill server says",
        "benchmarks/sglang_prefill_server.py",
        "(_, first), (found, seconds) = threads.map",
        "(found, first), (_, seconds) = threads.map",
        _SERVERS,
    ),
    Bug(
        "requests of a pair of servers meet where others met",
        "benchmarks/sglang_prefill_server.py",
        "[next(rooms) for _ in prompts]",
        "list(range(len(prompts)))",
        _SERVERS,
    ),
)

"""SGLang's prefill and decode servers, the prefill server with this library, beside one ordinary server.

    python benchmarks/sglang_prefill_server.py --json

Writes a checkpoint of four layers of Qwen3-30B-A3B's shapes with random weights and starts all servers side by side, on
GPUs that they share where there are few. KV caches go by ``--transfer-backend``, whose package has to be installed.

Servers: ``one`` an ordinary server; ``dwdp`` a prefill server of two ranks with ``--dwdp-size 2``, and a decode server;
``host`` a prefill server whose experts are in host memory, and a decode server. A prefill server is on the first GPUs,
the others are on the last. None has CUDA graphs, nor a cache of prompts that were asked before.

same tokens  as ``one`` gives, greedily, for prompts that are asked one after the other; digest: of all of them
seconds      until all prompts are answered, asked at once, each with a length of its own: the median of the repeats.
             first: until the server that prefills has answered, with one token of each
over one     ``one``'s seconds over these

SIGTERM or SIGINT ends the servers, and the rows that there are are printed.

On the CPU (``--device cpu --tiny``) it proves the script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sglang_checkpoint
import torch
from common import Row, parser, report, seen
from cuts import raise_when_cut
from engine_processes import Failed, NoneLeft
from free_ports import ports
from sglang_checkpoint import Shape
from sglang_mixes import least_prefill_seconds
from sglang_servers import Server, Tokens, environment_of, options_of, parsed

from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu

KINDS = ("one", "dwdp", "host")


class Pair(NamedTuple):
    """The servers of one kind: the one that prefills, and the one that decodes, which may be the same."""

    prefill: Server
    decode: Server
    door: int  # of the prefill server, where a decode server finds it

    def answered(
        self, prompts: Tokens, new_tokens: int, rooms: Iterator[int], limit: float
    ) -> tuple[Any, float, float]:
        """The tokens; seconds until the prefill server has answered, and the other."""
        begin = time.perf_counter()

        def one(server: Server, **more: Any) -> tuple[Tokens, float]:
            found = server.tokens(prompts, new_tokens, limit, **more)
            return found, time.perf_counter() - begin

        if self.prefill is self.decode:
            found, seconds = one(self.decode)
            return found, seconds, seconds
        met = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.door}
        met["bootstrap_room"] = [next(rooms) for _ in prompts]
        threads = ThreadPoolExecutor()
        try:
            (_, first), (found, seconds) = threads.map(lambda server: one(server, **met), (self.prefill, self.decode))
        finally:
            threads.shutdown(wait=False)  # a run that is cut does not wait for answers
        return found, first, seconds


def pairs(given: argparse.Namespace, shape: Shape, folder: Path, begun: NoneLeft) -> dict[str, Pair]:
    """Of each kind; they are starting."""
    model = folder / "model"
    model.mkdir()
    sglang_checkpoint.write(model, shape, given.device)
    places = ports()
    config = folder / "dwdp.yaml"
    config.write_text(f"group_size: 1\nhost_experts: {shape.experts}\n")
    last = max(0, given.gpus - 1)

    def start(name: str, more: str, gpu: int, ranks: int = 1, **environment: str) -> Server:
        common = f"--model-path {model} {options_of(given.device, given.attention_backend)} --base-gpu-id {gpu}"
        common += f" --disable-radix-cache --max-total-tokens {given.room} --chunked-prefill-size {given.chunk * ranks}"
        options = f"{common} --skip-tokenizer-init {more}".split()
        around = environment_of(given.device, ranks) | environment
        return begun.start(partial(Server, options, around, next(places), given.logs / f"{name}.log"))

    def pair(kind: str) -> Pair:
        if kind == "one":
            return Pair(*[start("one", "", last)] * 2, 0)
        door = next(places)
        common = f"--disaggregation-transfer-backend {given.transfer_backend} --disaggregation-mode"
        prefill = f"{common} prefill --disaggregation-bootstrap-port {door}"
        if kind == "dwdp":
            first = start("dwdp-prefill", f"{prefill} --tp-size 2 --dwdp-size 2", 0, 2)
        else:
            first = start("host-prefill", prefill, 0, VMM_DWDP_CONFIG=str(config))
        return Pair(first, start(f"{kind}-decode", f"{common} decode", last), door)

    return {kind: pair(kind) for kind in given.servers}


def measure(
    given: argparse.Namespace, shape: Shape, gpu: GpuSpec | None, found: dict[str, Pair], rows: list[Row]
) -> None:
    """Add to ``rows`` one for each kind, with the sentence of one that failed."""
    lengths = [given.prompt_tokens * (4 + number % 4) // 4 for number in range(given.prompts)]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(shape.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    rooms = itertools.count(1)
    ordinary: tuple[Tokens, float] | None = None
    starts = {kind: _started(pair, given.limit) for kind, pair in found.items()}
    for kind, pair in found.items():
        row: dict[str, Any] = {"servers": kind, "start s": None, "same tokens": None, "digest": None}
        row |= {"first s": None, "seconds": None, "over one": None, "failure": None}
        try:
            if isinstance(starts[kind], str):
                raise Failed(starts[kind])
            row["start s"] = starts[kind]
            tokens = [pair.answered([one], given.new_tokens, rooms, given.limit)[0][0] for one in prompts]
            runs = [pair.answered(prompts, given.new_tokens, rooms, given.limit) for _ in range(1 + given.repeats)][1:]
            row["first s"], row["seconds"] = (statistics.median(run[place] for run in runs) for place in (1, 2))
            if gpu is not None:
                least = least_prefill_seconds(shape, [lengths], gpu, fp8=False) / (2 if kind == "dwdp" else 1)
                if row["first s"] < least:
                    raise Failed(f"{row} cannot be: at the peaks of a {gpu.name} it takes {least:.3g} s")
            if kind == "one":
                ordinary = tokens, row["seconds"]
            row["digest"] = hashlib.sha256(str(tokens).encode()).hexdigest()[:12]
            if ordinary is not None:
                row |= {"same tokens": tokens == ordinary[0], "over one": ordinary[1] / row["seconds"]}
        except (Failed, OSError) as failed:
            row["failure"] = str(failed)
        rows.append(seen(row))


def _started(pair: Pair, limit: float) -> float | str:
    """Seconds, or why not."""
    try:
        return max(server.wait_until_ready(limit) for server in (pair.prefill, pair.decode))
    except Failed as failed:
        for server in pair[:2]:
            server.kill()  # what is left of them would take part in the others' figures
        return str(failed)


def _arguments() -> argparse.Namespace:
    result = parser(__doc__)
    result.add_argument("--servers", nargs="+", choices=KINDS, default=list(KINDS), help="in the order of the turns")
    result.add_argument("--transfer-backend", default="mooncake_tcp", help="SGLang's (default: mooncake_tcp)")
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--prompts", type=int, default=8)
    result.add_argument("--prompt-tokens", type=int, default=4096, help="of the shortest; the longest has 7/4 of it")
    result.add_argument("--new-tokens", type=int, default=16)
    result.add_argument("--repeats", type=int, default=2)
    result.add_argument("--limit", type=float, default=150, help="seconds to start, and for each answer")
    result.add_argument("--attention-backend", default="triton")
    result.add_argument("--logs", type=Path, help="where what the servers say is kept")
    result.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs")
    given = parsed(result)
    if given.gpus < 2:
        given.servers = [kind for kind in given.servers if kind != "dwdp"]  # its ranks need a GPU each
    if given.tiny:
        given.prompt_tokens = 16
    given.chunk = given.prompt_tokens * 2
    given.room = given.prompts * (2 * given.prompt_tokens + 2 * given.new_tokens + 64)
    return given


def main() -> None:
    given = _arguments()
    raise_when_cut()
    rows: list[Row] = []
    shape = sglang_checkpoint.TINY if given.tiny else Shape(given.layers, 2048, 128, 768, heads=32)
    gpu = load_gpu(preset_of(torch.cuda.get_device_name())) if given.device.type == "cuda" else None
    with tempfile.TemporaryDirectory(prefix="sglang-prefill-") as directory:
        given.logs = given.logs or Path(directory)
        given.logs.mkdir(parents=True, exist_ok=True)
        try:
            with NoneLeft() as begun:
                measure(given, shape, gpu, pairs(given, shape, Path(directory), begun), rows)
        finally:  # also of a run that is cut
            if rows:
                report(given, {"servers": rows})
    if any(row["failure"] for row in rows):
        sys.exit("some servers failed; why is above")


if __name__ == "__main__":
    main()

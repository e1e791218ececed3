"""SGLang's server with this library and without, asked by SGLang's own client, ``sglang.bench_serving``.

    python benchmarks/sglang_serving.py --json

Writes a checkpoint of four layers of Qwen3-30B-A3B's shapes with random weights and a tokenizer of as many words,
starts the servers side by side, and lets the client ask one after the other the same random prompts, once for the
kernels that are compiled and then as often as ``--repeats``. Radix caches are off; decode runs in CUDA graphs, except
with DWDP.

Servers: ``one`` an ordinary server on one GPU; ``host``, ``in_place`` and ``auto`` with all experts in host memory, in
that mode; on all GPUs ``dwdp`` with ``--dwdp-size`` and ``ep`` with expert parallelism and attention data parallel.

Figures are the client's, the median of the repeats: tokens/s of prompts and of answers while all are answered; TTFT,
until a request's first token, and TPOT, from each to the next, medians over the requests. over one: prompt tokens/s of
each GPU over those of ``one``.

On the CPU (``--device cpu --tiny``) it proves the script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sglang_checkpoint
import torch
from common import Row, parser, report, seen
from engine_processes import Failed
from sglang_checkpoint import Shape
from sglang_mixes import least_prefill_seconds
from sglang_servers import Server, environment_of, options_of, parsed
from sglang_variants import FIRST_PORT, PORTS

from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu

MODES = {"host": "staged", "in_place": "in_place", "auto": "auto"}
SPREAD = {
    "dwdp": "--tp-size {0} --dwdp-size {0}",
    "ep": "--tp-size {0} --ep-size {0} --dp-size {0} --enable-dp-attention --enable-dp-lm-head --moe-dense-tp-size 1",
}
KINDS = ("one", *MODES, *SPREAD)
FIGURES = {
    "prompt tokens/s": "input_throughput",
    "answer tokens/s": "output_throughput",
    "TTFT ms": "median_ttft_ms",
    "TPOT ms": "median_tpot_ms",
}
"""Columns, and what the client calls them."""


def write_tokenizer(folder: Path, words: int) -> None:
    """Into a checkpoint's folder: the client counts by it, and the server answers in its words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1", "pad_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@contextlib.contextmanager
def servers(given: argparse.Namespace, model: Path, folder: Path) -> Iterator[dict[str, tuple[Server, int]]]:
    """Of each kind, with its GPUs; they are starting, and none is left afterwards."""
    ports = itertools.count(FIRST_PORT, PORTS)
    begun: dict[str, tuple[Server, int]] = {}
    try:
        for kind in given.servers:
            ranks = given.gpus if kind in SPREAD else 1
            environment = environment_of(given.device, ranks)
            if kind in MODES:
                config = folder / f"{kind}.yaml"
                config.write_text(f"group_size: 1\nhost_experts: {given.shape.experts}\nmode: {MODES[kind]}\n")
                environment["VMM_DWDP_CONFIG"] = str(config)
            options = options_of(given.device, given.attention_backend, graphs=kind not in SPREAD)
            options += f" --model-path {model} --disable-radix-cache --max-total-tokens {given.room}"
            options += f" --max-running-requests {2 * given.concurrency * ranks}"
            options += f" --chunked-prefill-size {given.chunk * ranks} {SPREAD.get(kind, '').format(ranks)}"
            begun[kind] = Server(options.split(), environment, next(ports), given.logs / f"{kind}.log"), ranks
        yield begun
    finally:
        for server, _ in begun.values():
            server.kill()


def asked(server: Server, model: Path, given: argparse.Namespace, ranks: int, file: Path) -> dict[str, Any]:
    """What the client found.

    Raises:
        Failed: it failed, or has counted other work than it was to ask for.
    """
    count = given.prompts * ranks
    options = f"--backend sglang --base-url {server.address} --model {model} --tokenizer {model} --output-file {file}"
    options += (
        f" --dataset-name random-ids --tokenize-prompt --num-prompts {count} --random-range-ratio 1 --disable-tqdm"
    )
    options += f" --random-input-len {given.prompt_tokens} --random-output-len {given.new_tokens} --warmup-requests 1"
    options += f" --max-concurrency {given.concurrency * ranks} --seed 1"
    command = [sys.executable, "-W", "ignore", "-m", "sglang.bench_serving", *options.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"the client was not done after {given.limit:.0f} s") from None
    if done.returncode:
        raise Failed(f"the client failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    work = found["completed"], found["total_input_tokens"], found["total_output_tokens"]
    wanted = count, count * given.prompt_tokens, count * given.new_tokens
    if work != wanted:
        raise Failed(f"the client counted requests, prompt tokens and answer tokens {work}, not {wanted}")
    return found


def measure(
    given: argparse.Namespace, model: Path, folder: Path, gpu: GpuSpec | None, found: dict[str, tuple[Server, int]]
) -> list[Row]:
    """A row for each kind, with the sentence of one that failed."""
    rows: list[Row] = []
    ordinary: float | None = None
    starts: dict[str, float | Failed] = {}
    for kind, (server, _) in found.items():  # all have started before one is asked
        try:
            starts[kind] = server.wait_until_ready(given.limit)
        except Failed as failed:
            starts[kind] = failed
    for kind, (server, ranks) in found.items():
        row: dict[str, Any] = {"server": kind, "GPUs": ranks, "start s": None} | dict.fromkeys(FIGURES)
        row |= {"over one": None, "failure": None}
        try:
            started = starts[kind]
            if isinstance(started, Failed):
                raise started
            row["start s"] = started
            runs = [asked(server, model, given, ranks, folder / f"{kind}.jsonl") for _ in range(1 + given.repeats)][1:]
            for column, name in FIGURES.items():
                row[column] = statistics.median(run[name] for run in runs)
            rate = row["prompt tokens/s"] / ranks
            _require_possible(given, rate, gpu)
            ordinary = rate if kind == "one" else ordinary
            row["over one"] = None if ordinary is None else rate / ordinary
        except Failed as failed:
            row["failure"] = str(failed)
        rows.append(seen(row))
    return rows


def _require_possible(given: argparse.Namespace, rate: float, gpu: GpuSpec | None) -> None:
    """Raise `Failed` where a GPU seems to compute prompts faster than its peaks allow."""
    if gpu is not None:
        most = given.prompt_tokens / least_prefill_seconds(given.shape, [[given.prompt_tokens]], gpu, fp8=False)
        if rate > most:
            raise Failed(f"{rate:.0f} prompt tokens/s cannot be: at the peaks of {gpu.name} they are {most:.0f}")


def _arguments() -> argparse.Namespace:
    result = parser(__doc__)
    result.add_argument(
        "--servers", nargs="+", choices=KINDS, default=["one", *MODES], help="in the order of the turns"
    )
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--prompts", type=int, default=16, help="of each GPU")
    result.add_argument("--concurrency", type=int, default=8, help="requests of each GPU at a time")
    result.add_argument("--prompt-tokens", type=int, default=8192)
    result.add_argument("--new-tokens", type=int, default=16)
    result.add_argument("--chunk", type=int, default=32768, help="tokens that a rank takes of its prompts at a time")
    result.add_argument("--repeats", type=int, default=2)
    result.add_argument("--limit", type=float, default=150, help="seconds to start, and for each run of the client")
    result.add_argument("--attention-backend", default="triton")
    result.add_argument("--logs", type=Path, help="where what the servers say is kept")
    result.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs")
    given = parsed(result)
    if given.tiny:
        given.prompts, given.concurrency, given.prompt_tokens, given.new_tokens, given.chunk = 4, 2, 32, 4, 64
    given.shape = sglang_checkpoint.TINY if given.tiny else Shape(given.layers, 2048, 128, 768, heads=32)
    given.room = given.chunk + 2 * given.concurrency * (given.prompt_tokens + given.new_tokens + 64)
    return given


def main() -> None:
    given = _arguments()
    gpu = load_gpu(preset_of(torch.cuda.get_device_name())) if given.device.type == "cuda" else None
    os.environ["HF_HUB_OFFLINE"] = "1"  # the client would ask the hub for the tokenizer
    with tempfile.TemporaryDirectory(prefix="sglang-serving-") as directory:
        folder = Path(directory)
        given.logs = given.logs or folder
        given.logs.mkdir(parents=True, exist_ok=True)
        model = folder / "model"
        model.mkdir()
        sglang_checkpoint.write(model, given.shape, given.device)
        write_tokenizer(model, given.shape.vocabulary)
        with servers(given, model, folder) as found:
            rows = measure(given, model, folder, gpu, found)
    report(given, {"servers": rows})
    if any(row["failure"] for row in rows):
        sys.exit("some servers failed; why is above")


if __name__ == "__main__":
    main()

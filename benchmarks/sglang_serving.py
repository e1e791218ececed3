"""SGLang's server with this library and without, asked by SGLang's own client, ``sglang.bench_serving``.

    python benchmarks/sglang_serving.py --json

Writes a checkpoint of four layers of Qwen3-30B-A3B's shapes with random weights and a tokenizer of as many words,
starts the servers side by side, and lets the client, one process for all (sglang_client.py), ask one after the other
the same random prompts, once for the kernels that are compiled and then as often as ``--repeats``. Radix caches are
off; decode runs in CUDA graphs.

Servers: ``one`` an ordinary server on one GPU; ``host``, ``in_place`` and ``auto`` with all experts in host memory, in
that mode; on all GPUs ``dwdp`` with ``--dwdp-size`` and ``ep`` with expert parallelism and attention data parallel.

Figures are the client's, the median of the repeats: tokens/s of prompts and of answers while all are answered; TTFT,
until a request's first token, and TPOT, from each to the next, medians over the requests. over one: prompt tokens/s of
each GPU over those of ``one``.

SIGTERM or SIGINT ends servers and client, and the rows that there are are printed.

On the CPU (``--device cpu --tiny``) it proves the script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import sglang_checkpoint
import torch
from common import Row, parser, report, seen
from cuts import raise_when_cut
from engine_processes import Failed, NoneLeft
from free_ports import ports
from sglang_checkpoint import Shape
from sglang_client import Client
from sglang_mixes import least_prefill_seconds
from sglang_servers import Server, environment_of, options_of, parsed

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


def ranks_of(kind: str, given: argparse.Namespace) -> int:
    """Its GPUs."""
    return given.gpus if kind in SPREAD else 1


def started(kind: str, given: argparse.Namespace, model: Path, folder: Path, port: int) -> Server:
    """The server of this kind, which is starting."""
    ranks = ranks_of(kind, given)
    environment = environment_of(given.device, ranks)
    if kind in MODES:
        config = folder / f"{kind}.yaml"
        config.write_text(f"group_size: 1\nhost_experts: {given.shape.experts}\nmode: {MODES[kind]}\n")
        environment["VMM_DWDP_CONFIG"] = str(config)
    options = options_of(given.device, given.attention_backend, graphs=True)
    options += f" --model-path {model} --disable-radix-cache --max-total-tokens {given.room}"
    options += f" --max-running-requests {2 * given.concurrency * ranks}"
    options += f" --chunked-prefill-size {given.chunk * ranks} {SPREAD.get(kind, '').format(ranks)}"
    return Server(options.split(), environment, port, given.logs / f"{kind}.log")


def asked(server: Server, client: Client, model: Path, given: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """What the client found.

    Raises:
        Failed: it or the server failed, or it has counted other work than it was to ask for.
    """
    count = given.prompts * ranks
    options = f"--backend sglang --base-url {server.address} --model {model} --tokenizer {model} --disable-tqdm"
    options += f" --dataset-name random-ids --tokenize-prompt --num-prompts {count} --random-range-ratio 1"
    options += f" --random-input-len {given.prompt_tokens} --random-output-len {given.new_tokens} --warmup-requests 1"
    options += f" --max-concurrency {given.concurrency * ranks} --seed 1"
    try:
        found = client.figures(options, given.limit)
    except Failed:
        server.require_alive()  # else that is why
        raise
    server.require_alive()
    work = found["completed"], found["total_input_tokens"], found["total_output_tokens"]
    wanted = count, count * given.prompt_tokens, count * given.new_tokens
    if work != wanted:
        raise Failed(f"the client counted requests, prompt tokens and answer tokens {work}, not {wanted}")
    return found


def measure(
    given: argparse.Namespace,
    model: Path,
    gpu: GpuSpec | None,
    servers: dict[str, Server],
    client: Client,
    rows: list[Row],
) -> None:
    """Add to ``rows`` one for each kind, with the sentence of one that failed."""
    ordinary: float | None = None
    starts: dict[str, float | Failed] = {}
    for kind, server in servers.items():  # all have started before one is asked
        try:
            starts[kind] = server.wait_until_ready(given.limit)
        except Failed as failed:
            starts[kind] = failed
            server.kill()  # what is left of it would take part in the others' figures
    for kind, server in servers.items():
        ranks = ranks_of(kind, given)
        row: dict[str, Any] = {"server": kind, "GPUs": ranks, "start s": None} | dict.fromkeys(FIGURES)
        row |= {"over one": None, "failure": None}
        try:
            start = starts[kind]
            if isinstance(start, Failed):
                raise start
            row["start s"] = start
            runs = [asked(server, client, model, given, ranks) for _ in range(1 + given.repeats)][1:]
            for column, name in FIGURES.items():
                row[column] = statistics.median(run[name] for run in runs)
            rate = row["prompt tokens/s"] / ranks
            _require_possible(given, rate, gpu)
            ordinary = rate if kind == "one" else ordinary
            row["over one"] = None if ordinary is None else rate / ordinary
        except Failed as failed:
            row["failure"] = str(failed)
        rows.append(seen(row))


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
    result.add_argument("--prompts", type=int, default=32, help="of each GPU")
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
    raise_when_cut()
    gpu = load_gpu(preset_of(torch.cuda.get_device_name())) if given.device.type == "cuda" else None
    os.environ["HF_HUB_OFFLINE"] = "1"  # the client would ask the hub for the tokenizer
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sglang-serving-") as directory:
        folder = Path(directory)
        given.logs = given.logs or folder
        given.logs.mkdir(parents=True, exist_ok=True)
        model = folder / "model"
        model.mkdir()
        sglang_checkpoint.write(model, given.shape, given.device)
        write_tokenizer(model, given.shape.vocabulary)
        try:
            with NoneLeft() as begun:
                every = zip(given.servers, ports(), strict=False)
                start = partial(started, given=given, model=model, folder=folder)
                servers = {kind: begun.start(partial(start, kind, port=port)) for kind, port in every}
                client = begun.start(partial(Client, folder, given.logs, given.limit))  # ready when servers are
                measure(given, model, gpu, servers, client, rows)
        finally:  # also of a run that is cut
            if rows:
                report(given, {"servers": rows})
    if any(row["failure"] for row in rows):
        sys.exit("some servers failed; why is above")


if __name__ == "__main__":
    main()

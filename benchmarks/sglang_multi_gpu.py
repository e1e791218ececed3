"""SGLang's engine on several GPUs with this library, beside its other parallelisms, in one command.

    python benchmarks/sglang_multi_gpu.py --gpus 4 --json

Writes a checkpoint of a few layers of Qwen3-235B-A22B's shapes with random weights, starts SGLang's offline engine once
for each variant, all side by side, and asks one after another the same. Every row is also printed to stderr as soon as
it is known. A variant that fails or hangs has a row that says why.

Variants: ``dwdp`` SGLang with ``--dwdp-size`` and this library, for each plan of copies and each mode; ``ep`` expert
parallelism, attention data parallel; ``tp`` tensor parallelism; ``own`` SGLang's own DWDP; ``one`` all of the model on
every GPU. With DWDP there are CUDA graphs of decoding alone, and none of mode staged; the others have them as by
default, up to 8,192 tokens of prefill (``--graphs``). Each rank has prompts of its own, the same in all variants; with
``tp`` all have one queue.

prefill     tokens a second of each GPU until all prompts of a mix have one token, the median of the repeats; and of
            each rank until its own have. "in step" and "drifting" are the same prompts in another order: drifting,
            neighbours are a chunk apart. A chunk is the tokens that a rank takes at a time; with ``tp``, that all take
decode      milliseconds a step: 20 tokens less 4 tokens, by 16
digest      of all tokens of all prompts and 16 steps. "same tokens" is the share of them that the first variant has,
            too: where sums are rounded otherwise, as by expert parallelism or in decode graphs, a token may be another,
            and then those that follow it are
compared    tokens a second over the others'; and of each rank over those of a GPU with all of the model and the same
            prompts: of the rank for which that is least. Of decode, a step beside the others', and the time that the
            chosen experts of other ranks take over a link
engines     seconds to start, beside the others; GiB a GPU, the most that is given back at its end

Where a figure is of more work than the GPUs' peaks allow, its variant ends with a sentence and has no more rows.

SIGTERM or SIGINT ends the engines, and the rows that there are are printed.

On the CPU (``--device cpu --tiny``) it proves the script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import sglang_checkpoint
import torch
from common import Row, parser, report, seen
from cuts import raise_when_cut
from engine_processes import EngineProcess, Failed, NoneLeft
from free_ports import ports
from sglang_checkpoint import TINY, Shape
from sglang_mixes import MIXES, chosen_remote_seconds, least_decode_seconds, least_prefill_seconds, lengths
from sglang_variants import GRAPHS, Task, Variant, serve

from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu

KINDS = ("dwdp", "ep", "one", "own", "tp")
QWEN3_235B = Shape(4, 4096, 128, 1536, heads=64, positions=131072)
TINY_UNIT = 8  # tokens for 1024


class Tables:
    """What was measured; each row is printed as it comes."""

    def __init__(self, task: Task, gpu: GpuSpec | None, fp8: bool) -> None:
        self.prefill: list[dict[str, Any]] = []
        self.decode: list[dict[str, Any]] = []
        self.engines: list[Row] = []
        self._task, self._gpu, self._fp8 = task, gpu, fp8
        self._first: dict[object, list[list[int]]] = {}  # tokens of the first variant that answered, by what it was

    def add(self, variant: str, row: dict[str, Any]) -> None:
        """Raises `Failed` if the GPUs could not have done that."""
        is_decode = "mix" not in row
        if self._gpu is not None:
            least, took = self._seconds(row, self._gpu)
            if took < least:
                raise Failed(
                    f"{row} cannot be: at the peaks of {self._task.ranks} {self._gpu.name} it takes {least:.3g} s. "
                    "What was counted is not what was timed"
                )
        tokens = row.pop("tokens")
        first = self._first.setdefault((row.get("chunk"), row.get("mix"), row.get("sequences a rank")), tokens)
        row = {"variant": variant, **row, **agreement(tokens, first)}
        (self.decode if is_decode else self.prefill).append(row)
        seen(row)

    def _seconds(self, row: Mapping[str, Any], gpu: GpuSpec) -> tuple[float, float]:
        """At least, and measured."""
        task = self._task
        if "mix" in row:
            wanted = lengths(row["mix"], task.ranks, row["chunk"], task.unit)
            return least_prefill_seconds(task.shape, wanted, gpu, fp8=self._fp8), row["seconds"]
        return least_decode_seconds(task.shape, task.ranks, gpu, bits=8 if self._fp8 else 16), row["ms a step"] / 1e3

    def _remote_ms(self, sequences: int) -> float | None:
        if self._gpu is None:
            return None
        task = self._task
        return 1e3 * chosen_remote_seconds(task.shape, task.ranks, sequences, self._gpu, fp8=self._fp8)

    def all(self, about: Row) -> dict[str, list[Row]]:
        """Those that have rows."""
        found: dict[str, list[Row]] = {"run": [about], "engines": self.engines}
        found |= {"prefill": [*self.prefill], "decode": [*self.decode]}
        found |= {"compared": compared(self.prefill), "drift": drift(self.prefill)}
        found["decode compared"] = decode_compared(self.decode, self._remote_ms)
        return {name: rows for name, rows in found.items() if rows}


def agreement(tokens: list[list[int]], first: list[list[int]]) -> dict[str, float]:
    """The share of all tokens, and of the prompts' first ones, that are the same."""
    pairs = [pair for two in zip(tokens, first, strict=True) for pair in zip(*two, strict=True)]
    firsts = [(mine[0], theirs[0]) for mine, theirs in zip(tokens, first, strict=True)]
    named = {"same tokens": pairs, "same first tokens": firsts}
    return {name: sum(mine == theirs for mine, theirs in each) / len(each) for name, each in named.items()}


def compared(prefill: Iterable[Row]) -> list[Row]:
    """This library over each of the others; None for those that gave no row."""
    rows = {(row["variant"], row["chunk"], row["mix"]): row for row in prefill}
    found: list[Row] = []
    for (variant, chunk, mix), ours in rows.items():
        if not str(variant).startswith("dwdp"):
            continue
        row: dict[str, Any] = {"variant": variant, "chunk": chunk, "mix": mix}
        for kind in ("ep", "tp", "own"):
            theirs = rows.get((kind, chunk, mix))
            row[f"over {kind}"] = _rate(ours) / _rate(theirs) if theirs else None
        one = rows.get(("one", chunk, mix))
        row["each rank over one GPU, least"] = min(_of_each(ours, one)) if one else None
        row["tokens of one GPU"] = ours["digest"] == one["digest"] if one else None
        found.append(row)
    return found


def decode_compared(decode: Iterable[Row], remote_ms: Callable[[int], float | None]) -> list[Row]:
    """A step with this library beside those of the others, and beside what certainly has to come over the link."""
    rows = {(row["variant"], row["sequences a rank"]): row for row in decode}
    found: list[Row] = []
    for (variant, sequences), ours in rows.items():
        if not str(variant).startswith("dwdp"):
            continue
        row = {"variant": variant, "sequences a rank": sequences, "ms a step": ours["ms a step"]}
        for kind in ("one", "ep", "tp"):
            row[f"{kind} ms"] = rows[kind, sequences]["ms a step"] if (kind, sequences) in rows else None
        found.append(row | {"chosen remote bytes ms": remote_ms(cast(int, sequences))})
    return found


def _rate(row: Row) -> Any:
    return row["tokens/s a GPU"]


def _of_each(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[float]:
    name = "tokens/s of each rank"
    return [mine / other for mine, other in zip(ours[name], theirs[name], strict=True)]


def drift(prefill: Iterable[Row]) -> list[Row]:
    """What is left of the rate where ranks are a chunk apart."""
    rows = {(row["variant"], row["chunk"], row["mix"]): row for row in prefill}
    return [
        {"variant": variant, "chunk": chunk, "drifting / in step": _rate(row) / _rate(rows[variant, chunk, "in step"])}
        for (variant, chunk, mix), row in rows.items()
        if mix == "drifting" and (variant, chunk, "in step") in rows
    ]


def engines(
    variants: list[Variant], task: Task, folder: Path, logs: Path, begun: NoneLeft
) -> dict[Variant, EngineProcess]:
    """A process for each, which start side by side."""
    processes: dict[Variant, EngineProcess] = {}
    for variant, port in zip(variants, ports(), strict=False):
        own = folder / variant.name
        own.mkdir()
        run = partial(serve, variant=variant, port=port, task=task, folder=own)
        processes[variant] = begun.start(partial(EngineProcess, run, logs / f"{variant.name.replace(' ', '-')}.log"))
    return processes


def measure(processes: Mapping[Variant, EngineProcess], limit: float, tables: Tables) -> bool:
    """Whether all of them gave all of their rows. They are asked when all have started, and end one by one."""
    started: dict[Variant, float] = {}
    failures: dict[Variant, str] = {}
    for variant, process in processes.items():
        try:
            started[variant] = process.wait_until_ready(limit)
        except Failed as failed:
            failures[variant] = str(failed)
            process.kill()
    for variant, process in processes.items():
        if variant in started:
            try:
                for row in process.rows(limit):
                    tables.add(variant.name, row)
            except Failed as failed:
                failures[variant] = str(failed)
        given_back = None if variant in failures else _ended(process)
        process.kill()
        row = {"variant": variant.name, "start s": started.get(variant), "GiB a GPU": given_back}
        tables.engines.append(seen(row | {"failure": failures.get(variant)}))
    return not failures


def _ended(process: EngineProcess) -> float | None:
    """GiB that its end gives back, on the GPU with most."""

    def free() -> list[int]:
        return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]

    before = free()
    process.end()
    return max(((now - was) / 2**30 for was, now in zip(before, free(), strict=True)), default=None)


def checkpoint(folder: Path, shape: Shape, device: torch.device, *, weights: str) -> None:
    """In ``folder``, written unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    if not config.exists():
        sglang_checkpoint.write(folder, shape, device, weights=weights)
    elif json.loads(config.read_text()) != sglang_checkpoint.config(shape, weights=weights):
        raise SystemExit(f"{folder} has another checkpoint than the one asked for")


def _arguments() -> tuple[argparse.Namespace, list[Variant]]:
    result = parser(__doc__)
    result.add_argument("--gpus", type=int, default=0, help="ranks (default: the GPUs of this machine)")
    result.add_argument("--variants", nargs="+", choices=KINDS, default=list(KINDS), help="in the order of the turns")
    result.add_argument("--dwdp-plans", nargs="+", choices=("auto", "streams"), default=["auto"], help="slice_bytes")
    result.add_argument("--dwdp-modes", nargs="+", choices=("staged", "in_place", "auto"), default=["staged"])
    result.add_argument("--graphs", choices=GRAPHS, default="default", help="of the variants without DWDP")
    result.add_argument("--weights", choices=("fp8", "bf16"), default="fp8", help="fp8: in blocks of 128 (default)")
    result.add_argument("--layers", type=int, default=QWEN3_235B.layers)
    result.add_argument("--chunks", nargs="+", type=int, default=[8192, 32768], help="tokens of each rank")
    result.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    result.add_argument("--repeats", type=int, default=2)
    result.add_argument("--limit", type=float, default=150, help="seconds for a variant to start, and to be measured")
    result.add_argument("--model-folder", type=Path, help="where the checkpoint is, or is put and kept")
    result.add_argument("--logs", type=Path, help="where what the engines say is kept")
    result.add_argument("--attention-backend", default="triton", help="SGLang's (default: triton)")
    result.add_argument("--preset", help="GPU whose peaks bound the figures (default: by the GPU's name)")
    result.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs, in bf16")
    given = result.parse_args()
    if importlib.util.find_spec("sglang") is None:
        result.error("SGLang is not installed here: pip install '.[sglang]'")
    if given.device.type != "cuda" and not given.tiny:
        result.error("these sizes need GPUs; --tiny shows without one that everything runs")
    given.gpus = given.gpus or max(2, torch.cuda.device_count())
    if given.device.type == "cuda" and given.gpus > torch.cuda.device_count():
        result.error(f"there are {torch.cuda.device_count()} GPUs here, not {given.gpus}")
    variants = [
        Variant(kind, plan, mode)
        for kind in given.variants
        for plan in (given.dwdp_plans if kind == "dwdp" else [""])
        for mode in (given.dwdp_modes if kind == "dwdp" else [""])
    ]
    return given, variants


def main() -> None:
    given, variants = _arguments()
    raise_when_cut()
    fp8 = given.weights == "fp8" and not given.tiny
    shape = TINY if given.tiny else QWEN3_235B._replace(layers=given.layers)
    unit = TINY_UNIT if given.tiny else 1024
    gpu = load_gpu(given.preset or preset_of(torch.cuda.get_device_name())) if given.device.type == "cuda" else None
    with tempfile.TemporaryDirectory(prefix="sglang-multi-gpu-") as directory:
        folder = Path(directory)
        model, logs = given.model_folder or folder / "model", given.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        checkpoint(model, shape, given.device, weights="fp8" if fp8 else "bf16")
        about = {
            "sglang": importlib.metadata.version("sglang"),
            "ranks": given.gpus,
            "weights": "fp8" if fp8 else "bf16",
            **shape._asdict(),
            "attention backend": given.attention_backend,
            "graphs": given.graphs,
            "repeats": given.repeats,
            "checkpoint s": time.perf_counter() - begin,
        }
        chunks = tuple(chunk * unit // 1024 for chunk in given.chunks)
        task = Task(
            model,
            shape,
            given.gpus,
            given.device.type,
            chunks,
            tuple(given.mixes),
            unit,
            given.repeats,
            given.attention_backend,
            given.graphs,
        )
        tables = Tables(task, gpu, fp8)
        try:
            with NoneLeft() as begun:
                complete = measure(engines(variants, task, folder, logs, begun), given.limit, tables)
        finally:  # also of a run that is cut
            report(given, tables.all(seen(about)))
    if not complete:
        sys.exit("some engines failed; why is above")


if __name__ == "__main__":
    main()

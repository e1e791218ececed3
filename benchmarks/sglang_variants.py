"""The engines of sglang_multi_gpu.py: what each is started with, and what it is asked, in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sglang_chunks
import sglang_plugins
from sglang_checkpoint import Shape
from sglang_mixes import MIXES, Lengths, Prompts, lengths, prompts, tokens_at_once

STEPS = 16  # of decode
IDLE_SECONDS = 0.2  # longer than a decode step: SGLang's scheduler has begun one more than the last answer needed
SEQUENCES = (1, 4, 16)  # a rank, of decode
GRAPHS: dict[str, dict[str, Any]] = {
    "default": {"cuda_graph_max_bs_prefill": 8192},  # as without a larger chunk; else to capture them takes a minute
    "decode": {"disable_prefill_cuda_graph": True},
    "off": {"disable_prefill_cuda_graph": True, "disable_decode_cuda_graph": True},
}
Answers = list[list[tuple[float, list[int]]]]  # of each rank's prompts: seconds until all is there, and its tokens


class Task(NamedTuple):
    """What every engine is asked.

    Attributes:
        chunks: tokens that a rank's scheduler takes of its prompts at a time. ``unit``: how many tokens K stands for.
        repeats: of each mix, besides the first time, which also decodes and whose kernels are compiled.
        graphs: of engines without DWDP, a key of `GRAPHS`.
    """

    model: Path
    shape: Shape
    ranks: int
    device_type: str
    chunks: tuple[int, ...]
    mixes: tuple[str, ...] = MIXES
    unit: int = 1024
    repeats: int = 2
    attention_backend: str = "triton"
    graphs: str = "default"


class Variant(NamedTuple):
    """An engine. ``plan`` and ``mode`` are `DWDPConfig`'s ``slice_bytes`` and ``mode``, of this library alone."""

    kind: str
    plan: str = ""
    mode: str = ""

    @property
    def name(self) -> str:
        return " ".join(word for word in self if word)

    @property
    def has_queues(self) -> bool:
        """Whether each rank has prompts of its own."""
        return self.kind != "tp"


def parallelism(kind: str, ranks: int) -> dict[str, Any]:
    """SGLang's arguments for it."""
    if kind in ("dwdp", "own"):
        return {"tp_size": ranks, "dwdp_size": ranks}
    if kind == "ep":
        data_parallel = {"dp_size": ranks, "enable_dp_attention": True, "enable_dp_lm_head": True}
        return {"tp_size": ranks, "ep_size": ranks, "moe_dense_tp_size": 1, **data_parallel}
    if kind == "tp":  # SGLang would compile FlashInfer's fused all-reduce when it starts, for which it needs nvcc
        return {"tp_size": ranks, "enforce_disable_flashinfer_allreduce_fusion": True}
    return {"dp_size": ranks}  # "one": every GPU has all of the model, and its own prompts


def set_environment(variant: Variant, task: Task, folder: Path) -> None:
    """Before SGLang is imported."""
    for name in ("VMM_DWDP_CONFIG", "VMM_DWDP_DISABLE"):
        os.environ.pop(name, None)
    if variant.kind == "dwdp":
        config = folder / "dwdp.yaml"
        config.write_text(f"group_size: {task.ranks}\nslice_bytes: {variant.plan}\nmode: {variant.mode}\n")
        os.environ["VMM_DWDP_CONFIG"] = str(config)
    else:
        os.environ["VMM_DWDP_DISABLE"] = "1"
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
    os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"  # other engines take memory meanwhile
    if task.device_type == "cpu":
        cores = [str(rank % 2) for rank in range(1 if variant.kind == "one" else task.ranks)]
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
        os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # a CUDA build of torch brings it, and SGLang uses it on the CPU too


def start(variant: Variant, port: int, task: Task, folder: Path) -> Any:
    """SGLang's engine; ``port`` is of ``free_ports.ports``. ``folder`` is its own, for what it reads."""
    set_environment(variant, task, folder)
    sglang_plugins.add(folder, "sglang_chunks")
    from sglang.srt.entrypoints.engine import Engine

    chunk = max(task.chunks)
    has_dwdp = variant.kind in ("dwdp", "own")
    divides = has_dwdp or variant.kind == "ep"  # SGLang shares the chunk out to the ranks
    every = [lengths(mix, task.ranks, each, task.unit) for mix in task.mixes for each in task.chunks]
    every.append(decode_lengths(task, max(SEQUENCES)))
    room = tokens_at_once(every, 2 * STEPS) + chunk
    if task.device_type == "cpu":
        device = {"dtype": "float32", "attention_backend": "torch_native", "disable_overlap_schedule": True}
        device |= GRAPHS["off"]
    else:  # with DWDP the mode decides
        device = {"attention_backend": task.attention_backend, **({} if has_dwdp else GRAPHS[task.graphs])}
    return Engine(
        model_path=str(task.model),
        device=task.device_type,
        skip_tokenizer_init=True,
        sampling_backend="pytorch",
        moe_runner_backend="triton",
        grammar_backend="none",
        disable_radix_cache=True,
        mem_fraction_static=0.85,
        max_running_requests=2 * max(SEQUENCES) * task.ranks,
        max_total_tokens=room * (1 if variant.has_queues else task.ranks),
        max_prefill_tokens=chunk,
        chunked_prefill_size=chunk * (task.ranks if divides else 1),
        log_level="info",
        random_seed=0,
        port=port,
        **parallelism(variant.kind, task.ranks),
        **device,
    )


def serve(
    wait_for_turn: Callable[[], None], *, variant: Variant, port: int, task: Task, folder: Path
) -> Generator[dict[str, Any]]:
    """The process of one engine, for `EngineProcess`."""
    engine = start(variant, port, task, folder)
    try:
        wait_for_turn()
        yield from measured(engine, variant, task)
    finally:
        engine.shutdown()


def decode_lengths(task: Task, sequences: int) -> Lengths:
    return [[task.unit // 8] * sequences] * task.ranks


def measured(engine: Any, variant: Variant, task: Task) -> Iterator[dict[str, Any]]:
    """A row for each chunk and mix, and for each number of sequences that decode, with all of their tokens."""
    for chunk in task.chunks:
        sglang_chunks.change(engine, chunk)
        for mix in task.mixes:
            wanted = lengths(mix, task.ranks, chunk, task.unit)
            given = prompts(mix, wanted, task.shape.vocabulary)
            first = answered(engine, given, 1 + STEPS, variant)
            again = settled(partial(answered, engine, given, 1, variant), task.repeats)
            yield {"chunk": chunk, "mix": mix, **prefill_figures(wanted, again, variant), **of_tokens(first)}
    for sequences in SEQUENCES:
        wanted = decode_lengths(task, sequences)
        given = prompts(f"decode {sequences}", wanted, task.shape.vocabulary)
        first = answered(engine, given, 1 + STEPS, variant)
        steps = [
            (last(answered(engine, given, 4 + STEPS, variant)) - last(answered(engine, given, 4, variant))) / STEPS
            for _ in range(task.repeats)
        ]
        yield {"sequences a rank": sequences, "ms a step": statistics.median(steps) * 1e3, **of_tokens(first)}


def settled(ask: Callable[[], Answers], repeats: int) -> list[Answers]:
    """The last ``repeats`` times of asking: again, and three times as often at most, while they differ by over a tenth.

    How requests come together differs from time to time, and kernels of shapes that come so are compiled then.
    """
    runs = [ask() for _ in range(repeats)]
    while len(runs) < 3 * repeats and max(map(last, runs[-repeats:])) > 1.1 * min(map(last, runs[-repeats:])):
        runs.append(ask())
    return runs[-repeats:]


def answered(engine: Any, given: Prompts, new_tokens: int, variant: Variant) -> Answers:
    """All prompts are given at once; each is a request of its own, to its rank if ranks have queues.

    The clock of all of them begins before the first is given.

    Raises:
        RuntimeError: an answer is of other work than was asked for, which the clock would not cover.
    """
    parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}

    async def one(rank: int, prompt: list[int]) -> tuple[float, list[int]]:
        place = {"routed_dp_rank": rank} if variant.has_queues else {}
        answer = await engine.async_generate(input_ids=prompt, sampling_params=parameters, **place)
        seconds, about, found = time.perf_counter() - begin, answer["meta_info"], answer["output_ids"]
        work = about["prompt_tokens"] - about["cached_tokens"], len(found)
        if work != (len(prompt), new_tokens):
            raise RuntimeError(f"{work} tokens were computed and answered, not {(len(prompt), new_tokens)}")
        return seconds, found

    async def every() -> list[tuple[float, list[int]]]:
        in_turns = sorted(places, key=lambda place: place[::-1])  # the first prompt of each rank, the second of each
        found = await asyncio.gather(*(one(rank, given[rank][number]) for rank, number in in_turns))
        by_place = dict(zip(in_turns, found, strict=True))
        return [by_place[place] for place in places]

    places = [(rank, number) for rank, of_rank in enumerate(given) for number in range(len(of_rank))]
    time.sleep(IDLE_SECONDS)
    begin = time.perf_counter()
    found = iter(engine.loop.run_until_complete(every()))
    return [[next(found) for _ in of_rank] for of_rank in given]


def last(answers: Answers) -> float:
    """Seconds until all is answered."""
    return max(seconds for of_rank in answers for seconds, _ in of_rank)


def prefill_figures(wanted: Lengths, runs: list[Answers], variant: Variant) -> dict[str, Any]:
    """Of answers of one token each, the medians of ``runs``; of each rank only where it has prompts of its own."""
    whole = statistics.median(map(last, runs))
    firsts = sorted(seconds for answers in runs for of_rank in answers for seconds, _ in of_rank)
    of_ranks = [statistics.median(last([answers[rank]]) for answers in runs) for rank in range(len(wanted))]
    rates = [round(sum(mine) / took) for mine, took in zip(wanted, of_ranks, strict=True)]
    return {
        "tokens/s a GPU": sum(map(sum, wanted)) / whole / len(wanted),
        "seconds": whole,
        "slowest / fastest run": max(map(last, runs)) / min(map(last, runs)),
        "first token s, median": statistics.median(firsts),
        "first token s, last": firsts[-1],
        "tokens/s of each rank": rates if variant.has_queues else None,
    }


def of_tokens(answers: Answers) -> dict[str, Any]:
    """All tokens, and the beginning of their SHA-256."""
    tokens = [found for of_rank in answers for _, found in of_rank]
    return {"digest": hashlib.sha256(str(tokens).encode()).hexdigest()[:12], "tokens": tokens}

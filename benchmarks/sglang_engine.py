"""SGLang's own offline engine with its experts in host memory, beside the same engine without this library.

Writes a Qwen3-MoE checkpoint with random weights, or with ``--weights mxfp4`` a gpt-oss (or, with ``--load-format
dummy``, fills the weights in each engine: sglang_dummy_weights.py), and starts one engine per variant, each of ``--tp``
ranks. They start side by side, in processes of their own; once all are ready, one after the other answers the same
prompts, greedily. Needs sglang and a GPU. The plugin is found by SGLang through the installed package's entry point.

Variants: ``gpu`` all experts in GPU memory, without this library; ``offload`` SGLang's own CPU offloading; ``host`` all
experts in host memory, copied ahead; ``half`` half of them; ``in_place`` all in host memory, read in place; ``bank``
the same with a bank for a quarter of the experts; ``auto`` copied ahead or read in place, by the number of tokens. With
``-graph`` at the end, decode runs in CUDA graphs. Routing is that of random weights: what hits in a bank is not what
hits with a model that learned.

prefill      tokens per second, all prompts in one batch, for each length of a prompt: the median of three, or of fewer
             if they are slow
decode       milliseconds a step, of one token for every prompt of the first length
same tokens  as the first variant that, like this one, decodes in graphs or does not: there SGLang splits its attention
             otherwise, so sums are rounded otherwise
digest       of all tokens, to compare with another run
GPU GiB      in use on the whole GPU, by all engines

An engine whose GPUs seem to multiply or to read weights faster than they can has no row. SIGTERM or SIGINT ends the
engines, and the rows that there are are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sglang_checkpoint
import sglang_gpt_oss
import sglang_plugins
import torch
from common import Row, parser, report, seen
from cuts import raise_when_cut
from engine_processes import EngineProcess, Failed, NoneLeft
from sglang_checkpoint import Shape
from sglang_mixes import least_decode_seconds, least_product_seconds

from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import GpuSpec, load_gpu

Tokens = list[list[int]]
CONFIGS = {
    "host": (1, "staged"),
    "half": (2, "staged"),
    "in_place": (1, "in_place"),
    "bank": (1, "in_place"),
    "auto": (1, "auto"),
}
"""What of all experts is in host memory, one part in so many, and the mode."""
KINDS = ["gpu", "offload", *CONFIGS]
RUNNERS = {"bf16": "triton", "fp8": "triton", "awq": "auto", "wna16": "auto", "mxfp4": "triton_kernel"}
"""The MoE runner of each kind of weights: of integers SGLang takes marlin, in its schemes."""
BITS = {"bf16": 16, "fp8": 8, "awq": 4, "wna16": 4, "mxfp4": 4}
"""Of an expert's numbers, without their scales."""
PREFILLS, PREFILL_SECONDS = 3, 2.0  # at most
IDLE_SECONDS = 0.5  # longer than a decode step


def main() -> None:
    arguments = _arguments()
    raise_when_cut()
    gpu = load_gpu(preset_of(torch.cuda.get_device_name())) if arguments.device.type == "cuda" else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="qwen3-moe-") as directory:
        folder = Path(directory)
        arguments.logs = arguments.logs or folder
        arguments.logs.mkdir(parents=True, exist_ok=True)
        _write_model(folder, arguments)
        try:
            with NoneLeft() as begun:
                engines = _engines(folder, arguments, begun)
                _measure_all(engines, arguments, gpu, rows)
                for engine in engines.values():
                    engine.end()
        finally:  # also of a run that is cut
            if rows:
                report(arguments, {"variants": rows})
    if len(rows) < len(arguments.variants):
        sys.exit("some engines failed; why is above")


def _arguments() -> argparse.Namespace:
    result = parser(__doc__)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--experts", type=int, default=64)
    result.add_argument("--hidden", type=int, default=2048)
    result.add_argument("--intermediate", type=int, default=768, help="of one expert")
    result.add_argument("--weights", choices=RUNNERS, default="bf16")
    result.add_argument("--tp", type=int, default=1, help="GPUs of each engine, over which every expert is cut")
    result.add_argument("--kv-cache-dtype", default="auto", help="SGLang's, such as fp8_e4m3")
    result.add_argument("--load-format", choices=["safetensors", "dummy"], default="safetensors")
    result.add_argument("--prompts", type=int, default=4)
    result.add_argument("--prompt-tokens", type=int, nargs="+", default=[512])
    result.add_argument("--new-tokens", type=int, default=16)
    names = [kind + graph for kind in KINDS for graph in ("", "-graph")]
    result.add_argument("--variants", nargs="+", choices=names, default=["gpu", "host", "half", "offload"])
    result.add_argument("--limit", type=float, default=900, help="seconds to start, and for each engine's answers")
    result.add_argument("--logs", type=Path, help="where what the engines say is kept")
    arguments = result.parse_args()
    if arguments.weights == "mxfp4" and arguments.load_format == "dummy":
        result.error("the made-up weights are of floating point; --load-format dummy is not for --weights mxfp4")
    if importlib.util.find_spec("sglang") is None:
        result.error("SGLang is not installed here: pip install '.[sglang]'")
    return arguments


def _write_model(folder: Path, arguments: argparse.Namespace) -> None:
    if arguments.weights == "mxfp4":
        sglang_gpt_oss.write(folder, _shape(arguments), arguments.device)
    elif arguments.load_format == "safetensors":
        sglang_checkpoint.write(folder, _shape(arguments), arguments.device, weights=arguments.weights)
    else:
        sglang_checkpoint.write_config(folder, _shape(arguments), weights=arguments.weights)


def _shape(arguments: argparse.Namespace) -> Shape:
    sizes = Shape(arguments.layers, arguments.hidden, arguments.experts, arguments.intermediate)
    if arguments.weights != "mxfp4":
        return sizes
    return sglang_gpt_oss.GPT_OSS_120B._replace(**dict(zip(Shape._fields[:4], sizes, strict=False)))


def _engines(folder: Path, arguments: argparse.Namespace, begun: NoneLeft) -> dict[str, EngineProcess]:
    """The engines of all variants, which start side by side."""
    serve = partial(_engine, folder=folder, arguments=arguments)
    return {
        variant: begun.start(partial(EngineProcess, partial(serve, variant=variant), arguments.logs / f"{variant}.log"))
        for variant in arguments.variants
    }


def _measure_all(
    engines: Mapping[str, EngineProcess], arguments: argparse.Namespace, gpu: GpuSpec | None, rows: list[Row]
) -> None:
    """Add to ``rows`` one for every variant whose engine did not fail."""
    first: dict[bool, Tokens] = {}  # tokens, by whether decode runs in graphs
    ready: list[str] = []
    for variant, engine in engines.items():
        with _told(variant):
            engine.wait_until_ready(arguments.limit)
            ready.append(variant)
    for variant in ready:
        with _told(variant):
            [found] = engines[variant].rows(arguments.limit)
            if gpu is not None:
                _require_possible(found, arguments, gpu)
            tokens = found.pop("tokens")
            same = tokens == first.setdefault(variant.endswith("-graph"), tokens)
            digest = hashlib.sha256(str(tokens).encode()).hexdigest()[:12]
            rows.append(seen({"variant": variant, **found, "same tokens": same, "digest": digest}))


def _require_possible(found: Mapping[str, Any], arguments: argparse.Namespace, gpu: GpuSpec) -> None:
    """Raise `Failed` where GPUs seem to be faster than their peaks."""
    shape, fp8 = _shape(arguments), arguments.weights == "fp8"
    for length in arguments.prompt_tokens:
        tokens = arguments.prompts * length
        most = arguments.tp * tokens / least_product_seconds(shape, tokens, gpu, fp8=fp8)
        if found[f"prefill of {length}: tokens/s"] > most:
            raise Failed(f"{found} cannot be: at the peak of {gpu.name} they are {most:.0f} tokens/s")
    least = least_decode_seconds(shape, arguments.tp, gpu, bits=BITS[arguments.weights]) * 1e3
    if found.get("decode ms/step", least) < least:
        raise Failed(f"{found} cannot be: at the rate of the memory of {gpu.name} a step takes {least:.3g} ms")


@contextlib.contextmanager
def _told(variant: str) -> Iterator[None]:
    """What an engine fails of is printed, and does not keep the others."""
    try:
        yield
    except Failed as failed:
        print(f"the engine of {variant} failed: {failed}", file=sys.stderr, flush=True)


def _engine(
    wait_for_turn: Callable[[], object], *, folder: Path, variant: str, arguments: argparse.Namespace
) -> Generator[dict[str, Any]]:
    """The process of one engine, for `EngineProcess`: the seconds that it took to start, its figures and tokens."""
    kind, _, graph = variant.partition("-")
    _set_environment(folder, variant, kind, arguments)
    if arguments.load_format == "dummy":
        sglang_plugins.add(folder / variant, "sglang_dummy_weights")
    from sglang import Engine

    all_tokens = arguments.prompts * max(arguments.prompt_tokens)
    started = time.perf_counter()
    engine = Engine(
        model_path=str(folder),
        load_format="auto" if arguments.load_format == "safetensors" else "dummy",
        device=arguments.device.type,
        skip_tokenizer_init=True,
        attention_backend="triton" if arguments.device.type == "cuda" else "torch_native",
        sampling_backend="pytorch",
        moe_runner_backend=RUNNERS[arguments.weights],
        tp_size=arguments.tp,
        kv_cache_dtype=arguments.kv_cache_dtype,
        enforce_disable_flashinfer_allreduce_fusion=True,  # of several ranks SGLang would compile it at start
        grammar_backend="none",
        disable_radix_cache=True,
        mem_fraction_static=0.9,
        max_running_requests=arguments.prompts,
        max_total_tokens=all_tokens + arguments.prompts * (arguments.new_tokens + 64),
        max_prefill_tokens=all_tokens,
        chunked_prefill_size=all_tokens,
        cuda_graph_bs_decode=[arguments.prompts],
        disable_prefill_cuda_graph=True,
        disable_decode_cuda_graph=not graph,
        cpu_offload_gb=200 if kind == "offload" else 0,
        log_level="info",
        random_seed=0,
    )
    try:
        took = round(time.perf_counter() - started, 1)
        wait_for_turn()
        figures, tokens = _measure(engine, arguments)
        yield {"start s": took, **figures, "tokens": tokens}
    finally:
        engine.shutdown()


def _set_environment(folder: Path, variant: str, kind: str, arguments: argparse.Namespace) -> None:
    os.environ.pop("VMM_DWDP_CONFIG", None)
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
    os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"  # other engines take memory meanwhile
    if kind in CONFIGS:
        part, mode = CONFIGS[kind]
        config = folder / f"{variant}.yaml"
        stated = f"group_size: 1\nhost_experts: {arguments.experts // part}\nmode: {mode}\n"
        if kind == "bank":
            all_experts = arguments.layers * arguments.experts * 3 * arguments.hidden * arguments.intermediate * 2
            stated += f"expert_bank: {all_experts // 4}\n"
        config.write_text(stated)
        os.environ["VMM_DWDP_CONFIG"] = str(config)


def _measure(engine: Any, arguments: argparse.Namespace) -> tuple[dict[str, float], Tokens]:
    def answer(length: int, new_tokens: int) -> tuple[float, Tokens]:
        """Seconds, and what follows the prompts of that length."""
        shape = (arguments.prompts, length)
        prompts = torch.randint(0, 32000, shape, generator=torch.Generator().manual_seed(1)).tolist()
        parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        time.sleep(IDLE_SECONDS)  # SGLang's scheduler has begun a step more than the last answer needed
        begin = time.perf_counter()
        answers = engine.generate(input_ids=prompts, sampling_params=parameters)
        return time.perf_counter() - begin, [each["output_ids"] for each in answers]

    figures: dict[str, float] = {}
    tokens: Tokens = []
    for length in arguments.prompt_tokens:
        new_tokens = arguments.new_tokens if length == arguments.prompt_tokens[0] else 1
        answer(length, new_tokens)  # compiles kernels
        prefills: list[float] = []
        while len(prefills) < PREFILLS and sum(prefills) < PREFILL_SECONDS:
            took, found = answer(length, 1)
            prefills.append(took)
        prefill = statistics.median(prefills)
        figures[f"prefill of {length}: tokens/s"] = round(arguments.prompts * length / prefill)
        if new_tokens > 1:
            took, found = answer(length, new_tokens)
            figures["decode ms/step"] = round((took - prefill) / (new_tokens - 1) * 1e3, 2)
        tokens += found
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        figures["GPU GiB"] = round((total - free) / 2**30, 1)
    return figures, tokens


if __name__ == "__main__":
    main()

"""SGLang's own offline engine with its experts in host memory, beside the same engine without this library.

Writes a Qwen3-MoE checkpoint with random weights (or, with ``--load-format dummy``, fills the weights in each engine:
sglang_dummy_weights.py) and starts one engine per variant. They start side by side, in processes of their own; once all
are ready, one after the other answers the same prompts, greedily. Needs sglang and a GPU. The plugin is found by SGLang
through the installed package's entry point.

Variants: ``gpu`` all experts in GPU memory, without this library; ``offload`` SGLang's own CPU offloading; ``host`` all
experts in host memory, copied ahead; ``half`` half of them; ``in_place`` all in host memory, read in place; ``auto``
either, by the number of tokens. With ``-graph`` at the end, decode runs in CUDA graphs.

prefill      tokens per second, all prompts in one batch, for each length of a prompt: the median of three, or of fewer
             if they are slow
decode       milliseconds a step, of one token for every prompt of the first length
same tokens  as the first variant that, like this one, decodes in graphs or does not: there SGLang splits its attention
             otherwise, so sums are rounded otherwise
digest       of all tokens, to compare with another run
GPU GiB      in use on the whole GPU, by all engines
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import Row, parser, report, seen

Tokens = list[list[int]]
CONFIGS = {"host": (1, "staged"), "half": (2, "staged"), "in_place": (1, "in_place"), "auto": (1, "auto")}
"""What of all experts is in host memory, one part in so many, and the mode."""
KINDS = ["gpu", "offload", *CONFIGS]
PREFILLS, PREFILL_SECONDS = 3, 2.0  # at most
IDLE_SECONDS = 0.5  # longer than a decode step


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="qwen3-moe-") as directory:
        folder = Path(directory)
        _write_model(folder, arguments)
        with _engines(folder, arguments) as engines:
            rows = _measure_all(engines)
            if rows:
                report(arguments, {"variants": rows})
    if len(rows) < len(arguments.variants):
        sys.exit("some engines failed; what they said is above")


def _arguments() -> argparse.Namespace:
    result = parser(__doc__)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--experts", type=int, default=64)
    result.add_argument("--hidden", type=int, default=2048)
    result.add_argument("--intermediate", type=int, default=768, help="of one expert")
    result.add_argument("--load-format", choices=["safetensors", "dummy"], default="safetensors")
    result.add_argument("--prompts", type=int, default=4)
    result.add_argument("--prompt-tokens", type=int, nargs="+", default=[512])
    result.add_argument("--new-tokens", type=int, default=16)
    names = [kind + graph for kind in KINDS for graph in ("", "-graph")]
    result.add_argument("--variants", nargs="+", choices=names, default=["gpu", "host", "half", "offload"])
    arguments = result.parse_args()
    if importlib.util.find_spec("sglang") is None:
        result.error("SGLang is not installed here: pip install '.[sglang]'")
    return arguments


def _write_model(folder: Path, arguments: argparse.Namespace) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden,
        "moe_intermediate_size": arguments.intermediate,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": arguments.layers,
        "num_experts": arguments.experts,
        "num_experts_per_tok": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if arguments.load_format == "safetensors":
        from safetensors.torch import save_file

        torch.manual_seed(0)
        for number, tensors in enumerate(_checkpoint(config, arguments.device)):
            save_file(tensors, folder / f"model-{number:05d}.safetensors")


def _checkpoint(config: dict[str, Any], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Random weights at a scale at which every layer matters, a file per layer."""
    hidden, heads, kv_heads, dim = config["hidden_size"], 16, 4, 128

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return matrices(1, rows, columns)[0]

    def matrices(count: int, rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(count, rows, columns, device=device) / columns**0.5).to(torch.bfloat16).cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    yield {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * 30,
        "lm_head.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * dim),
            f"{prefix}.self_attn.q_norm.weight": ones(dim),
            f"{prefix}.self_attn.k_norm.weight": ones(dim),
            f"{prefix}.mlp.gate.weight": matrix(config["num_experts"], hidden),
        }
        inner = config["moe_intermediate_size"]
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            for expert, weight in enumerate(matrices(config["num_experts"], *shape)):
                tensors[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = weight
        yield tensors


@contextmanager
def _engines(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """The engines of all variants, which start side by side; what follows talks to them through these pipes."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for variant in arguments.variants:
        pipes[variant], theirs = context.Pipe()
        process = context.Process(target=_engine, args=(theirs, folder, variant, arguments), name=variant)
        process.start()
        theirs.close()  # so that the end of an engine that dies is seen
        processes.append(process)
    yield pipes
    for pipe in pipes.values():
        pipe.close()  # at which the engine is shut down
    for process in processes:
        process.join()


def _measure_all(engines: Mapping[str, Connection]) -> list[Row]:
    """A row for every variant whose engine did not fail."""
    rows: list[Row] = []
    first: dict[bool, Tokens] = {}  # tokens, by whether decode runs in graphs
    ready = {variant: _answer(pipe, variant) for variant, pipe in engines.items()}
    for variant, started in ready.items():
        if started is None:
            continue
        engines[variant].send("measure")
        answer = _answer(engines[variant], variant)
        if answer is None:
            continue
        figures, tokens = answer
        same = tokens == first.setdefault(variant.endswith("-graph"), tokens)
        digest = hashlib.sha256(str(tokens).encode()).hexdigest()[:12]
        rows.append(seen({"variant": variant, "start s": started, **figures, "same tokens": same, "digest": digest}))
    return rows


def _answer(pipe: Connection, variant: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        print(f"the engine of {variant} died", file=sys.stderr, flush=True)
        return None


def _engine(pipe: Connection, folder: Path, variant: str, arguments: argparse.Namespace) -> None:
    """The process of one engine: sends the seconds that it took to start, and on request its figures and tokens."""
    kind, _, graph = variant.partition("-")
    _set_environment(folder, variant, kind, arguments.experts)
    if arguments.load_format == "dummy":
        _add_plugin(folder / variant)
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
        moe_runner_backend="triton",
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
        pipe.send(round(time.perf_counter() - started, 1))
        pipe.recv()
        pipe.send(_measure(engine, arguments))
        pipe.recv()
    except EOFError:
        pass  # the benchmark is done
    finally:
        engine.shutdown()


def _set_environment(folder: Path, variant: str, kind: str, num_experts: int) -> None:
    os.environ.pop("VMM_DWDP_CONFIG", None)
    if kind in CONFIGS:
        part, mode = CONFIGS[kind]
        config = folder / f"{variant}.yaml"
        config.write_text(f"group_size: 1\nhost_experts: {num_experts // part}\nmode: {mode}\n")
        os.environ["VMM_DWDP_CONFIG"] = str(config)


def _add_plugin(folder: Path) -> None:
    """Let SGLang find sglang_dummy_weights.py, here and in the processes that it starts, as an installed plugin."""
    about = folder / "sglang_dummy_weights-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-dummy-weights\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\ndummy = sglang_dummy_weights:register\n")
    sys.path.append(str(folder))


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

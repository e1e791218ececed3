"""SGLang's own offline engine with its experts in host memory, beside the same engine without this library.

Writes a Qwen3-MoE checkpoint with random weights (or takes ``--load-format dummy``), starts one engine per variant, one
after the other, and compares the tokens that each generates for the same prompts: prefill and decode, greedy.
Needs sglang and a GPU. The plugin is found by SGLang through the installed package's entry point.

Variants: ``gpu`` all experts in GPU memory, without this library; ``offload`` SGLang's own CPU offloading; ``host`` all
experts in host memory, copied ahead; ``half`` half of them; ``in_place`` all in host memory, read in place. With
``-graph`` at the end, decode runs in CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import parser, report


def main() -> None:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="qwen3-moe-", dir="/dev/shm"))
    _write_model(folder, arguments)
    rows, tokens = [], {}
    for variant in arguments.variants:
        row, tokens[variant] = _run(folder, variant, arguments)
        row["same tokens"] = tokens[variant] == tokens[arguments.variants[0]]
        print(row, flush=True)
        rows.append(row)
    report(arguments, {"variants": rows})


def _arguments() -> argparse.Namespace:
    result = parser(__doc__)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--experts", type=int, default=64)
    result.add_argument("--hidden", type=int, default=2048)
    result.add_argument("--intermediate", type=int, default=768, help="of one expert")
    result.add_argument("--load-format", choices=["safetensors", "dummy"], default="safetensors")
    result.add_argument("--prompts", type=int, default=4)
    result.add_argument("--prompt-tokens", type=int, default=512)
    result.add_argument("--new-tokens", type=int, default=16)
    result.add_argument("--variants", nargs="+", default=["gpu", "host", "half", "offload"])
    return result.parse_args()


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
        for number, tensors in enumerate(_checkpoint(config)):
            save_file(tensors, folder / f"model-{number:05d}.safetensors")


def _checkpoint(config: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Random weights at a scale at which every layer matters, a file per layer."""
    hidden, heads, kv_heads, dim = config["hidden_size"], 16, 4, 128

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device="cuda") / columns**0.5).to(torch.bfloat16).cpu()

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
        for expert in range(config["num_experts"]):
            inner = config["moe_intermediate_size"]
            for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                tensors[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = matrix(*shape)
        yield tensors


def _run(folder: Path, variant: str, arguments: argparse.Namespace) -> tuple[dict[str, object], list[list[int]]]:
    kind, _, graph = variant.partition("-")
    with _environment(folder, kind, arguments.experts):
        from sglang import Engine

        started = time.perf_counter()
        engine = Engine(
            model_path=str(folder),
            load_format="auto" if arguments.load_format == "safetensors" else "dummy",
            skip_tokenizer_init=True,
            attention_backend="triton",
            sampling_backend="pytorch",
            moe_runner_backend="triton",
            grammar_backend="none",
            disable_radix_cache=True,
            mem_fraction_static=0.3 if kind == "gpu" else 0.5,
            max_running_requests=arguments.prompts,
            cuda_graph_max_bs_decode=arguments.prompts,
            disable_cuda_graph=not graph,
            chunked_prefill_size=16384,
            cpu_offload_gb=200 if kind == "offload" else 0,
            random_seed=0,
        )
        try:
            ready = time.perf_counter()
            prompts = _prompts(arguments)
            one = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
            many = {**one, "max_new_tokens": arguments.new_tokens}
            engine.generate(input_ids=prompts, sampling_params=many)
            begin = time.perf_counter()
            engine.generate(input_ids=prompts, sampling_params=one)
            prefilled = time.perf_counter()
            answers = engine.generate(input_ids=prompts, sampling_params=many)
            end = time.perf_counter()
        finally:
            engine.shutdown()
    prefill = prefilled - begin
    decode = (end - prefilled - prefill) / max(1, arguments.new_tokens - 1)
    row = {
        "variant": variant,
        "start s": round(ready - started, 1),
        "prefill tokens/s": round(arguments.prompts * arguments.prompt_tokens / prefill),
        "decode ms/step": round(decode * 1e3, 2),
    }
    return row, [answer["output_ids"] for answer in answers]


def _prompts(arguments: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.prompts, arguments.prompt_tokens)
    prompts: list[list[int]] = torch.randint(0, 32000, shape, generator=generator).tolist()
    return prompts


@contextmanager
def _environment(folder: Path, kind: str, num_experts: int) -> Iterator[None]:
    """The environment of an engine's processes."""
    os.environ.pop("VMM_DWDP_CONFIG", None)
    host_experts = {"host": num_experts, "half": num_experts // 2, "in_place": num_experts}.get(kind)
    if host_experts is not None:
        config = folder / f"{kind}.yaml"
        mode = "in_place" if kind == "in_place" else "staged"
        config.write_text(f"group_size: 1\nhost_experts: {host_experts}\nmode: {mode}\n")
        os.environ["VMM_DWDP_CONFIG"] = str(config)
    yield
    os.environ.pop("VMM_DWDP_CONFIG", None)


if __name__ == "__main__":
    main()

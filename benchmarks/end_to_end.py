"""Prefill of a Qwen3-30B-A3B-shaped model through transformers on one GPU, its experts in GPU memory or in host memory.

Weights are random, in bf16, 57 GB with all 48 layers. Every figure is of forward passes in a row, after one that warms
up, over one sequence. The link is PCIe, from host memory.

seconds     of a forward pass: all experts in GPU memory; with this library, all, half and an eighth of the experts in
            host memory; with accelerate's CPU offload of the experts (``--offload``)
link s      what the experts in host memory take at the rate of one large copy from pinned memory
of limit    the longer of that and of all experts in GPU memory, divided by the seconds
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time

import accelerate
import torch
from common import Row, parser, report
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.integrations.transformers import attach

EXPERTS, VOCABULARY = 128, 151936
SHARES = {"all": 1.0, "half": 0.5, "an eighth": 0.125}  # of the experts in host memory
STACKED = ("gate_up_proj", "down_proj")


def build(layers: int) -> Qwen3MoeForCausalLM:
    """The model on the GPU, random."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=1 << 17,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cuda")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no weights: they are computed
    model.eval().requires_grad_(False)
    return model


def experts_of(model: Qwen3MoeForCausalLM) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def with_one_expert_repeated(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """Every expert of a layer becomes its first, which takes the memory of one; copied apart, they take their own."""
    for module in experts_of(model):
        for name in STACKED:
            whole = getattr(module, name)
            first = whole.data[:1].clone().expand(whole.shape)
            setattr(module, name, nn.Parameter(first, requires_grad=False))
    torch.cuda.empty_cache()
    return model


def prefill_s(model: Qwen3MoeForCausalLM, tokens: int, passes: int) -> float:
    """Seconds of a forward pass over a sequence of ``tokens``, the mean of several in a row."""
    ids = torch.randint(VOCABULARY, (1, tokens), device="cuda")

    def forward() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        forward()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            forward()
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / passes


def link_rate() -> float:
    """Bytes a second of one large copy from pinned host memory."""
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True).fill_(1)
    target = torch.empty_like(pinned, device="cuda")
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, pinned.nbytes / (time.perf_counter() - start))
    return best


def measure(arguments: argparse.Namespace) -> list[Row]:
    rows: list[dict[str, object]] = []
    in_gpu: dict[int, float] = {}
    rate = link_rate()

    def run(name: str, model: Qwen3MoeForCausalLM, host_bytes: int, lengths: list[int], set_up_s: float) -> None:
        for tokens in lengths:
            seconds = prefill_s(model, tokens, arguments.passes)
            if name == "GPU memory":
                in_gpu[tokens] = seconds
            link_s = host_bytes / rate
            rows.append(
                {
                    "experts": name,
                    "tokens": tokens,
                    "seconds": seconds,
                    "tokens/s": tokens / seconds,
                    "all in GPU memory s": in_gpu[tokens],
                    "link s": link_s,
                    "of limit": max(link_s, in_gpu[tokens]) / seconds,
                    "set-up s": set_up_s,
                    "GPU memory GB": torch.cuda.mem_get_info()[1] / 1e9 - torch.cuda.mem_get_info()[0] / 1e9,
                }
            )

    start = time.perf_counter()
    model = build(arguments.layers)
    torch.cuda.synchronize()
    all_bytes = sum(getattr(module, name).nbytes for module in experts_of(model) for name in STACKED)
    run("GPU memory", model, 0, arguments.tokens, time.perf_counter() - start)
    for share, part in SHARES.items():
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model = with_one_expert_repeated(build(arguments.layers))
        config = DWDPConfig(group_size=1, host_experts=int(EXPERTS * part))
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            runtime = DWDPRuntime(config, 0, "cuda", f"{directory}/rendezvous")
            attach(model, runtime)
            set_up_s = time.perf_counter() - start
            host_bytes = int(all_bytes * part)
            run(f"{share} in host memory", model, host_bytes, arguments.tokens, set_up_s)
            runtime.close()
    if arguments.offload:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model = build(arguments.layers)
        start = time.perf_counter()
        for module in experts_of(model):
            accelerate.cpu_offload(module, execution_device=torch.device("cuda"))
        torch.cuda.empty_cache()
        run("accelerate offload", model, all_bytes, arguments.tokens, time.perf_counter() - start)
    return rows


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--layers", type=int, default=48, help="of 48, for less memory (default: 48)")
    arguments_of.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192, 32768, 65536], help="prompt lengths"
    )
    arguments_of.add_argument("--passes", type=int, default=2, help="that are timed together (default: 2)")
    arguments_of.add_argument("--offload", action="store_true", help="accelerate's CPU offload too")
    arguments = arguments_of.parse_args()
    if arguments.device.type != "cuda":
        arguments_of.error("there is no GPU to measure")
    report(arguments, {f"{arguments.layers} layers": measure(arguments)})


if __name__ == "__main__":
    main()

"""A Qwen3-30B-A3B-shaped model through transformers on one GPU, its experts in GPU memory or in host memory.

Weights are random, in bf16, 61 GB with all 48 layers. Every figure is of forward passes over one sequence, after one
that warms up; a sequence of one token is what a step of decoding reads of the weights. The link is PCIe, from host
memory. On the CPU the same runs on the host driver, which says nothing about a link.

seconds     from the output of one forward pass to that of the next, the median: all experts in GPU memory; with this
            library in mode auto, all, half and an eighth of the experts in host memory; with accelerate's CPU offload
            of the experts (``--offload``). While an output is waited for and looked at, the copies for the next pass go
            on
link s      what the experts in host memory take at the rate of one large copy from pinned memory, made before and after
            the passes, because the link of a shared host drifts
of limit    of staged passes: the longer of that and of all experts in GPU memory, divided by the seconds. No figure is
            printed if the experts seem to come faster than the fastest copy of the run
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time

import accelerate
import torch
from common import Row, parser, report, require_within_link, seen
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.integrations.transformers import attach
from vmm_dwdp.observe.stats import Stats

EXPERTS, VOCABULARY = 128, 151936
SHARES = {"all": 1.0, "half": 0.5, "an eighth": 0.125}  # of the experts in host memory
STACKED = ("gate_up_proj", "down_proj")
ENOUGH = 0.5  # seconds of passes, of which there may be more than were asked for


def build(layers: int, device: torch.device) -> Qwen3MoeForCausalLM:
    """The model on ``device``, random."""
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
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02)
    with device:
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
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_s(model: Qwen3MoeForCausalLM, tokens: int, passes: int) -> float:
    """Seconds of a forward pass over a sequence of ``tokens``, among others like it."""
    ids = torch.randint(VOCABULARY, (1, tokens), device=model.lm_head.weight.device)

    def forward() -> float:
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1).logits.argmax().item()
        return time.perf_counter() - start

    with torch.no_grad():
        forward()
        found = [forward() for _ in range(passes)]
        while sum(found) < ENOUGH:
            found.append(forward())
    return statistics.median(found)


class Link:
    """One large copy from host memory, pinned for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._target = torch.empty_like(self._pinned, device=device)
        self.rates()

    def rates(self) -> list[float]:
        """Bytes a second, a few times."""
        found = []
        for _ in range(3):
            synchronize(self._target.device)
            start = time.perf_counter()
            self._target.copy_(self._pinned, non_blocking=True)
            synchronize(self._target.device)
            found.append(self._pinned.nbytes / (time.perf_counter() - start))
        return found


def used_gb(device: torch.device) -> float:
    """Of the memory of ``device``, by whatever uses it."""
    if device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e9


def forget() -> None:
    """Give back the memory of a model that nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mostly_staged(before: Stats, after: Stats) -> bool:
    """Of the layers read in between, which mode auto may have read in place."""
    return after.hits + after.misses - before.hits - before.misses > after.in_place - before.in_place


def measure(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    in_gpu: dict[int, float] = {}
    device = arguments.device
    link = Link(device)
    fastest = 0.0
    staged_rates: list[Row] = []

    def run(
        name: str, model: Qwen3MoeForCausalLM, host_bytes: int, set_up_s: float, runtime: DWDPRuntime | None = None
    ) -> None:
        nonlocal fastest
        for tokens in arguments.tokens:
            rates = link.rates()
            before = runtime and runtime.stats()
            seconds = forward_s(model, tokens, arguments.passes)
            staged = before is None or mostly_staged(before, runtime.stats())
            in_gpu.setdefault(tokens, seconds)
            rates += link.rates()
            fastest = max(fastest, *rates)
            link_s = host_bytes / statistics.median(rates)
            if staged:
                staged_rates.append({"experts": name, "tokens": tokens, "GB/s": host_bytes / seconds / 1e9})
            rows.append(
                seen(
                    {
                        "experts": name,
                        "tokens": tokens,
                        "seconds": seconds,
                        "tokens/s": tokens / seconds,
                        "times all in GPU memory": seconds / in_gpu[tokens],
                        "link s": link_s,
                        "of limit": max(link_s, in_gpu[tokens]) / seconds if staged else None,
                        "set-up s": set_up_s,
                        "GPU memory GB": used_gb(device),
                    }
                )
            )

    start = time.perf_counter()
    model = build(arguments.layers, device)
    synchronize(device)
    all_bytes = sum(getattr(module, name).nbytes for module in experts_of(model) for name in STACKED)
    run("GPU memory", model, 0, time.perf_counter() - start)
    for share, part in SHARES.items():
        del model
        forget()
        model = with_one_expert_repeated(build(arguments.layers, device))
        forget()
        config = DWDPConfig(group_size=1, host_experts=int(EXPERTS * part), mode="auto")
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            runtime = DWDPRuntime(config, 0, device, f"{directory}/rendezvous")
            attach(model, runtime)
            run(f"{share} in host memory", model, int(all_bytes * part), time.perf_counter() - start, runtime)
            runtime.close()
    if arguments.offload:
        del model
        forget()
        model = build(arguments.layers, device)
        start = time.perf_counter()
        for module in experts_of(model):
            accelerate.cpu_offload(module, execution_device=device)
        forget()
        run("accelerate offload", model, all_bytes, time.perf_counter() - start)
    if device.type == "cuda":
        require_within_link(staged_rates, fastest / 1e9, ["GB/s"])
    return rows


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--layers", type=int, default=48, help="of 48, for less memory (default: 48)")
    arguments_of.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 1024, 8192, 32768, 65536], help="lengths of the sequence"
    )
    arguments_of.add_argument("--passes", type=int, default=3, help="that are timed at least (default: 3)")
    arguments_of.add_argument("--offload", action="store_true", help="accelerate's CPU offload too")
    arguments = arguments_of.parse_args()
    report(arguments, {f"{arguments.layers} layers": measure(arguments)})


if __name__ == "__main__":
    main()

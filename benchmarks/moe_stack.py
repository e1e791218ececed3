"""A stack of MoE layers with attention-sized compute between, by three parallelisms over the same weights and tokens.

    dwdp   every rank runs its own tokens through all experts; remote experts are prefetched. No collective.
    ep     experts are spread over ranks; tokens go to their experts and back: two all-to-alls a layer.
    tp     every expert is cut along its intermediate size; all ranks run all tokens: an all-reduce a layer.

Weights of expert ``e`` of layer ``l`` are drawn from a generator seeded by (l, e), so that every rank can make any of
them, and the routing of every rank's tokens is seeded by the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.config import Mode

DTYPE = torch.bfloat16
_CHUNK_TOKENS = 1 << 16


@dataclass(frozen=True)
class Stack:
    """What is run. Sizes as in a model's config: ``hidden`` H, ``intermediate`` I, ``top_k`` experts a token.

    Attributes:
        attention_flops_per_token: of the dense product between two MoE layers, which stands for attention.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    attention_flops_per_token: int

    def divides(self, ranks: int) -> bool:
        """Whether so many ranks have equally many experts, or equal parts of every expert, whose rows have a multiple
        of 16 bytes then, as the GEMM wants them."""
        return self.num_experts % ranks == 0 and self.intermediate * DTYPE.itemsize % (16 * ranks) == 0

    @property
    def layer_nbytes(self) -> int:
        return self.num_experts * 3 * self.hidden * self.intermediate * DTYPE.itemsize


# Attention as a dense product: about 4 H^2 multiplications a token for the projections, and scores over 4,096 tokens.
STACKS = {
    # Real: 256 experts of 7168 x 2048 in FP8 (11.3 GB a layer); in bfloat16 half the experts have the same bytes.
    "deepseek-r1": Stack("deepseek-r1, FP8's bytes", 4, 128, 8, 7168, 2048, 8 * 7168**2 + 4 * 4096 * 7168),
    "gpt-oss-120b": Stack("gpt-oss-120b", 6, 128, 4, 2880, 2880, 8 * 2880**2 + 4 * 4096 * 2880),
    "tiny": Stack("tiny", 3, 16, 2, 64, 64, 1 << 16),
}


def weights(stack: Stack, layer: int, expert: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``w13 [2 I, H]`` and ``w2 [H, I]`` of one expert."""
    generator = torch.Generator(device).manual_seed(layer * stack.num_experts + expert)
    w13 = torch.randn(2 * stack.intermediate, stack.hidden, dtype=DTYPE, device=device, generator=generator)
    w2 = torch.randn(stack.hidden, stack.intermediate, dtype=DTYPE, device=device, generator=generator)
    return w13 * stack.hidden**-0.5, w2 * stack.intermediate**-0.5


@dataclass(frozen=True)
class Routed:
    """Tokens of one rank, and where they go: ``x [T, H]``, ``order [T k]`` rows sorted by expert, ``counts [E]``."""

    x: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor


def route(stack: Stack, tokens: int, rank: int, device: torch.device, *, balanced: bool = False) -> Routed:
    """Random tokens, each to ``top_k`` different experts: at random, or all experts get as many, but for one."""
    generator = torch.Generator(device).manual_seed(1_000_003 + rank)
    x = torch.randn(tokens, stack.hidden, dtype=DTYPE, device=device, generator=generator)
    if balanced:
        turns = torch.arange(tokens * stack.top_k, device=device) % stack.num_experts
        experts = torch.randperm(stack.num_experts, device=device, generator=generator)[turns]
    else:
        scores = torch.rand(tokens, stack.num_experts, device=device, generator=generator)
        experts = scores.topk(stack.top_k).indices.flatten()
    return Routed(x, experts.argsort(stable=True), experts.bincount(minlength=stack.num_experts))


def run_experts(rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert through ``w2 (silu(gate) * up)``."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)


def combine(stack: Stack, routed: Routed, rows: torch.Tensor) -> torch.Tensor:
    """The mean of each token's experts."""
    by_choice = torch.empty_like(rows)
    by_choice[routed.order] = rows
    return by_choice.view(-1, stack.top_k, stack.hidden).mean(1)


Pass = Callable[[], torch.Tensor]
Bind = Callable[[list[Routed]], Pass]  # a pass over the tokens of all ranks; each rank returns the rows of its own


def between(stack: Stack, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A dense product of the stated size; its result is added with weight zero, so that the layers stay comparable."""
    width = max(16, stack.attention_flops_per_token // (2 * stack.hidden) // 16 * 16)
    dense = torch.randn(stack.hidden, width, dtype=DTYPE, device=device)
    return lambda x: x + 0 * (x @ dense)[:, :1]


@contextmanager
def dwdp(
    stack: Stack,
    config: DWDPConfig,
    rank: int,
    device: torch.device,
    rendezvous: Path,
    *,
    driver: Driver | None = None,
) -> Iterator[tuple[DWDPRuntime, Callable[[Mode], Bind]]]:
    """This library."""
    with DWDPRuntime(config, rank, device, rendezvous, driver=driver) as runtime:
        shapes = {
            "w13": (stack.num_experts, 2 * stack.intermediate, stack.hidden),
            "w2": (stack.num_experts, stack.hidden, stack.intermediate),
        }
        for layer in range(stack.num_layers):
            runtime.add_layer(layer, {name: WeightSpec(shape, DTYPE) for name, shape in shapes.items()})
            for index, expert in enumerate(runtime.local_experts(layer)):
                for name, value in zip(shapes, weights(stack, layer, expert, device), strict=True):
                    runtime.local_shard(layer, name)[index].copy_(value)
        runtime.publish(timeout=120)
        attention = between(stack, device)

        def run(mode: Mode, routed: Routed) -> torch.Tensor:
            x = routed.x
            for layer in range(stack.num_layers):
                x = attention(x)
                rows = x[routed.order // stack.top_k]
                with runtime.layer(layer, mode=mode) as held:
                    rows = run_experts(rows, routed.counts, held["w13"], held["w2"])  # type: ignore[arg-type]
                x = combine(stack, routed, rows)
            return x

        yield runtime, lambda mode: lambda every: partial(run, mode, every[rank])


def in_own_memory(stack: Stack, rank: int, device: torch.device) -> Bind:
    """The compute of a pass: every layer reads the experts of the first, in ordinary memory. Results are of no use."""
    every_expert = [weights(stack, 0, expert, device) for expert in range(stack.num_experts)]
    w13, w2 = (torch.stack(parts) for parts in zip(*every_expert, strict=True))
    attention = between(stack, device)

    def run(routed: Routed) -> torch.Tensor:
        x = routed.x
        for _ in range(stack.num_layers):
            x = attention(x)
            rows = run_experts(x[routed.order // stack.top_k], routed.counts, w13, w2)
            x = combine(stack, routed, rows)
        return x

    return lambda every: partial(run, every[rank])


def expert_parallel(stack: Stack, rank: int, group_size: int, device: torch.device) -> Bind:
    """All-to-all there and back, in every layer, of as many rows as the routing sends. Experts divide evenly."""
    per_rank = stack.num_experts // group_size
    own = range(rank * per_rank, (rank + 1) * per_rank)
    held = []
    for layer in range(stack.num_layers):
        w13, w2 = zip(*(weights(stack, layer, expert, device) for expert in own), strict=True)
        held.append((torch.stack(w13), torch.stack(w2)))
    attention = between(stack, device)

    def bind(every: list[Routed]) -> Pass:
        routed = every[rank]
        arriving = torch.stack([other.counts[own.start : own.stop] for other in every])  # by sender and expert
        sends = routed.counts.view(group_size, per_rank).sum(1).tolist()
        receives = arriving.sum(1).tolist()
        # Rows arrive by sender and then by expert; the GEMM wants them by expert.
        expert_of_row = torch.arange(per_rank, device=device).repeat(group_size).repeat_interleave(arriving.flatten())
        by_expert = expert_of_row.argsort(stable=True)
        counts = arriving.sum(0)

        def run() -> torch.Tensor:
            x = routed.x
            for w13, w2 in held:
                x = attention(x)
                rows = x[routed.order // stack.top_k]
                there = rows.new_empty(sum(receives), stack.hidden)
                dist.all_to_all_single(there, rows, receives, sends)
                done = torch.empty_like(there)
                done[by_expert] = run_experts(there[by_expert], counts, w13, w2)
                back = torch.empty_like(rows)
                dist.all_to_all_single(back, done, sends, receives)
                x = combine(stack, routed, back)
            return x

        return run

    return bind


def tensor_parallel(stack: Stack, rank: int, group_size: int, device: torch.device) -> Bind:
    """All tokens of all ranks on every rank, each with its part of every expert; one all-reduce a layer."""
    part = stack.intermediate // group_size
    own = slice(rank * part, (rank + 1) * part)
    held = []
    for layer in range(stack.num_layers):
        w13s, w2s = [], []
        for expert in range(stack.num_experts):
            w13, w2 = weights(stack, layer, expert, device)
            gate, up = w13.chunk(2)
            w13s.append(torch.cat([gate[own], up[own]]))
            w2s.append(w2[:, own].contiguous())
        held.append((torch.stack(w13s), torch.stack(w2s)))
    attention = between(stack, device)

    def bind(every: list[Routed]) -> Pass:
        chunks = [together(stack, part) for part in _chunks(every)]
        first = sum(len(routed.x) for routed in every[:rank])
        own_tokens = slice(first, first + len(every[rank].x))

        def run() -> torch.Tensor:
            x = torch.cat([routed.x for routed in every])
            for w13, w2 in held:
                x = attention(x)
                parts = x.split([len(routed.x) for routed in chunks])
                done = []
                for routed, tokens in zip(chunks, parts, strict=True):
                    rows = run_experts(tokens[routed.order // stack.top_k], routed.counts, w13, w2)
                    done.append(combine(stack, routed, rows))
                x = torch.cat(done)
                dist.all_reduce(x)
            return x[own_tokens]

        return run

    return bind


def _chunks(every: list[Routed]) -> Iterator[list[Routed]]:
    """Neighbouring ranks whose tokens fit into one grouped GEMM's memory together."""
    chunk: list[Routed] = []
    for routed in every:
        if chunk and sum(len(other.x) for other in (*chunk, routed)) > _CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(routed)
    yield chunk


def together(stack: Stack, every: list[Routed]) -> Routed:
    """The tokens of several ranks as those of one."""
    choices = [
        torch.empty_like(routed.order).scatter_(
            0, routed.order, torch.arange(stack.num_experts, device=routed.x.device).repeat_interleave(routed.counts)
        )
        for routed in every
    ]
    experts = torch.cat(choices)
    counts = experts.bincount(minlength=stack.num_experts)
    return Routed(torch.cat([routed.x for routed in every]), experts.argsort(stable=True), counts)


def reference(stack: Stack, device: torch.device, cases: list[Routed]) -> list[torch.Tensor]:
    """Passes over this rank's tokens with all experts in ordinary memory, a layer at a time."""
    attention = between(stack, device)
    results = [routed.x for routed in cases]
    for layer in range(stack.num_layers):
        every = [weights(stack, layer, expert, device) for expert in range(stack.num_experts)]
        w13, w2 = (torch.stack(parts) for parts in zip(*every, strict=True))
        del every
        for case, routed in enumerate(cases):
            x = attention(results[case])
            rows = run_experts(x[routed.order // stack.top_k], routed.counts, w13, w2)
            results[case] = combine(stack, routed, rows)
    return results

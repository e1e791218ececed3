"""Prompts for the ranks of SGLang's engines, and the time below which no GPU can be done with them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import torch
from sglang_checkpoint import Shape

from vmm_dwdp.planning.gpus import GpuSpec

Lengths = list[list[int]]  # of the prompts of each rank
Prompts = list[list[list[int]]]  # their tokens

MIXES = ("8 of 4K", "4 of 8K", "2 of 32K", "4 of 4K to 28K", "in step", "drifting")


def lengths(mix: str, ranks: int, chunk: int, unit: int = 1024) -> Lengths:
    """Tokens of each prompt of each rank; ``unit``: how many K stands for.

    "in step" and "drifting" are the same prompts, one of a chunk and a long one of several. In step all ranks begin
    with the short one; drifting, every other rank ends with it, so that neighbours are a chunk apart all the time.
    """
    if mix == "4 of 4K to 28K":
        draw = random.Random(5)
        return [[draw.randrange(4 * unit, 28 * unit) for _ in range(4)] for _ in range(ranks)]
    if mix in ("in step", "drifting"):
        pair = [chunk, max(32 * unit, 2 * chunk)]
        return [pair[:: -1 if mix == "drifting" and rank % 2 else 1] for rank in range(ranks)]
    count, _, size = mix.removesuffix("K").partition(" of ")
    return [[int(size) * unit] * int(count) for _ in range(ranks)]


def prompts(name: str, wanted: Lengths, vocabulary: int) -> Prompts:
    """Random tokens, the same for the same name and lengths. "in step" and "drifting" have the same, by length."""
    seed = zlib.crc32(name.replace("drifting", "in step").encode())

    def of_rank(rank: int, counts: list[int]) -> list[list[int]]:
        made: dict[int, list[int]] = {}
        for number, place in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
            generator = torch.Generator().manual_seed(seed + 1000 * rank + number)
            made[place] = torch.randint(vocabulary, (counts[place],), generator=generator).tolist()
        return [made[place] for place in range(len(counts))]

    return [of_rank(rank, counts) for rank, counts in enumerate(wanted)]


def least_prefill_seconds(shape: Shape, wanted: Lengths, gpu: GpuSpec, *, fp8: bool) -> float:
    """All of the work at the arithmetic peak of all ranks' GPUs.

    Two operations for each weight that a token meets, and four of ``heads * head_dim`` for each token that it attends
    to; of the head, one token a prompt. Weights in FP8 are multiplied at the peak of FP8, attention in bf16.
    """
    every = [count for of_rank in wanted for count in of_rank]
    scores = 4 * shape.layers * shape.heads * shape.head_dim * sum(count * (count + 1) // 2 for count in every)
    rest = 2 * shape.hidden * (shape.layers * shape.experts * sum(every) + shape.vocabulary * len(every))
    seconds = least_product_seconds(shape, sum(every), gpu, fp8=fp8) + (scores + rest) / gpu.peak_flops["bf16"]
    return seconds / len(wanted)


def least_product_seconds(shape: Shape, tokens: int, gpu: GpuSpec, *, fp8: bool) -> float:
    """What they meet of attention's and experts' weights, at one GPU's arithmetic peak."""
    return 2 * tokens * _numbers_of_a_token(shape) / gpu.peak_flops["fp8" if fp8 else "bf16"]


def least_decode_seconds(shape: Shape, ranks: int, gpu: GpuSpec, *, bits: int) -> float:
    """A step: the weights that one token meets in every layer, in so many ``bits`` each, read at the rate of all ranks'
    GPU memory together."""
    return _numbers_of_a_token(shape) * bits / 8 / gpu.memory_bandwidth / ranks


def _numbers_of_a_token(shape: Shape) -> int:
    """The weights of attention and of the chosen experts, of all layers."""
    expert = sum(rows * columns for rows, columns in shape.expert.values())
    attention = sum(rows * columns for rows, columns in shape.attention.values())
    return shape.layers * (attention + shape.experts_per_token * expert)


def chosen_remote_seconds(shape: Shape, ranks: int, sequences: int, gpu: GpuSpec, *, fp8: bool) -> float:
    """A decode step's experts that are chosen and lie on another rank, at the rate of a link; routing is uniform."""
    expert = sum(rows * columns for rows, columns in shape.expert.values()) * (1 if fp8 else 2)
    chosen = shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** sequences)
    return shape.layers * chosen * expert * (ranks - 1) / ranks / gpu.pull_rate


def tokens_at_once(every: Sequence[Lengths], more: int) -> int:
    """Of the rank with most: room for all its prompts of a mix, and ``more`` tokens after each."""
    return max(sum(count + more for count in of_rank) for wanted in every for of_rank in wanted)

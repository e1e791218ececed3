"""A decoder of a MoE model's shapes, a token a sequence at a time, of random weights: all but who reads the experts.

Attention over a cache of fixed size, norms, the router, embeddings and the LM head are in bf16, on the GPU. Which
experts tokens choose is not the router's choice, which is made all the same, but recorded: a table on the device of
which every step takes the next row, so that a step is one CUDA graph with nothing to be given to it. Left out of
gpt-oss: biases, sinks, windows, and the clamp of its activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from expert_formats import Sizes, through
from torch import Tensor

CONTEXT = 512  # tokens in the cache when decoding begins


class Shape(NamedTuple):
    """Of a model, with one kind of layers."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms_heads: bool

    @property
    def sizes(self) -> Sizes:
        """Of the weights of one expert."""
        return {"w13": (2 * self.intermediate, self.hidden), "w2": (self.hidden, self.intermediate)}


SHAPES = {
    "Qwen3-30B-A3B": Shape(48, 2048, 128, 8, 768, 32, 4, 128, 151936, True),
    "gpt-oss-120b": Shape(36, 2880, 128, 4, 2880, 64, 8, 64, 201088, False),
    "tiny": Shape(7, 256, 16, 4, 128, 4, 2, 32, 512, True),
}

Weights = Mapping[str, Tensor]
# Of a layer and its chosen experts [tokens, top_k], for as long as they are read: the weights, and where in them the
# experts are.
Read = Callable[[int, Tensor], AbstractContextManager[tuple[Weights, Tensor]]]


class Decoder:
    """Weights, cache and state of ``batch`` sequences.

    Attributes:
        table: int64 ``[steps, layers, batch, top_k]``, which experts tokens choose.
        kept: ``[steps, batch, hidden]``, what each step gave to the LM head.
    """

    def __init__(self, shape: Shape, batch: int, steps: int, device: torch.device) -> None:
        self.shape, self.batch = shape, batch
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, scale: float) -> Tensor:
            return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=generator)

        heads = shape.heads + 2 * shape.kv_heads
        into, out_of = shape.hidden**-0.5, (shape.heads * shape.head_dim) ** -0.5
        self.qkv = random(shape.layers, heads * shape.head_dim, shape.hidden, scale=into)
        self.output = random(shape.layers, shape.hidden, shape.heads * shape.head_dim, scale=out_of)
        self.router = random(shape.layers, shape.experts, shape.hidden, scale=into)
        self.norms = 1 + random(2 * shape.layers + 1, shape.hidden, scale=0.1)
        self.head_norms = 1 + random(shape.layers, shape.head_dim, scale=0.1)
        self.embedding = random(shape.vocabulary, shape.hidden, scale=1.0)
        self.head = random(shape.vocabulary, shape.hidden, scale=into)
        length = -(-(CONTEXT + steps) // 64) * 64
        self.cache = random(2, shape.layers, batch, shape.kv_heads, length, shape.head_dim, scale=1.0)
        self.first_cache = self.cache.clone()
        self.cosine, self.sine = rotations(length, shape.head_dim, device)
        self.places = torch.arange(length, device=device)
        self.table = torch.zeros(steps, shape.layers, batch, shape.top_k, dtype=torch.long, device=device)
        self.kept = torch.zeros(steps, batch, shape.hidden, dtype=torch.bfloat16, device=device)
        self.step_number, self.position = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.token = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def nbytes_of_a_step(self) -> int:
        """Of the weights but the experts' that a step reads."""
        return sum(weight.nbytes for weight in (self.qkv, self.output, self.router, self.head))

    def begin(self, step: int) -> None:
        """The next step is ``step`` of the table, whatever was before."""
        self.cache.copy_(self.first_cache)
        self.step_number.fill_(step)
        self.position.fill_(CONTEXT)
        self.token.zero_()

    def step(self, read: Read) -> None:
        """One token more of each sequence."""
        chosen = self.table.index_select(0, self.step_number)[0]
        turn = self.cosine.index_select(0, self.position), self.sine.index_select(0, self.position)
        mask = torch.zeros(len(self.places), dtype=torch.bfloat16, device=self.places.device)
        mask = mask.masked_fill(self.places > self.position, float("-inf"))[None]
        x = self.embedding.index_select(0, self.token)
        for number in range(self.shape.layers):
            x = x + self.attend(number, self.normed(x, 2 * number), turn, mask)
            x = x + self.mix(number, self.normed(x, 2 * number + 1), chosen[number], read)
        x = self.normed(x, 2 * self.shape.layers)
        self.token.copy_(F.linear(x, self.head).argmax(-1))
        self.kept.index_copy_(0, self.step_number, x[None])
        self.step_number += 1
        self.position += 1

    def normed(self, x: Tensor, number: int) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.norms[number])

    def attend(self, number: int, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """All query heads of one key head are the rows of one product, as each sequence has one token."""
        shape = self.shape
        heads = F.linear(x, self.qkv[number]).view(self.batch, -1, shape.head_dim)
        turned, values = heads.split([shape.heads + shape.kv_heads, shape.kv_heads], 1)
        if shape.norms_heads:
            turned = F.rms_norm(turned, (shape.head_dim,), self.head_norms[number])
        turned = torch.addcmul(turned * turn[0], turned.roll(shape.head_dim // 2, -1), turn[1])
        queries, keys = turned.split([shape.heads, shape.kv_heads], 1)
        for cache, new in zip(self.cache[:, number], (keys, values), strict=True):
            cache.index_copy_(2, self.position, new[:, :, None])
        by_key = queries.reshape(self.batch, shape.kv_heads, -1, shape.head_dim)
        out = F.scaled_dot_product_attention(by_key, *self.cache[:, number], attn_mask=mask)
        return F.linear(out.reshape(self.batch, -1), self.output[number])

    def mix(self, number: int, x: Tensor, chosen: Tensor, read: Read) -> Tensor:
        scores = F.linear(x, self.router[number])
        scores.topk(self.shape.top_k)  # what was recorded stands for it
        gates = scores.gather(1, chosen).softmax(-1)
        with read(number, chosen) as (weights, rows):
            y = through(x, weights, rows)
        return (y * gates[..., None]).sum(1)


def rotations(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign that they have where halves have changed places, bf16 ``[length, head_dim]``."""
    powers = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.arange(length, device=device)[:, None] * 1e6**-powers
    halves = torch.cat([-angles.sin(), angles.sin()], 1)
    return angles.cos().repeat(1, 2).bfloat16(), halves.bfloat16()

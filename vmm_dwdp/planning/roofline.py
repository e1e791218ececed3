"""How long one MoE layer takes: every operation at its roofline, by efficiencies that the GPU states.

An operation takes as long as the slower of its arithmetic and its memory traffic ("Roofline", Williams, Waterman and
Patterson, 2009), each at the share of the peak that `Efficiency` names. All times are in seconds, all of prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.models import ModelSpec

Kind = Literal["dense_gemm", "attention", "memory", "grouped_gemm", "network"]

ACTIVATION = 2  # bytes of a value between operations: bf16


@dataclass(frozen=True)
class Operation:
    """A part of a layer.

    Attributes:
        kind: which efficiency applies, and how copies disturb it.
        seconds: alone on the GPU.
    """

    name: str
    kind: Kind
    seconds: float


@dataclass(frozen=True)
class Batch:
    """The requests of one forward pass of one rank: tokens of each, all of them new."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("a forward pass needs at least one token")

    @classmethod
    def of(cls, tokens: int, length: int | None = None) -> Batch:
        """``tokens`` in requests of ``length``, the last one shorter; ``None``: one request."""
        if tokens < 1 or (length is not None and length < 1):
            raise ConfigError("a forward pass needs at least one token, and so does a request")
        whole, rest = divmod(tokens, length or tokens)
        return cls((length or tokens,) * whole + ((rest,) if rest else ()))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def pairs(self, window: int | None) -> int:
        """Pairs of a query and a key that causal attention computes, with a sliding window or without."""
        total = 0
        for length in self.lengths:
            reach = min(length, window or length)
            total += reach * (reach + 1) // 2 + (length - reach) * reach
        return total


class _Roofline:
    """The operations of one model on one GPU for one batch."""

    def __init__(self, model: ModelSpec, gpu: GpuSpec, batch: Batch) -> None:
        self._model = model
        self._gpu = gpu
        self._batch = batch
        self._memory_rate = gpu.memory_bandwidth * gpu.efficiency.memory
        self._elementwise_rate = gpu.memory_bandwidth * gpu.efficiency.elementwise

    def _products(self, name: str, kind: Kind, macs: float, nbytes: float, arithmetic: str) -> Operation:
        routed = self._batch.tokens * self._model.top_k
        efficiency = {
            "dense_gemm": self._gpu.efficiency.dense_gemm,
            "grouped_gemm": self._gpu.efficiency.grouped_gemm_at(routed / self._model.num_experts),
            "attention": self._gpu.efficiency.attention,
        }
        rate = self._gpu.peak(arithmetic) * efficiency[kind]
        return Operation(name, kind, max(2 * macs / rate, nbytes / self._memory_rate))

    def norms(self) -> Operation:
        """Two norms, each with the residual sum before it: three reads, two writes."""
        nbytes = 10 * self._batch.tokens * self._model.hidden * ACTIVATION
        return Operation("norms", "memory", nbytes / self._elementwise_rate)

    def projections(self, name: str, matrices: Sequence[tuple[int, int]]) -> Operation:
        """The matrices of the attention before its core, or the one after it."""
        tokens, weights = self._batch.tokens, self._model.attention_format
        operands = sum(columns * weights.activation_bytes + rows * ACTIVATION for columns, rows in matrices)
        stored = sum(weights.nbytes(rows, columns) for columns, rows in matrices)
        macs = tokens * sum(columns * rows for columns, rows in matrices)
        return self._products(name, "dense_gemm", macs, stored + tokens * operands, weights.arithmetic)

    def attention(self, window: int | None) -> Operation:
        """Queries, keys, values and outputs pass memory once."""
        attention = self._model.attention
        macs = self._batch.pairs(window) * attention.flops_per_pair / 2
        values = 2 * self._batch.tokens * attention.heads * (attention.key_dim + attention.value_dim)
        return self._products("attention", "attention", macs, values * ACTIVATION, "bf16")

    def feed_forward(self, name: str, width: int) -> Operation:
        """A gated feed-forward part that all tokens pass."""
        tokens, hidden, weights = self._batch.tokens, self._model.hidden, self._model.expert_format
        operands = tokens * (hidden + width) * weights.activation_bytes + tokens * (2 * width + hidden) * ACTIVATION
        nbytes = self._model.feed_forward_bytes(width, weights) + operands
        return self._products(name, "dense_gemm", tokens * 3 * hidden * width, nbytes, weights.arithmetic)

    def combine(self) -> Operation:
        """Add up the outputs of each token's experts."""
        nbytes = self._batch.tokens * (self._model.top_k + 1) * self._model.hidden * ACTIVATION
        return Operation("combine", "memory", nbytes / self._elementwise_rate)

    def routing(self) -> Operation:
        """Gather the routed tokens, and the activation between the two products."""
        model = self._model
        stored = model.expert_format.activation_bytes
        routed = model.hidden * stored + model.expert_intermediate * (2 * ACTIVATION + stored)
        nbytes = self._batch.tokens * (model.top_k * routed + model.hidden * ACTIVATION)
        return Operation("routing", "memory", nbytes / self._elementwise_rate)

    def experts(self, held: int) -> Operation:
        """The grouped products; of E experts, only those are read that at least one of n random choices hits."""
        model = self._model
        hidden, width, weights = model.hidden, model.expert_intermediate, model.expert_format
        routed = self._batch.tokens * model.top_k
        read = held * (1 - (1 - 1 / model.num_experts) ** routed) * model.layer_expert_bytes / model.num_experts
        operands = routed * ((hidden + width) * weights.activation_bytes + (2 * width + hidden) * ACTIVATION)
        macs = routed * 3 * hidden * width
        return self._products("experts", "grouped_gemm", macs, read + operands, weights.arithmetic)


def layer_operations(
    model: ModelSpec, gpu: GpuSpec, batch: Batch, *, window: int | None = None, experts: int | None = None
) -> tuple[Operation, ...]:
    """The operations from one MoE layer's experts, which are released then, to the next one's, in order.

    Args:
        window: how many tokens back the layer attends to.
        experts: how many experts' weights the rank reads; all by default, its share under expert parallelism. The
            routed tokens are as many either way.
    """
    roofline = _Roofline(model, gpu, batch)
    shared = model.shared_intermediate
    return (
        roofline.combine(),
        roofline.norms(),
        roofline.projections("projections", model.attention.projections[:-1]),
        roofline.attention(window),
        roofline.projections("output projection", model.attention.projections[-1:]),
        *([roofline.feed_forward("shared experts", shared)] if shared else []),
        roofline.routing(),
        roofline.experts(experts or model.num_experts),
    )


def dense_layer_operations(model: ModelSpec, gpu: GpuSpec, batch: Batch) -> tuple[Operation, ...]:
    """The operations of a layer without experts."""
    roofline = _Roofline(model, gpu, batch)
    return (
        roofline.norms(),
        roofline.projections("projections", model.attention.projections[:-1]),
        roofline.attention(None),
        roofline.projections("output projection", model.attention.projections[-1:]),
        roofline.feed_forward("feed-forward", model.dense_intermediate),
    )


def all_to_all(model: ModelSpec, gpu: GpuSpec, tokens: int, group_size: int) -> float:
    """Seconds that expert parallelism takes to dispatch a layer's tokens to other ranks' experts and combine them.

    A token travels once to each of its experts on another rank, in the format of the experts' activations, and comes
    back in bf16.
    """
    copies = tokens * model.top_k * (group_size - 1) / group_size
    nbytes = copies * model.hidden * (model.expert_format.activation_bytes + ACTIVATION)
    return nbytes / gpu.exchange_rate(group_size)


def total(operations: Sequence[Operation]) -> float:
    """Seconds of all operations, one after another."""
    return sum(operation.seconds for operation in operations)

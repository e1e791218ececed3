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

Kind = Literal["dense_gemm", "attention", "memory", "grouped_gemm"]

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


def layer_operations(
    model: ModelSpec, gpu: GpuSpec, batch: Batch, *, window: int | None = None, experts: int | None = None
) -> tuple[Operation, ...]:
    """The operations of one MoE layer in the order of the forward pass.

    Args:
        window: how many tokens back the layer attends to.
        experts: how many experts' weights the rank reads; all by default, its share under expert parallelism. The
            routed tokens are as many either way.
    """
    tokens, hidden, attention = batch.tokens, model.hidden, model.attention
    routed = tokens * model.top_k
    width, held = model.expert_intermediate, experts or model.num_experts
    weights, attention_weights = model.expert_format, model.attention_format

    def products(name: str, kind: Kind, macs: float, nbytes: float, arithmetic: str) -> Operation:
        share = {"dense_gemm": gpu.efficiency.dense_gemm, "grouped_gemm": gpu.efficiency.grouped_gemm}
        rate = gpu.peak(arithmetic) * share.get(kind, gpu.efficiency.attention)
        return Operation(name, kind, max(2 * macs / rate, nbytes / memory_rate))

    memory_rate = gpu.memory_bandwidth * gpu.efficiency.memory
    query = attention.heads * attention.key_dim
    output = attention.heads * attention.value_dim
    in_out = sum(
        tokens * (columns * attention_weights.activation_bytes + rows * ACTIVATION)
        for columns, rows in attention.projections
    )
    # Of E experts, routed to at random, the share that at least one of n choices hits.
    active = held * (1 - (1 - 1 / model.num_experts) ** routed)
    expert_bytes = model.layer_expert_bytes / model.num_experts
    feed_forward = 3 * hidden * width
    operations = [
        # Two norms, each with the residual sum before it: three reads, two writes.
        Operation("norms", "memory", 10 * tokens * hidden * ACTIVATION / memory_rate),
        products(
            "projections",
            "dense_gemm",
            tokens * attention.parameters,
            model.attention_bytes + in_out,
            attention_weights.arithmetic,
        ),
        products(
            "attention",
            "attention",
            batch.pairs(window) * attention.flops_per_pair / 2,
            tokens * (query + output + attention.heads * (attention.key_dim + attention.value_dim)) * ACTIVATION,
            "bf16",
        ),
    ]
    if model.shared_intermediate:
        operations.append(
            products(
                "shared experts",
                "dense_gemm",
                tokens * 3 * hidden * model.shared_intermediate,
                model.feed_forward_bytes(model.shared_intermediate, weights)
                + tokens * hidden * (weights.activation_bytes + ACTIVATION),
                weights.arithmetic,
            )
        )
    # Gather the routed tokens; the activation between the two products; add up the experts' outputs.
    moved = routed * (hidden * (weights.activation_bytes + ACTIVATION) + width * (2 * ACTIVATION + weights.activation_bytes))
    operations.append(Operation("routing", "memory", (moved + 2 * tokens * hidden * ACTIVATION) / memory_rate))
    operations.append(
        products(
            "experts",
            "grouped_gemm",
            routed * feed_forward,
            active * expert_bytes
            + routed * (hidden + width) * weights.activation_bytes
            + routed * (2 * width + hidden) * ACTIVATION,
            weights.arithmetic,
        )
    )
    return tuple(operations)


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

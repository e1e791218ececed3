"""Decoding with experts on other GPUs or in host memory, read in place: tokens a second, and what limits them.

[Note: The bound of decoding]
A step decodes one token of each sequence. Of a layer it uses some experts; those that are remote and not in the bank
cross the link once, and the rest is as with all experts on the GPU. So no step is shorter than::

    bytes that missed / what a copy reaches over the link  +  the step with everything in the GPU's memory

of which the second is the roofline of its operations (roofline.py). That is the bound of docs/decode.md, but for a
GPU pass that is measured there. What is expected is longer by what was measured: small kernels, those of a MoE layer's
experts, `KERNELS`, and those of the rest of a layer, `REST`, and what passes reached of the bound, `OF_BOUND`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, NamedTuple

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.bank import bank_nbytes, bank_rows
from vmm_dwdp.layout.layer import Layer, describe_layer
from vmm_dwdp.layout.placement import HOST
from vmm_dwdp.memory.bank import MOST_COPIED
from vmm_dwdp.planning.caches import bank_policy, lanes, replay_decoding
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.memory import RankMemory, rank_memory
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.roofline import Batch, dense_layer_operations, total
from vmm_dwdp.planning.routing import RoutingTrace
from vmm_dwdp.planning.work import average_operations

# Both from benchmarks/results/bank-h100.json, passes of Qwen3-30B-A3B's experts in a CUDA graph, the link PCIe.
OF_BOUND: Final = 0.90  # the least that passes with a bank reached of their bound by the run's fastest copy
KERNELS: Final = 48e-6  # seconds of such a layer with its experts on the GPU beyond its roofline

# Whole steps of one sequence, everything on the GPU, beyond the roofline and that: 49 (fp8) and 62 us (mxfp4) a layer
# with Qwen3-30B-A3B's shapes, 117 with gpt-oss-120b's, in benchmarks/results/whole_model-*-h100.json.
REST: Final = 50e-6

Limit = Literal["the link to host memory", "the links to other GPUs", "the GPU"]


class Uses(NamedTuple):
    """Of a layer in one step of one rank, the means.

    Attributes:
        from_host, from_ranks: experts that are used and lie in host memory, or on another rank only.
        hits: of these, the share that is in the bank.
    """

    from_host: float
    from_ranks: float
    hits: float


@dataclass(frozen=True)
class Decoding:
    """Steps of one rank, while all ranks of the group do the same. Times in seconds.

    Attributes:
        config: of the group; ``expert_bank`` is the bank's bytes.
        sequences: that each rank decodes together.
        context: tokens of each sequence in the KV cache.
        trace: recorded routing; ``None``: tokens choose evenly.
        link: bytes a second that a copy reaches over the link, where that is not the GPU's.

    Raises:
        ConfigError: the trace is of other numbers of experts, or of fewer sequences; or there is a bank that cannot
            serve such steps.
    """

    model: ModelSpec
    gpu: GpuSpec
    config: DWDPConfig
    sequences: int
    context: int = 0
    trace: RoutingTrace | None = None
    link: float | None = None

    def __post_init__(self) -> None:
        model, trace = self.model, self.trace
        if self.sequences < 1 or self.context < 0:
            raise ConfigError(
                "a step of decoding needs a sequence at least, and its context has no fewer than 0 tokens"
            )
        if self.config.group_size > self.gpu.max_group:
            raise ConfigError(f"at most {self.gpu.max_group} {self.gpu.name} can read each other's memory")
        if trace is not None and (trace.num_experts, trace.top_k) != (model.num_experts, model.top_k):
            raise ConfigError(
                f"the trace is of layers of {trace.num_experts} experts, {trace.top_k} a token, and {model.name} has "
                f"{model.num_experts} and {model.top_k}: record this model's routing, or state no trace"
            )
        if trace is not None and len(trace.kinds) < self.sequences:
            raise ConfigError(
                f"the trace has {len(trace.kinds)} sequences, fewer than {self.sequences} decoded together"
            )
        if self.link is not None and len(self._remote_to(0)) > 1:
            raise ConfigError("one link is stated, but experts are both on other GPUs and in host memory")
        if self.config.expert_bank and self.sequences > MOST_COPIED:
            raise ConfigError(f"a pass of more than {MOST_COPIED} tokens brings no expert into the bank")
        if self.config.expert_bank and self.rows < min(model.top_k, self._layer(0).num_remote):
            raise ConfigError(
                f"the bank has room for {self.rows} experts of each layer, and a token uses {model.top_k}: it needs "
                f"{bank_nbytes(self._layers(0), model.top_k)} bytes at least"
            )

    @cached_property
    def rows(self) -> int:
        """Of the bank of a layer."""
        return bank_rows(self._layers(0), self.config.expert_bank)[0]

    @cached_property
    def bank_nbytes(self) -> int:
        """Of the GPU's memory, that the banks of all layers take."""
        return bank_nbytes(self._layers(0), self.rows)

    @cached_property
    def memory(self) -> RankMemory:
        """Without the bank."""
        return rank_memory(self.model, self.gpu, self.config, self.sequences)

    @property
    def left(self) -> int:
        """Bytes of a GPU for the KV cache of all sequences; negative if model and bank do not fit."""
        return self.memory.left - self.bank_nbytes

    def require_fit(self) -> None:
        """Raise `ConfigError` if model, bank and context do not fit into a GPU's memory."""
        wanted = self.sequences * self.context * self.memory.kv_bytes_per_token
        if self.left < wanted:
            gib = 1 << 30
            raise ConfigError(
                f"{self.model.name} does not fit on {self.gpu.name}: {(wanted - self.left) / gib:.1f} GiB more than it "
                f"has, with {self.bank_nbytes / gib:.1f} GiB of bank and {wanted / gib:.1f} GiB of KV cache"
            )

    @cached_property
    def uses(self) -> Uses:
        """Of the rank for which most crosses its link."""
        size = self.config.group_size
        ranks = sorted({0, size // 2, size - 1})  # which hold the first experts, the last, and some between
        return max(map(self._uses, ranks), key=lambda uses: (uses.from_host + uses.from_ranks) * (1 - uses.hits))

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        return self.model.layer_expert_bytes // self.model.num_experts

    @property
    def missed_bytes(self) -> float:
        """That cross the links in a step, the mean."""
        uses = self.uses
        return self._missed(uses.from_host + uses.from_ranks)

    @cached_property
    def gpu_seconds(self) -> float:
        """A step with everything in the GPU's memory, by its roofline."""
        batch = Batch.of(self.sequences, 1)
        layers = len(self.model.moe_layers) * total(average_operations(self.model, self.gpu, batch))
        dense = self.model.num_layers - len(self.model.moe_layers)
        layers += dense * total(dense_layer_operations(self.model, self.gpu, batch))
        cached = self.sequences * self.context * self.model.kv_bytes_per_token
        head = self.model.vocabulary * self.model.hidden * 2  # in bf16, read once for all sequences
        return layers + (cached + head) / (self.gpu.memory_bandwidth * self.gpu.efficiency.memory)

    @cached_property
    def link_seconds(self) -> dict[Limit, float]:
        """What missed takes over each link, with nothing else in a step. Links work side by side."""
        host = min(self.gpu.host_rate, self.gpu.host_limit_rate / self.config.group_size)
        return {
            "the link to host memory": self._missed(self.uses.from_host) / (self.link or host),
            "the links to other GPUs": self._missed(self.uses.from_ranks) / (self.link or self.gpu.pull_rate),
        }

    @property
    def bound_seconds(self) -> float:
        """No step is shorter; see [Note: The bound of decoding]."""
        return max(self.link_seconds.values()) + self.gpu_seconds

    @property
    def expected_seconds(self) -> float:
        return (self.bound_seconds + self.kernels_seconds) / OF_BOUND

    @property
    def kernels_seconds(self) -> float:
        """Of the small kernels of all layers, beyond the roofline."""
        return len(self.model.moe_layers) * KERNELS + self.model.num_layers * REST

    @property
    def limit(self) -> Limit:
        """What takes the greatest part of what is expected."""
        parts: dict[Limit, float] = {**self.link_seconds, "the GPU": self.gpu_seconds + self.kernels_seconds}
        return max(parts, key=lambda part: parts[part])

    def with_bank(self, nbytes: int) -> Decoding:
        """The same with a bank of so many bytes."""
        return replace(self, config=replace(self.config, expert_bank=nbytes))

    def bank_for(self, share: float) -> int:
        """Bytes of a bank with room for that share of each layer's experts, in whole experts and pages."""
        return bank_nbytes(self._layers(0), round(share * self.model.num_experts))

    def _missed(self, experts: float) -> float:
        return experts * (1 - self.uses.hits) * len(self.model.moe_layers) * self.expert_bytes

    def _layer(self, rank: int) -> Layer:
        return describe_layer(0, self.model.expert_weights, self.config, rank, self.gpu.granularity)

    def _layers(self, rank: int) -> Sequence[Layer]:
        return [self._layer(rank)] * len(self.model.moe_layers)

    def _remote_to(self, rank: int) -> dict[str, list[int]]:
        """Which experts ``rank`` does not hold, by what they are reached over."""
        placement = self._layer(rank).placement
        own, host = placement.experts(rank), placement.experts(HOST)
        remote = [expert for expert in range(placement.num_experts) if expert not in own]
        found = {"host": [e for e in remote if e in host], "ranks": [e for e in remote if e not in host]}
        return {link: experts for link, experts in found.items() if experts}

    def _uses(self, rank: int) -> Uses:
        remote = self._remote_to(rank)
        if self.trace is None:
            model = self.model
            chance = 1 - (1 - model.top_k / model.num_experts) ** self.sequences
            counts = {link: chance * len(experts) for link, experts in remote.items()}
            hits = self.rows / max(1, sum(map(len, remote.values())))
        else:
            trace = self.trace.mixed()
            prefill, decode = trace.used("prefill"), trace.used("decode")
            together = lanes(decode, self.sequences)
            counts = {link: float(together[..., experts].sum(-1).mean()) for link, experts in remote.items()}
            crossing = sorted(itertools.chain(*remote.values()))
            hits = 0.0
            if self.rows:
                remote_only = prefill[..., crossing], decode[..., crossing]
                found = replay_decoding(*remote_only, self.rows, bank_policy, self.sequences)
                hits = found.share()
        return Uses(counts.get("host", 0.0), counts.get("ranks", 0.0), hits)

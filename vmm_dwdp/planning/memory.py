"""What a rank of a group allocates, by the runtime's own layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.layout.layer import Layer, describe_layer
from vmm_dwdp.layout.placement import HOST, Owner
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.roofline import ACTIVATION

CONTEXT: Final = 1 << 30  # bytes for a CUDA context, its libraries' workspaces and torch's caches: an assumption


@dataclass(frozen=True)
class ExpertMemory:
    """Physical bytes that the runtime of one rank takes.

    Attributes:
        resident: shards of all layers, whole pages; ``edges`` and ``padding`` are parts of it: bytes of neighbours'
            experts on shared pages, and bytes that belong to no expert.
        staged: the slots.
        host: the node's pool of host memory, on the rank that creates it.
    """

    resident: int
    edges: int
    padding: int
    staged: int
    host: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the GPU of the rank that needs most.

    Attributes:
        replicated: attention, dense layers, shared experts, routers and embeddings.
        activations: of a forward pass, as torch holds them at the widest place, the grouped GEMM.
        available: what the GPU has.
        kv_bytes_per_token: of the KV cache.
    """

    replicated: int
    experts: ExpertMemory
    activations: int
    available: int
    kv_bytes_per_token: int

    @property
    def needed(self) -> int:
        """Bytes without any KV cache."""
        return self.replicated + self.experts.resident + self.experts.staged + self.activations + CONTEXT

    @property
    def left(self) -> int:
        """Bytes for the KV cache; negative if the model does not fit."""
        return self.available - self.needed

    @property
    def kv_tokens(self) -> int:
        return max(0, self.left) // self.kv_bytes_per_token


def expert_memory(layer: Layer, num_layers: int, rank: Owner, prefetch_depth: int) -> ExpertMemory:
    """The memory of ``num_layers`` layers like ``layer``, one page size for all of it."""
    resident = staged = own = host = 0
    for layout in layer.layouts.values():
        resident += len(layout.resident_bytes(rank))
        own += len(layout.shard_bytes(rank))
        staged += sum(map(len, layout.staged_bytes(rank)))
        host += len(layout.resident_bytes(HOST))
    edges = sum(len(edge.bytes) for edge in layer.plan.edges)
    return ExpertMemory(
        resident=num_layers * resident,
        edges=num_layers * edges,
        padding=num_layers * (resident - own - edges),
        staged=min(prefetch_depth, num_layers) * staged,
        host=num_layers * host,
    )


def rank_memory(model: ModelSpec, gpu: GpuSpec, config: DWDPConfig, tokens: int) -> RankMemory:
    """The memory of the rank that needs most, for forward passes of ``tokens``."""
    num_layers = len(model.moe_layers)
    ranks = range(config.group_size)
    layers = {rank: describe_layer(0, model.expert_weights, config, rank, gpu.granularity) for rank in ranks}
    experts = [expert_memory(layer, num_layers, rank, config.prefetch_depth) for rank, layer in layers.items()]
    routed = tokens * model.top_k * (model.hidden + 2 * model.expert_intermediate) * 2 * ACTIVATION
    return RankMemory(
        replicated=model.replicated_bytes,
        experts=max(experts, key=lambda memory: memory.resident + memory.staged),
        activations=routed,
        available=int(gpu.memory_bytes),
        kv_bytes_per_token=model.kv_bytes_per_token,
    )

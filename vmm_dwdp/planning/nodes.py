"""Nodes joined by a network: what tokens and their sums take on it, where each node owns a part of the experts.

Of N nodes of G ranks each, a rank's group spreads E/N experts instead of E over G ranks instead of N G. So a layer's
fetch has (1 - 1/G) E/N experts, and one group of all N G ranks would fetch (1 - 1/(N G)) E: N (1 - 1/(N G)) / (1 - 1/G)
times as many, 3.0 for 2 x 2 and 2.3 for 2 x 4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import comb
from typing import Final

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.nodes import NodeShare
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.roofline import ACTIVATION, Operation, all_to_all


@dataclass(frozen=True)
class Network:
    """``rate``: bytes a second that each GPU reaches to other nodes and, at the same time, from them."""

    name: str
    rate: float

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"a network moves more than 0 bytes a second, not {self.rate:g}")


NDR: Final = Network("a 400 Gb/s InfiniBand port for each GPU, as DeepEP's README states of two nodes", 43e9)


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes with as many ranks each."""

    count: int = 1
    network: Network = field(default=NDR)

    def share(self, model: ModelSpec) -> ModelSpec:
        """``model`` with the experts of the node that owns most."""
        share = NodeShare(model.num_experts, self.count)
        if share.num_experts < share.num_nodes:
            raise ConfigError(f"{model.name} has {share.num_experts} experts, fewer than {self.count} nodes")
        return dataclasses.replace(model, num_experts=max(len(share.experts(node)) for node in range(self.count)))

    def visits(self, model: ModelSpec) -> float:
        """To how many nodes a token goes, the mean: those that own at least one of its ``k`` different experts.

        Of E experts of which a node owns s, none of k that are drawn without preference is there with the chance
        C(E - s, k) / C(E, k).
        """
        share, top_k = NodeShare(model.num_experts, self.count), model.top_k
        owned = [len(share.experts(node)) for node in range(self.count)]
        return sum(1 - comb(share.num_experts - s, top_k) / comb(share.num_experts, top_k) for s in owned)

    def sent_bytes(self, model: ModelSpec, tokens: float) -> float:
        """What a rank with ``tokens`` sends to other nodes for a layer, in bf16; as much comes back as sums."""
        return tokens * self.visits(model) * (self.count - 1) / self.count * model.hidden * ACTIVATION

    def exchanges(self, model: ModelSpec, tokens: int) -> tuple[list[Operation], list[Operation]]:
        """What is before all else of a layer, the sums of the layer before, and what is before its experts.

        Nothing for one node. Moves of rows within memory are left out, as they are of expert parallelism.
        """
        if self.count == 1:
            return [], []
        seconds = self.sent_bytes(model, tokens) / self.network.rate
        return [Operation("sums from nodes", "network", seconds)], [Operation("tokens to nodes", "network", seconds)]

    def expert_parallel_exchange(self, model: ModelSpec, gpu: GpuSpec, tokens: int, group_size: int) -> float:
        """Seconds of a layer in which expert parallelism over all ranks of all nodes moves tokens and results.

        In its favour: a token crosses to a node once (as DeepEP does), in the format of the experts' activations, and
        the network works beside the links within nodes.
        """
        within = all_to_all(model, gpu, tokens, group_size)
        if self.count == 1:
            return within
        both = (model.expert_format.activation_bytes + ACTIVATION) / ACTIVATION
        return max(within, self.sent_bytes(model, tokens) * both / self.network.rate)


ONE_NODE: Final = Nodes()

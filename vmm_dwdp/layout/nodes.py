"""Which node owns which experts, where a model is spread over several. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass

from vmm_dwdp.errors import ConfigError


@dataclass(frozen=True)
class NodeShare:
    """The experts of one layer, spread over nodes: node ``n`` owns those from ``floor(n * E / N)`` on.

    Within a node they are numbered from 0, and are the experts of an ordinary group: every rank of it sees them all.

        E = 10, N = 4     node 0   0 1
                          node 1       2 3 4
                          node 2             5 6
                          node 3                 7 8 9

    Attributes:
        num_experts: of the layer, on all nodes together.
        num_nodes: at least 1; of more nodes than experts, some own none.

    Raises:
        ConfigError: there are no nodes, or fewer than no experts.
    """

    num_experts: int
    num_nodes: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.num_experts < 0:
            raise ConfigError(f"{self.num_experts} experts cannot be spread over {self.num_nodes} nodes")

    def experts(self, node: int) -> range:
        """The run of experts that ``node`` owns; it may be empty."""
        if not 0 <= node < self.num_nodes:
            raise ConfigError(f"there is no node {node} of {self.num_nodes}")
        return range(node * self.num_experts // self.num_nodes, (node + 1) * self.num_experts // self.num_nodes)

    def locate(self, expert: int) -> tuple[int, int]:
        """The node that owns ``expert``, and its number there."""
        if not 0 <= expert < self.num_experts:
            raise ConfigError(f"there is no expert {expert} in a layer of {self.num_experts}")
        node = ((expert + 1) * self.num_nodes - 1) // self.num_experts
        return node, expert - self.experts(node).start

    @property
    def starts(self) -> list[int]:
        """The first expert of every node, and the number of experts after them."""
        return [self.experts(node).start for node in range(self.num_nodes)] + [self.num_experts]

"""Tokens to the nodes that own their experts, and partial sums back.

[Note: Rails]
With N nodes of G ranks, rank ``g`` of a node exchanges tokens with rank ``g`` of every other node, and with no other:
these N ranks are rail ``g``. Each node's ranks are a group that sees all of the node's experts, so any rank of it can
compute what the node is asked for.

    node 0   rank 0   rank 1   rank 2      a group: experts 0 ... E/N - 1
               |        |        |
             rail 0   rail 1   rail 2      tokens there, partial sums back
               |        |        |
    node 1   rank 0   rank 1   rank 2      a group: experts E/N ... 2E/N - 1

A token goes to a node once, however many of its experts are there, and the node returns one sum over them, each by its
weight. The sums are added in the order of the nodes. Ranks of one rail wait for each other, and no others: one without
tokens takes part with none.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple, Protocol

import torch
import torch.distributed as dist

from vmm_dwdp.errors import ConfigError, ExchangeError
from vmm_dwdp.layout.nodes import NodeShare

NOT_HERE: Final = -1  # in the place of an expert that another node owns
_LOOK: Final = timedelta(seconds=5)  # how long to wait for a word of a rank that may be gone
_TAG: Final = 0x0DED  # of such words


class Dispatched(NamedTuple):
    """What the experts of this node are to compute, and what `Rail.combine` needs.

    Attributes:
        hidden: ``[R, H]``: tokens from all nodes, in the order of the nodes, and of one node in its own order.
        experts: ``[R, K]``, int64: the token's experts by their numbers on this node; `NOT_HERE` for others.
        weights: ``[R, K]``: by which their results are multiplied; 0 for others.
        tokens: ``[S]``, int64: which of this rank's own tokens were sent, to node after node.
        sent: how many to each node; their sum is ``S``.
        received: how many came from each node; their sum is ``R``.
        num_tokens: ``T``: how many tokens this rank has.
    """

    hidden: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    sent: list[int]
    received: list[int]
    num_tokens: int


class Rail(Protocol):
    """One rank's way to the ranks of its place on the other nodes. See [Note: Rails]."""

    @property
    def node(self) -> int:
        """The node of this rank, from 0."""

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""

    def dispatch(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> Dispatched:
        """Send this rank's tokens to the nodes of their experts, and get those of the others.

        Args:
            hidden: ``[T, H]``; there may be no tokens.
            chosen: ``[T, K]``, whole numbers: each token's experts, as the whole layer numbers them, or -1 for none.
            weights: ``[T, K]``, floating point: by which their results are to be multiplied.
            num_experts: of the layer, on all nodes together: `NodeShare` says which node owns which.

        Raises `ExchangeError`, with the nodes whose rank is gone, if one is.
        """

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """``[T, H]``, in the dtype of ``partial``: for each of this rank's tokens the sum of what the nodes computed.

        Sums are added in float32, in the order of the nodes.

        Args:
            partial: ``[R, H]``: for each row of ``dispatched`` the sum over this node's experts.

        Raises `ExchangeError` as `dispatch` does.
        """


class TorchRail:
    """A `Rail` by torch.distributed's ``all_to_all_single``. The launching thread waits for the numbers of tokens.

    Args:
        group: the rail: rank ``n`` in it is of node ``n``, so it has as many ranks as there are nodes. It stays the
            caller's. Its timeout is how long a rank is waited for.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @property
    def node(self) -> int:
        """The node of this rank, from 0."""
        return self._group.rank()

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return self._group.size()

    def dispatch(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> Dispatched:
        """See `Rail.dispatch`."""
        self._require_fits(hidden, chosen, weights)
        starts = torch.tensor(NodeShare(num_experts, self.num_nodes).starts, device=chosen.device)
        nodes = torch.arange(self.num_nodes, device=chosen.device)
        owner = torch.bucketize(chosen, starts[1:], right=True)  # [T, K]
        there = (owner == nodes[:, None, None]) & (chosen >= 0)  # [N, T, K]
        node, tokens = there.any(-1).nonzero(as_tuple=True)  # [S] each, by node and then by token
        here = there[node, tokens]  # [S, K]
        experts = torch.where(here, chosen[tokens] - starts[node, None], NOT_HERE)
        counts = torch.bincount(node, minlength=len(nodes))
        received = self._exchange(counts, [1] * len(nodes), [1] * len(nodes)).tolist()
        sent = counts.tolist()
        return Dispatched(
            self._exchange(hidden[tokens], sent, received),
            self._exchange(experts, sent, received),
            self._exchange(torch.where(here, weights[tokens], 0), sent, received),
            tokens,
            sent,
            received,
            len(hidden),
        )

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Rail.combine`."""
        if len(partial) != sum(dispatched.received):
            raise ConfigError(f"partial sums of {len(partial)} tokens were given for {sum(dispatched.received)}")
        back = self._exchange(partial, dispatched.received, dispatched.sent)
        out = torch.zeros(dispatched.num_tokens, *partial.shape[1:], dtype=torch.float32, device=partial.device)
        by_node = (torch.split(each, dispatched.sent) for each in (back, dispatched.tokens))
        for sums, tokens in zip(*by_node, strict=True):
            out.index_add_(0, tokens, sums.float())  # each token at most once: there is one order
        return out.to(partial.dtype)

    def _require_fits(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        if chosen.shape != weights.shape or chosen.dim() != 2 or len(chosen) != len(hidden):
            shapes = ", ".join(str(tuple(each.shape)) for each in (hidden, chosen, weights))
            raise ConfigError(f"tokens, their experts and weights are [T, H], [T, K] and [T, K], not {shapes}")

    def _exchange(self, rows: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        """``rows``, so many to each node; so many of each node."""
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        try:
            dist.all_to_all_single(received, rows.contiguous(), receives, sends, group=self._group)
        except RuntimeError as error:
            gone = [f"node {node}" for node in self._gone(rows.device)]
            who = f"the rank of {' and of '.join(gone)} is gone" if gone else "a rank did not take part"
            raise ExchangeError(f"the rail of node {self._group.rank()} has failed: {who} ({error})") from error
        return received

    def _gone(self, device: torch.device) -> list[int]:
        """The nodes whose rank has left the rail, which is of no more use; where that shows, as with gloo.

        All that are left come here, and exchange a word with each other, so that none leaves before it was seen.
        """
        gone, words = set(), []
        for node in set(range(self._group.size())) - {self._group.rank()}:
            for start, end in ((dist.isend, "group_dst"), (dist.irecv, "group_src")):
                try:
                    work = start(torch.zeros(1, device=device), group=self._group, tag=_TAG, **{end: node})
                    words.append((node, work))
                except RuntimeError:
                    gone.add(node)
        for node, work in words:
            try:
                if work is not None:
                    work.wait(_LOOK)
            except RuntimeError as error:
                if "timed out" not in str(error).lower():  # which says nothing: it may be slow
                    gone.add(node)
        return sorted(gone)

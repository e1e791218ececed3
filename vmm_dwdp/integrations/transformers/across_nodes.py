"""Experts of a model over several nodes: an experts module computes for all nodes what this one owns.

A module's own forward pass is given one row for each pair of a token and an expert of this node, with one expert each,
so that no model's code has to know of experts that are elsewhere. Pairs are in the order in which the router chose: of
one choice each token has one at most, so that its results are added in one order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.transformers.experts import Compute, ExpertsModule
from vmm_dwdp.integrations.transformers.routing import Routed, routed_tokens
from vmm_dwdp.integrations.transformers.turns import Turns
from vmm_dwdp.layout.nodes import NodeShare
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.nodes.rail import NOT_HERE, Dispatched, Rail
from vmm_dwdp.runtime import DWDPRuntime


class NodesOfModel:
    """The nodes over which a model's experts are spread, as one rank sees them.

    Attributes:
        has_tokens: whether the pass that runs is of this rank's own tokens.
    """

    def __init__(self, rail: Rail) -> None:
        self.rail = rail
        self.has_tokens = True

    def own(self, layers: Sequence[Sequence[ExpertsModule]]) -> list[list[ExpertsModule]]:
        """``layers`` with what this node owns of them.

        Raises `ConfigError` if a node would own none, or a module is not told which tokens go to which experts.
        """
        return [[self._own(found) for found in sharing] for sharing in layers]

    def _own(self, experts: ExpertsModule) -> ExpertsModule:
        share = NodeShare(experts.num_experts, self.rail.num_nodes)
        if share.num_experts < share.num_nodes:
            raise ConfigError(f"{experts.path} has fewer experts than there are nodes: {share}")
        takes = inspect.signature(experts.module.forward).parameters.values()
        positional = sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in takes)
        if positional < 3 or experts.in_kernels:
            raise ConfigError(
                f"{experts.path} is not given each token's experts and their weights, so it cannot be spread over nodes"
            )
        here = share.experts(self.rail.node)
        weights = {name: WeightSpec(spec.of(len(here)), spec.dtype) for name, spec in experts.weights.items()}
        return replace(experts, weights=weights, first=here.start)

    def joiner(self, model: PreTrainedModel, turns: Turns) -> Callable[..., None]:
        """What `join_pass` calls: a pass of ``model`` in a turn of its own."""

        def join(**inputs: Any) -> None:
            self.has_tokens = False
            try:
                with torch.no_grad():
                    model(**inputs)
            finally:
                self.has_tokens = True

        return turns.taking(join)


def join_pass(model: PreTrainedModel, **inputs: Any) -> None:
    """Take part in a pass of the ranks of this rank's rail, without tokens of its own.

    With a rail every rank of it runs as many passes as the others, as each computes for all of them. One that has
    nothing to run calls this instead: the model runs on a dummy, of which nothing goes to experts.

    Args:
        model: from `from_pretrained` or `attach`, with a rail.
        inputs: the dummy, for the model's ``forward``; by default one token, of number 0.

    Raises:
        ConfigError: the model is not spread over nodes.
        ExchangeError: as a pass does: a rank of the rail is gone.
    """
    join = getattr(model, "dwdp_join", None)
    if join is None:
        raise ConfigError("the model is not spread over nodes: its passes are joined by nobody")
    join(**(inputs or {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}))


class NodeExperts:
    """One experts module, of which this node has the experts that `NodesOfModel.own` says.

    Args:
        experts: as the whole model has it.
        layer: of ``runtime``.
    """

    def __init__(self, nodes: NodesOfModel, experts: ExpertsModule, runtime: DWDPRuntime, layer: int) -> None:
        self._nodes = nodes
        self._num_experts = experts.num_experts
        self._path = experts.path
        self._runtime = runtime
        self._layer = layer

    def run(self, args: Any, kwargs: Any, compute: Compute) -> Tensor:
        """What the module returns for its arguments; ``compute`` is called once, for this node's experts."""
        hidden, chosen, weights = self._routed(args, kwargs)
        if not self._nodes.has_tokens:
            chosen = torch.full_like(chosen, NOT_HERE)
        rows = hidden.reshape(-1, hidden.shape[-1])
        with self._runtime.exchange(self._layer):
            there = self._nodes.rail.dispatch(rows, chosen, weights, self._num_experts)
        partial = _partial_sums(there, compute)
        with self._runtime.exchange(self._layer):
            return self._nodes.rail.combine(partial, there).reshape(hidden.shape)

    def _routed(self, args: Any, kwargs: Any) -> Routed:
        routed = routed_tokens(args, kwargs)
        if routed is not None:
            return routed
        raise ConfigError(f"{self._path} is given something else than tokens, their experts and their weights")


def _partial_sums(there: Dispatched, compute: Compute) -> Tensor:
    """``[R, H]``: of each row that came, over its experts on this node; added in float32."""
    here = (there.experts != NOT_HERE).T
    choice, row = here.nonzero(as_tuple=True)
    pairs = there.hidden[row], there.experts[row, choice, None], there.weights[row, choice, None]
    outputs = compute(pairs, {}, len(there.hidden), there.experts.shape[-1], there.experts)
    sums = torch.zeros(there.hidden.shape, dtype=torch.float32, device=there.hidden.device)
    counts = here.sum(1).tolist()
    for rows, found in zip(torch.split(row, counts), torch.split(outputs, counts), strict=True):
        sums.index_add_(0, rows, found.float())
    return sums.to(there.hidden.dtype)

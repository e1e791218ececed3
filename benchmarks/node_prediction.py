"""What the planner says of the stacks of `moe_stack` over nodes: ranks of rails that meet, simulated copy by copy."""

from __future__ import annotations

import random

from moe_stack import DTYPE, Stack
from stack_prediction import PASSES, around_experts, elementwise_rate, model_of, predict

from vmm_dwdp import DWDPConfig
from vmm_dwdp.planning.estimate import Estimate
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.nodes import Network, Nodes
from vmm_dwdp.planning.roofline import Batch, Operation, layer_operations
from vmm_dwdp.planning.simulator import Group, LayerWork, simulate
from vmm_dwdp.planning.work import layer_work, link_rates


def predict_nodes(stack: Stack, gpu: GpuSpec, shares: list[int], count: int) -> list[dict[str, float]]:
    """For each rank, node after node, milliseconds of a pass over ``count`` nodes, beside `predict`'s.

    Nodes of one machine: the network is as fast as the links.
    """
    size, model = len(shares) // count, model_of(stack)
    nodes = Nodes(count, Network("NVLink", gpu.exchange_rate(len(shares))))
    config = DWDPConfig(group_size=size)
    alone = Estimate(model, gpu, config, Batch.of(max(shares)), nodes=nodes)
    rails = [sum(shares[rank % size :: size]) for rank in range(len(shares))]
    works = [_work(stack, gpu, nodes, tokens, rail // count) for tokens, rail in zip(shares, rails, strict=True)]
    chance = random.Random(len(shares))
    group = Group(
        config=config,
        weights=alone.share.expert_weights,
        num_layers=stack.num_layers,
        granularity=gpu.granularity,
        rates=link_rates(gpu),
        start=[alone.prefetch_seconds * chance.random() for _ in shares],
        nodes=count,
    )
    ends = simulate(group, [[work] * PASSES for work in works]).pass_end
    others = predict(stack, gpu, shares)
    return [
        {"predicted over nodes ms": 1e3 * float(row[-1] - row[0]) / (PASSES - 1)} | other
        for row, other in zip(ends, others, strict=True)
    ]


def _work(stack: Stack, gpu: GpuSpec, nodes: Nodes, tokens: int, computed: int) -> LayerWork:
    """Of a rank with ``tokens`` of its own, whose experts compute as many rows as ``computed`` tokens have."""
    model = model_of(stack)
    dense, _ = around_experts(stack, gpu, tokens)
    summed, sent = nodes.exchanges(model, tokens)
    routed = computed * stack.top_k
    came = computed * nodes.visits(model)
    # Of a token that came: gathered and copied to its own node (two of each read and written), its sum written, and
    # added in float32 (read, and twice as much read and written). Of each routed row: gather, weigh and put in order
    # (a read and a write each), zeros, silu and product (five of I), the sum's read. Of a token: the sum after the
    # dense product.
    values = came * 10 * stack.hidden + routed * (8 * stack.hidden + 5 * stack.intermediate) + tokens * 4 * stack.hidden
    moved = Operation("rows", "memory", values * DTYPE.itemsize / elementwise_rate(gpu))
    share = nodes.share(model).num_experts
    (experts,) = (
        each for each in layer_operations(model, gpu, Batch.of(computed), experts=share) if each.kind == "grouped_gemm"
    )
    return layer_work([*summed, dense, moved, *sent, experts], gpu)

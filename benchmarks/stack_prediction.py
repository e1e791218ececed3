"""What the planner says of the stacks of `moe_stack`, on a GPU of which only a preset is known."""

from __future__ import annotations

import dataclasses
import random

from moe_stack import DTYPE, Stack

from vmm_dwdp import DWDPConfig
from vmm_dwdp.planning.estimate import Estimate, copy_seconds
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.models import ModelSpec, model_from_config
from vmm_dwdp.planning.roofline import Batch, Operation, all_to_all, layer_operations, total
from vmm_dwdp.planning.simulator import Group, simulate
from vmm_dwdp.planning.work import layer_work, link_rates

PASSES = 5  # of each rank, simulated


def predict(
    stack: Stack, gpu: GpuSpec, shares: list[int], slice_bytes: int | str = "auto", *, stops: bool = False
) -> list[dict[str, float]]:
    """For each rank, with so many tokens on each, milliseconds of a pass by each parallelism.

    DWDP: simulated, copy by copy, the ranks beginning at moments within a layer's copies; ``slice_bytes`` as in the
    config; with ``stops``, the host waits for the device between passes. Expert parallelism: every rank waits for the
    one with most tokens, while the experts see an even mix. Tensor parallelism: all tokens everywhere, and a ring.
    """
    size, model = len(shares), model_of(stack)
    dwdp = _dwdp(stack, model, gpu, shares, DWDPConfig(group_size=size, slice_bytes=slice_bytes), stops)  # type: ignore[arg-type]
    mean, most = sum(shares) // size, max(shares)
    sorted_again = 4 * stack.top_k * mean * stack.hidden * DTYPE.itemsize / elementwise_rate(gpu)
    expert_parallel = (
        total(around_experts(stack, gpu, most))
        + sorted_again
        + _experts(model, gpu, mean, held=stack.num_experts // size).seconds
        + all_to_all(model, gpu, most, size)
    )
    part = dataclasses.replace(stack, intermediate=stack.intermediate // size)
    ring = 2 * (size - 1) / size * sum(shares) * stack.hidden * DTYPE.itemsize / gpu.exchange_rate(size)
    tensor_parallel = (
        total(around_experts(part, gpu, sum(shares))) + _experts(model_of(part), gpu, sum(shares)).seconds + ring
    )
    milliseconds = 1e3 * stack.num_layers
    return [
        {
            "predicted dwdp staged ms": 1e3 * seconds,
            "predicted expert parallel ms": milliseconds * expert_parallel,
            "predicted tensor parallel ms": milliseconds * tensor_parallel,
        }
        for seconds in dwdp
    ]


def _dwdp(
    stack: Stack, model: ModelSpec, gpu: GpuSpec, shares: list[int], config: DWDPConfig, stops: bool
) -> list[float]:
    """By rank, seconds of a pass, the mean of all but the first."""
    alone = copy_seconds(Estimate(model, gpu, config, Batch.of(max(shares))).plan, gpu)
    chance = random.Random(len(shares))
    group = Group(
        config=config,
        weights=model.expert_weights,
        num_layers=stack.num_layers,
        granularity=gpu.granularity,
        rates=link_rates(gpu),
        start=[alone * chance.random() for _ in shares],
        stops=stops,
    )
    works = [layer_work([*around_experts(stack, gpu, n), _experts(model, gpu, n)], gpu) for n in shares]
    ends = simulate(group, [[work] * PASSES for work in works]).pass_end
    return [float(row[-1] - row[0]) / (PASSES - 1) for row in ends]


def model_of(stack: Stack) -> ModelSpec:
    config = {
        "num_hidden_layers": stack.num_layers, "hidden_size": stack.hidden, "num_experts": stack.num_experts,
        "num_experts_per_tok": stack.top_k, "moe_intermediate_size": stack.intermediate,
        "intermediate_size": stack.intermediate, "vocab_size": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": stack.hidden,
    }  # fmt: skip
    return model_from_config(stack.name, config)


def around_experts(stack: Stack, gpu: GpuSpec, tokens: int) -> list[Operation]:
    """The dense product that stands for attention, and what moves or changes rows one by one."""
    flops = stack.attention_flops_per_token * tokens
    width = stack.attention_flops_per_token // (2 * stack.hidden)
    operands = (tokens * (stack.hidden + width) + stack.hidden * width) * DTYPE.itemsize
    product = max(
        flops / (gpu.peak("bf16") * gpu.efficiency.dense_gemm),
        operands / (gpu.memory_bandwidth * gpu.efficiency.memory),
    )
    # Of each routed row: gather, and put back in order (a read and a write each), silu and product (five of I), the
    # mean's read. Of each token: the mean's write, and the sum after the dense product (two reads, a write).
    values = tokens * (stack.top_k * (5 * stack.hidden + 5 * stack.intermediate) + 4 * stack.hidden)
    moved = values * DTYPE.itemsize / elementwise_rate(gpu)
    return [Operation("dense", "dense_gemm", product), Operation("rows", "memory", moved)]


def elementwise_rate(gpu: GpuSpec) -> float:
    return gpu.memory_bandwidth * gpu.efficiency.elementwise


def _experts(model: ModelSpec, gpu: GpuSpec, tokens: int, held: int | None = None) -> Operation:
    operations = layer_operations(model, gpu, Batch.of(tokens), experts=held)
    return next(operation for operation in operations if operation.kind == "grouped_gemm")

"""A layer's operations as the simulator takes them: in order, with what copies cost each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.links import Rates
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.roofline import Batch, Kind, Operation, layer_operations
from vmm_dwdp.planning.simulator import LayerWork, Phase

# How much longer a matrix product takes, for each share of the memory's bandwidth that copies take: measured on an
# H100, where F.grouped_mm was 1 % slower beside copies of 54 GB/s, of 3.35 TB/s.
GEMM_SENSITIVITY: Final = 0.01 / (54 / 3350)


def average_operations(model: ModelSpec, gpu: GpuSpec, batch: Batch, experts: int | None = None) -> list[Operation]:
    """The operations of a mean MoE layer: layers with and without a sliding window, by their number."""
    windows = [model.windows[layer] for layer in model.moe_layers]
    kinds = {w: layer_operations(model, gpu, batch, window=w, experts=experts) for w in set(windows)}
    return [
        Operation(same[0].name, same[0].kind, sum(operation.seconds for operation in same) / len(same))
        for same in zip(*(kinds[window] for window in windows), strict=True)
    ]


def slowdown(kind: Kind, gpu: GpuSpec, *, from_host: bool) -> float:
    """How many times longer an operation takes while copies run.

    Where it was measured on this GPU, that holds. Else: what a rank pulls is written to its memory once, and in a group
    in which everyone pulls it is read from as fast; operations limited by memory are left the rest of the bandwidth
    that can be reached, and matrix products suffer by `GEMM_SENSITIVITY`.
    """
    if kind == "network":
        return 1.0
    if kind in gpu.copy_slowdown:
        return gpu.copy_slowdown[kind]
    traffic = gpu.host_rate if from_host else 2 * gpu.pull_rate
    if kind == "memory":
        return 1 / (1 - min(0.9, traffic / (gpu.memory_bandwidth * gpu.efficiency.memory)))
    return 1 + GEMM_SENSITIVITY * traffic / gpu.memory_bandwidth


def layer_work(operations: Sequence[Operation], gpu: GpuSpec, *, from_host: bool = False) -> LayerWork:
    """Everything up to the experts, and the experts; neighbours that copies slow alike are one phase."""
    before: list[Phase] = []
    experts: list[Phase] = []
    for operation in operations:
        phases = experts if operation.kind == "grouped_gemm" else before
        factor, meets = slowdown(operation.kind, gpu, from_host=from_host), operation.kind == "network"
        if phases and phases[-1].slowdown == factor and not meets and not phases[-1].meets:
            phases[-1] = Phase(phases[-1].seconds + operation.seconds, factor)
        else:
            phases.append(Phase(operation.seconds, factor, meets))
    return LayerWork(tuple(before), tuple(experts))


def link_rates(gpu: GpuSpec) -> Rates:
    """A group of this GPU; every rank has its own link to host memory."""
    link = gpu.efficiency.link * gpu.link_bandwidth
    pair = gpu.efficiency.link * (gpu.peer_bandwidth or gpu.link_bandwidth)
    return Rates(reader=link, owner=link, pair=pair, host_reader=gpu.host_rate, host=gpu.host_limit_rate)

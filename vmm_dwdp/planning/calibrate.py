"""What shares of its peaks this machine's GPU reaches, measured on the operations that `roofline` counts."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any, Final

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Access, Copy, Driver, Location
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack, Stream
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.gpus import Efficiency, GpuSpec
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.presets import preset_names
from vmm_dwdp.planning.roofline import ACTIVATION, Batch, layer_operations
from vmm_dwdp.planning.torch_layer import TorchLayer

TOKENS: Final = 8192
TOKENS_PER_EXPERT: Final = (16, 64, 256, 1024, 4096)
COPIED: Final = 256 << 20  # bytes
REPEATS: Final = 7
SUSTAINED: Final = 0.2  # seconds for which products run: at first, a GPU has clocks that it cannot keep


def preset_of(product: str) -> str:
    """The preset of the GPU that calls itself ``product``; raises `ConfigError` if there is none."""
    words = product.lower().replace("-", " ").split()
    found = [name for name in preset_names("gpus") if name in words]
    if not found:
        raise ConfigError(f"no preset is known to have the peaks of {product!r}; name one with --base")
    return found[0]


def calibrate(base: GpuSpec, model: ModelSpec, device: torch.device) -> GpuSpec:
    """``base`` with the efficiencies measured on ``device`` with the shapes of ``model``, whose experts are in bf16.

    The link to other GPUs keeps the efficiency of ``base`` where the machine has only one GPU.

    Raises:
        ConfigError: ``device`` is not a GPU, or the model's weights are not bf16.
    """
    if device.type != "cuda":
        raise ConfigError("calibration measures a GPU, and there is none here")
    perfect = dataclasses.replace(base, efficiency=Efficiency(**dict.fromkeys(_SHARES, 1.0)))
    half = max(1, TOKENS // 2)
    batch = Batch.of(2 * half, half)
    layer = TorchLayer(model, batch, device)
    ideal = {operation.name: operation for operation in layer_operations(model, perfect, batch)}
    hidden = layer.hidden
    query, key, value = layer.project(hidden)
    attended = layer.attend(query, key, value)
    routed = layer.gather(hidden)
    gate_up = torch.randn(len(routed), 2 * model.expert_intermediate, dtype=torch.bfloat16, device=device)

    def elementwise() -> None:
        layer.norm(layer.norm(hidden, hidden), hidden)
        layer.gather(hidden)
        layer.activate(gate_up)
        layer.combine(routed)

    seconds = {
        "projections": _time(lambda: (layer.project(hidden), layer.output(attended))),
        "attention": _time(lambda: layer.attend(query, key, value)),
        "elementwise": _time(elementwise),
        "memory": _time(lambda: torch.add(gate_up, 1)),
    }
    moved = 2 * gate_up.numel() * ACTIVATION
    grouped = {tokens: _grouped_gemm(model, perfect, tokens, device) for tokens in TOKENS_PER_EXPERT}
    driver = open_driver(device)
    shares = {
        "dense_gemm": (ideal["projections"].seconds + ideal["output projection"].seconds) / seconds["projections"],
        "attention": ideal["attention"].seconds / seconds["attention"],
        "elementwise": sum(ideal[name].seconds for name in ("norms", "routing", "combine")) / seconds["elementwise"],
        "memory": moved / seconds["memory"] / base.memory_bandwidth,
        "host": COPIED / _copy_from_host(driver) / base.host_bandwidth,
    }
    efficiency = Efficiency(
        grouped_gemm={float(tokens): round(min(1.0, share), 3) for tokens, share in grouped.items()},
        link=base.efficiency.link,
        **{name: round(min(1.0, share), 3) for name, share in shares.items()},
    )
    return dataclasses.replace(base, efficiency=efficiency)


_SHARES: Final = ("dense_gemm", "grouped_gemm", "attention", "memory", "elementwise", "link", "host")


def _grouped_gemm(model: ModelSpec, perfect: GpuSpec, tokens_per_expert: int, device: torch.device) -> float:
    """The share of the arithmetic peak that the two grouped products of a layer reach."""
    tokens = max(1, tokens_per_expert * model.num_experts // model.top_k)
    layer = TorchLayer(model, Batch.of(tokens), device)
    weights = {
        name: torch.randn(spec.shape, dtype=spec.dtype, device=device) for name, spec in model.expert_weights.items()
    }
    routed = layer.gather(layer.hidden)
    gate_up = layer.product(routed, weights["w13"])
    activated = layer.activate(gate_up)
    seconds = _time(lambda: (layer.product(routed, weights["w13"]), layer.product(activated, weights["w2"])))
    products = 3 * model.hidden * model.expert_intermediate * len(routed)
    return 2 * products / seconds / perfect.peak("bf16")


def _time(work: Callable[[], Any]) -> float:
    """Median seconds of ``work`` on the device, which has done it for `SUSTAINED` seconds."""
    work()
    repeats = max(REPEATS, int(SUSTAINED / statistics.median(_spans(work, 3))))
    return statistics.median(_spans(work, repeats)[repeats // 2 :])


def _spans(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of so many repetitions, one right after another."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    ends[0].record()
    for end in ends[1:]:
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(ends)]


def _copy_from_host(driver: Driver) -> float:
    """Median seconds of one copy of `COPIED` bytes from host memory."""
    ledger = Ledger()
    with ResourceStack() as stack:
        addresses = []
        for location in (Location(), Location(driver.numa_node)):
            memory = stack.push(Allocation.create(driver, ledger, COPIED, location))
            mapped = stack.push(Reservation(driver, ledger, COPIED))
            mapped.map(0, memory)
            mapped.set_access(0, COPIED, Access.READ_WRITE)
            addresses.append(mapped.address)
        stream = stack.push(Stream(driver, ledger)).stream
        copies = driver.prepare([Copy(addresses[0], addresses[1], COPIED)])
        events = [driver.create_event(timed=True) for _ in range(REPEATS + 1)]
        for event in events:
            driver.record(event, stream)
            driver.copy(copies, stream)
        driver.synchronize(stream)
        spans = [driver.elapsed(start, end) for start, end in itertools.pairwise(events)]
        for event in events:
            driver.destroy_event(event)
    return statistics.median(spans)

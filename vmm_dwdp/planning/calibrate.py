"""What shares of its peaks this machine's GPU reaches, measured on the operations that `roofline` counts."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Access, Address, Copy, Driver, Location
from vmm_dwdp.allocator.handles import Allocation, Event, Ledger, Reservation, ResourceStack, Stream
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.gpus import Efficiency, GpuSpec
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.presets import preset_names
from vmm_dwdp.planning.roofline import ACTIVATION, Batch, layer_operations
from vmm_dwdp.planning.torch_layer import TorchLayer

TOKENS: Final = 8192
REQUEST: Final = 4096  # tokens, where there are so many
TOKENS_PER_EXPERT: Final = (16, 64, 256, 1024, 4096)
MOST_TOKENS: Final = 32768  # whose activations take a few GiB
COPIED: Final = 256 << 20  # bytes
COPIES: Final = 50  # of which the median counts
REPEATS: Final = 7
AHEAD: Final = 3  # repetitions that the device is given before it has done the first of them
SUSTAINED: Final = 0.6  # seconds of work, of which the second half counts: at first, a GPU has clocks it cannot keep


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
    driver = open_driver(device)
    with driver.current():  # whose stream events are recorded on
        return _calibrated(base, model, driver)


def _calibrated(base: GpuSpec, model: ModelSpec, driver: Driver) -> GpuSpec:
    device = driver.device
    perfect = dataclasses.replace(base, efficiency=Efficiency(**dict.fromkeys(_SHARES, 1.0)))
    weights = {
        name: torch.randn(spec.shape, dtype=spec.dtype, device=device).mul_(spec.shape[-1] ** -0.5)
        for name, spec in model.expert_weights.items()
    }
    grouped: dict[float, float] = {}
    shares: dict[str, float] = {}
    wanted = (max(1, each * model.num_experts // model.top_k) for each in TOKENS_PER_EXPERT)
    for tokens in dict.fromkeys((TOKENS, *(min(tokens, MOST_TOKENS) for tokens in wanted))):
        length = min(tokens, REQUEST)
        batch = Batch.of(tokens // length * length, length)
        found = _layer_shares(model, perfect, TorchLayer(model, batch, device), batch, weights)
        grouped[batch.tokens * model.top_k / model.num_experts] = found.pop("grouped_gemm")
        shares = shares or found
    shares |= {"memory": _memory_rate(device) / base.memory_bandwidth, "host": _host_rate(driver) / base.host_bandwidth}
    efficiency = Efficiency(
        grouped_gemm={tokens: round(min(1.0, share), 3) for tokens, share in sorted(grouped.items())},
        link=base.efficiency.link,
        **{name: round(min(1.0, share), 3) for name, share in shares.items()},
    )
    return dataclasses.replace(base, efficiency=efficiency)


Part = tuple[str, Callable[[Any], Any]]

_SHARES: Final = ("dense_gemm", "grouped_gemm", "attention", "memory", "elementwise", "link", "host")


def _layer_shares(
    model: ModelSpec, perfect: GpuSpec, layer: TorchLayer, batch: Batch, weights: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """By efficiency, the ideal time of a layer's operations over the time they take in layer after layer.

    Not one by one: the clocks that a GPU keeps within its power depend on what runs before and after, and so does what
    is found in its caches.
    """

    parts: list[Part] = [
        ("elementwise", lambda hidden: layer.norm(hidden, hidden)),
        ("dense_gemm", layer.project),
        ("attention", lambda projected: layer.attend(*projected)),
        ("dense_gemm", layer.output),
        ("elementwise", lambda attended: layer.gather(layer.norm(attended, layer.hidden))),
        ("grouped_gemm", lambda routed: layer.product(routed, weights["w13"])),
        ("elementwise", layer.activate),
        ("grouped_gemm", lambda activated: layer.product(activated, weights["w2"])),
        ("elementwise", layer.combine),
    ]
    seconds = settled(sustained(parts, layer.hidden))
    ideal = dict.fromkeys(seconds, 0.0)
    for operation in layer_operations(model, perfect, batch):
        ideal["elementwise" if operation.kind == "memory" else operation.kind] += operation.seconds
    products = batch.tokens * model.top_k * 3 * model.hidden * model.expert_intermediate
    ideal["grouped_gemm"] = 2 * products / perfect.peak("bf16")  # whatever bounds them: a share of the arithmetic peak
    return {kind: ideal[kind] / seconds[kind] for kind in seconds}


def sustained(parts: Sequence[Part], given: torch.Tensor) -> list[Mapping[str, float]]:
    """Seconds that ``parts`` take on the device, by name, in one repetition after another, for `SUSTAINED` seconds.

    Args:
        parts: each is called with what the one before it gave, the first with ``given``, and its result is kept no
            longer than that; parts of one name are added up.
    """

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    begin = last = mark()
    marks: list[list[tuple[str, torch.cuda.Event]]] = []
    while len(marks) < REPEATS or begin.elapsed_time(marks[-AHEAD][-1][1]) < SUSTAINED * 1e3:
        value: Any = given
        marks.append([])
        for name, part in parts:
            value = part(value)
            marks[-1].append((name, mark()))
        if len(marks) >= AHEAD:
            marks[-AHEAD][-1][1].synchronize()
    torch.cuda.synchronize()
    spans: list[Mapping[str, float]] = []
    for repetition in marks:
        span: dict[str, float] = {}
        for name, end in repetition:
            span[name] = span.get(name, 0.0) + last.elapsed_time(end) / 1e3
            last = end
        spans.append(span)
    return spans


def settled(spans: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each part in the second half of repetitions."""
    latter = spans[len(spans) // 2 :]
    return {name: statistics.median(span[name] for span in latter) for name in latter[0]}


def _memory_rate(device: torch.device) -> float:
    """Bytes a second that an elementwise kernel reads and writes."""
    values = torch.ones(COPIED // ACTIVATION, dtype=torch.bfloat16, device=device)
    return 2 * COPIED / settled(sustained([("add", lambda values: torch.add(values, 1))], values))["add"]


def _host_rate(driver: Driver) -> float:
    """Bytes a second that copies from host memory reach, the median."""
    ledger = Ledger()
    with ResourceStack() as stack:
        addresses = [
            mapped(stack, driver, ledger, COPIED, location) for location in (Location(), Location(driver.numa_node))
        ]
        stream = stack.push(Stream(driver, ledger)).stream
        copies = driver.prepare([Copy(addresses[0], addresses[1], COPIED)])
        events = [stack.push(Event(driver, ledger, timed=True)).event for _ in range(COPIES + 1)]
        for event in events:
            driver.record(event, stream)
            driver.copy(copies, stream)
        driver.synchronize(stream)
        spans = [driver.elapsed(start, end) for start, end in itertools.pairwise(events)]
    return COPIED / statistics.median(spans)


def mapped(stack: ResourceStack, driver: Driver, ledger: Ledger, nbytes: int, location: Location) -> Address:
    """The address of so much new memory there, whole pages, which ``stack`` frees."""
    memory = stack.push(Allocation.create(driver, ledger, nbytes, location))
    range_ = stack.push(Reservation(driver, ledger, nbytes))
    range_.map(0, memory)
    range_.set_access(0, nbytes, Access.READ_WRITE)
    return range_.address

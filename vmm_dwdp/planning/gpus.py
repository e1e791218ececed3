"""What a plan needs to know of a GPU: its limits from the datasheet, and how much of them software reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.presets import load_preset, read_mapping


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of a peak rate that is reached, more than 0 and at most 1.

    The defaults are assumptions for a GPU on which nobody has measured; ``vmm-dwdp bench --calibrate`` measures.

    Attributes:
        dense_gemm, grouped_gemm, attention: of the arithmetic peak; ``grouped_gemm`` may be one number, or several by
            tokens per expert, between which it is interpolated.
        memory: of the memory's bandwidth. ``elementwise``: of it, by norms, activations and the moves of routing.
        link, host: of the links to other GPUs and to host memory, by the copy engine.
    """

    dense_gemm: float = 0.70
    grouped_gemm: float | Mapping[float, float] = 0.50
    attention: float = 0.60
    memory: float = 0.85
    elementwise: float = 0.70
    link: float = 0.85
    host: float = 0.84

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            for share in value.values() if isinstance(value, Mapping) else (value,):
                if not 0 < share <= 1:
                    raise ConfigError(f"efficiency.{name} must be more than 0 and at most 1, not {share}")

    def grouped_gemm_at(self, tokens_per_expert: float) -> float:
        """`grouped_gemm` for experts with so many tokens each; over logarithms, and constant beyond the ends."""
        if not isinstance(self.grouped_gemm, Mapping):
            return self.grouped_gemm
        known = sorted(self.grouped_gemm)
        shares = [self.grouped_gemm[tokens] for tokens in known]
        return float(np.interp(np.log(max(tokens_per_expert, 1e-9)), np.log(known), shares))


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU and its place in a machine. Rates are per second, for one direction of a link.

    Attributes:
        memory_bytes: what may be allocated. ``memory_bandwidth``: bytes.
        peak_flops: dense matrix products, by arithmetic: ``bf16``, and ``fp8``, ``fp4`` where the GPU has them.
        link_bandwidth: bytes to and from all other GPUs of a group together.
        peer_bandwidth: bytes from one other GPU; ``None`` with a switch, where it is all of ``link_bandwidth``.
        host_bandwidth: bytes from host memory to one GPU.
        host_memory_bandwidth: bytes from host memory to all GPUs of the machine together.
        max_group: how many GPUs can read each other's memory.
        granularity: bytes per page of virtual memory.
        copy_slowdown: how many times longer an operation of some kind takes while copies run, where it was measured.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    link_bandwidth: float
    host_bandwidth: float
    max_group: int
    peer_bandwidth: float | None = None
    host_memory_bandwidth: float = 614.4e9  # two sockets with eight channels of DDR5-4800
    granularity: int = 2 << 20
    copy_slowdown: Mapping[str, float] = field(default_factory=dict)
    efficiency: Efficiency = field(default_factory=Efficiency)

    def peak(self, arithmetic: str) -> float:
        """Peak rate of products in ``arithmetic``; bf16's where the GPU lacks it, for such weights are widened."""
        return self.peak_flops.get(arithmetic, self.peak_flops["bf16"])

    @property
    def pull_rate(self) -> float:
        """Bytes a second that a GPU reads from the others with nobody else there."""
        return self.efficiency.link * self.link_bandwidth

    @property
    def host_rate(self) -> float:
        """Bytes a second that one copy engine reads from host memory."""
        return self.efficiency.host * self.host_bandwidth

    @property
    def host_limit_rate(self) -> float:
        """Bytes a second that host memory gives to all GPUs together."""
        return self.efficiency.host * self.host_memory_bandwidth

    def exchange_rate(self, group_size: int) -> float:
        """Bytes a second that a GPU sends to all others of a group together, as an all-to-all does."""
        links = self.link_bandwidth if self.peer_bandwidth is None else self.peer_bandwidth * max(1, group_size - 1)
        return self.efficiency.link * min(self.link_bandwidth, links)


def load_gpu(name: str) -> GpuSpec:
    """A preset's name or a YAML file with the fields of `GpuSpec`; raises `ConfigError` if it is neither."""
    values = read_mapping(name) if Path(name).is_file() else load_preset("gpus", name)
    return gpu_from_dict(values)


def write_gpu(gpu: GpuSpec, path: str | PathLike[str], sources: Mapping[str, str]) -> None:
    """Write what `load_gpu` reads, with the source of some of the numbers."""
    values = {"sources": dict(sources), **dataclasses.asdict(gpu)}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def gpu_from_dict(values: Mapping[str, Any]) -> GpuSpec:
    """The GPU that ``values`` states, ``sources`` left out; raises `ConfigError` for an unknown or missing key."""
    stated = {key: value for key, value in values.items() if key != "sources"}
    fields = {item.name: item for item in dataclasses.fields(GpuSpec)}
    for key in stated:
        if key not in fields:
            raise ConfigError(f"unknown key {key!r} in the GPU; known keys are {', '.join(fields)}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in stated:
            raise ConfigError(f"the GPU states no {name}")
    for name in stated.keys() - {"name", "efficiency"}:
        _require_numbers(name, stated[name])
    if not isinstance(stated["peak_flops"], Mapping) or "bf16" not in stated["peak_flops"]:
        raise ConfigError("the GPU's peak_flops must state bf16")
    try:
        stated["efficiency"] = Efficiency(**(stated.get("efficiency") or {}))
    except TypeError as error:
        raise ConfigError(f"the GPU's efficiency is not one: {error}") from error
    return GpuSpec(**stated)


def _require_numbers(name: str, value: object) -> None:
    """Raise `ConfigError` unless it is a number above 0, a mapping to such, or nothing."""
    for number in value.values() if isinstance(value, Mapping) else (value,):
        if number is not None and not (isinstance(number, int | float) and number > 0):
            raise ConfigError(
                f"{name} of the GPU must be more than 0, not {number!r}; YAML takes 80.0e+9 for a number, and 80e9 not"
            )

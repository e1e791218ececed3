"""What a user states about a group: one frozen dataclass, in and out of YAML, every impossible value refused."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vmm_dwdp.errors import ConfigError

AssemblyKind = Literal["vmm", "tensor_list"]
Mode = Literal["staged", "in_place"]
ModeSetting = Literal[Mode, "auto"]

COPY_ALIGNMENT = 16  # bytes; the widest load of a kernel, and what keeps a copy engine at its full rate
LARGEST = 2**63 - 1  # of any number in a config

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZES = ("memory_bytes", "slice_bytes", "resident_cache", "expert_bank")


class _Loader(yaml.SafeLoader):
    """Without aliases, by which a few lines can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a config has no use for aliases")
        return super().compose_node(parent, index)


@dataclass(frozen=True, kw_only=True)
class DWDPConfig:
    """How the experts of every layer are spread over a group and fetched.

    All ranks of a group use equal configs; `publish` refuses a group in which they differ.

    Attributes:
        group_size: number of ranks that share one copy of the experts, at least 1.
        num_local_experts: experts that each rank holds of every layer; ``None`` is the least that covers them.
            More than that makes neighbours overlap, so that fewer bytes are fetched. ``"auto"`` is as many as fit into
            ``memory_bytes`` on every rank, and that least at any rate; ranks agree on it before they take memory.
        memory_bytes: how much of a device's memory a rank's experts may take with ``num_local_experts="auto"``: shards,
            slots and resident cache. ``None`` is half of what is free when ranks agree; on the CPU, whose memory they
            share, half of an equal part of it.
        prefetch_depth: number of slots, each with room for the remote experts of one layer; at least 1, or 0 with
            ``mode="in_place"``, which stages nothing.
        slice_bytes: how long a run of one owner's bytes may be before the copies turn to the next owner, a multiple of
            16 bytes. ``"streams"``: whole segments, a stream for each owner. ``"auto"``: where a rank pulls from two
            other ranks of this machine or more, each run is taken from the owner from which fewest others pull just
            then; elsewhere ``"streams"``.
        host_experts: the last experts of every layer live in host memory instead of on a rank.
        host_numa_node: the NUMA node of that memory; ``None`` is the one nearest to the device of rank 0.
        assembly: ``"vmm"``: one tensor ``[E, ...]`` per weight, by virtual memory management.
            ``"tensor_list"``: a list of tensors per weight, on machines without it.
        mode: how `acquire` gives a layer if it is not told. ``"staged"``: all remote experts are copied into a slot
            first. ``"in_place"``: kernels read the owners' own pages, so that only the experts that they touch cross
            the link. ``"auto"``: for each pass what is faster for its number of tokens. With these two, either mode
            can be asked for; with ``"staged"`` nothing is mapped for the other.
        resident_cache: bytes of the GPU's memory for copies of the remote experts that most tokens are routed to, which
            are then read there instead of over the link; 0 is none. No more than is remote is taken, in whole pages.
            Needs a ``mode`` that reads in place.
        expert_bank: bytes of the GPU's memory for banks of experts, one a layer, which `DWDPRuntime.look_up` fills on
            the device as they are used; 0 is none. As many experts of each layer as there is room for, in whole pages.
            Needs a ``mode`` that reads in place, and no ``resident_cache``.
        checksums: `publish` and `update` compute a checksum of every shard, for ``check_integrity(verify=True)``.
        movable_experts: `rebalance` may move experts from rank to rank, so that whoever computes has to map a router's
            choice by `logical_to_physical`. Needs a ``mode`` that reads in place.

    Raises:
        ConfigError: a value cannot be.
    """

    group_size: int
    num_local_experts: int | Literal["auto"] | None = None
    memory_bytes: int | None = None
    prefetch_depth: int = 2
    slice_bytes: int | Literal["auto", "streams"] = "auto"
    host_experts: int = 0
    host_numa_node: int | None = None
    assembly: AssemblyKind = "vmm"
    mode: ModeSetting = "staged"
    resident_cache: int = 0
    expert_bank: int = 0
    checksums: bool = False
    movable_experts: bool = False

    def __post_init__(self) -> None:
        self._require_int("group_size", self.group_size, least=1)
        if self.num_local_experts not in (None, "auto"):
            self._require_int("num_local_experts", self.num_local_experts, least=0)
        if self.memory_bytes is not None:
            self._require_int("memory_bytes", self.memory_bytes, least=1)
            if self.num_local_experts != "auto":
                raise ConfigError("memory_bytes needs num_local_experts: auto, which says what it is for")
        self._require_one_of("mode", self.mode, get_args(ModeSetting))
        self._require_int("prefetch_depth", self.prefetch_depth, least=0 if self.mode == "in_place" else 1)
        if self.slice_bytes not in ("auto", "streams"):
            self._require_int("slice_bytes", self.slice_bytes, least=COPY_ALIGNMENT)
            if self.slice_bytes % COPY_ALIGNMENT:
                raise ConfigError(f"slice_bytes must be a multiple of {COPY_ALIGNMENT}, not {self.slice_bytes}")
        self._require_int("host_experts", self.host_experts, least=0)
        if self.host_numa_node is not None:
            self._require_int("host_numa_node", self.host_numa_node, least=0)
        self._require_int("resident_cache", self.resident_cache, least=0)
        self._require_int("expert_bank", self.expert_bank, least=0)
        for name in "checksums", "movable_experts":
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {value!r}")
        self._require_one_of("assembly", self.assembly, get_args(AssemblyKind))
        if self.assembly == "tensor_list" and self.reads_in_place:
            raise ConfigError(f"mode: {self.mode} needs assembly: vmm, because it maps the owners' pages side by side")
        if self.resident_cache and not self.reads_in_place:
            raise ConfigError("resident_cache needs mode: in_place or auto, because staged weights are all read here")
        if self.expert_bank and not self.reads_in_place:
            raise ConfigError("expert_bank needs mode: in_place or auto, because staged weights are all read here")
        if self.expert_bank and self.resident_cache:
            raise ConfigError("expert_bank and resident_cache are for the same experts: state one of them")
        if self.expert_bank and self.movable_experts:
            raise ConfigError("expert_bank and movable_experts are not served together: state one of them")
        if self.movable_experts and not self.reads_in_place:
            raise ConfigError(
                "movable_experts needs mode: in_place or auto, because staged passes copy all experts alike"
            )
        if self.assembly == "tensor_list" and self.host_experts:
            raise ConfigError("host_experts needs assembly: vmm, because host memory is mapped page by page")

    @property
    def kept_on_device(self) -> int:
        """Bytes of a device's memory for copies of experts that are read in place."""
        return self.resident_cache + self.expert_bank

    @property
    def reads_in_place(self) -> bool:
        """Whether layers can be acquired in place."""
        return self.mode != "staged"

    @staticmethod
    def _require_int(name: str, value: object, *, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, not {reprlib.repr(value)}")
        if abs(value) > LARGEST:
            raise ConfigError(f"{name} must be at most {LARGEST}")
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")

    @staticmethod
    def _require_one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
        if value not in accepted:
            raise ConfigError(f"{name} must be one of {', '.join(accepted)}, not {reprlib.repr(value)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DWDPConfig:
        """The config that ``values`` states; raises `ConfigError` for an unknown key or a missing one.

        Sizes in bytes may have a unit: ``60 GB``, ``1.5 GiB``.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in values if key not in fields)
        if unknown:
            known = ", ".join(fields)
            raise ConfigError(f"unknown key {reprlib.repr(unknown[0])} in the config; known keys are {known}")
        if "group_size" not in values:
            raise ConfigError("the config states no group_size")
        return cls(**{name: in_bytes(value) if name in _SIZES else value for name, value in values.items()})

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> DWDPConfig:
        """Read a YAML mapping of this class's fields; raises `ConfigError` if it is not one or a value cannot be."""
        return cls.from_dict(read_mapping(path))

    def to_yaml(self, path: str | PathLike[str]) -> None:
        """Write every field, so that `from_yaml` gives an equal config."""
        Path(path).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def read_mapping(path: str | PathLike[str]) -> dict[Any, Any]:
    """What a file of YAML maps to what; raises `ConfigError` if it cannot be read or is no mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # PyYAML lets through whatever int, float, datetime and deep nesting raise
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the config {path} must be a mapping of keys to values")
    return values


def in_bytes(value: Any) -> Any:
    """A size that is written with a unit, such as ``60 GB``, as a number of bytes; anything else as it is."""
    found = (
        re.fullmatch(rf"(\d{{1,9}}(?:\.\d{{1,9}})?) ?({'|'.join(_UNITS)})", value) if isinstance(value, str) else None
    )
    return value if found is None else int(float(found[1]) * _UNITS[found[2]])

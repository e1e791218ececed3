"""What the environment says about SGLang's DWDP: whether this library takes part, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from vmm_dwdp.config import DWDPConfig, in_bytes, read_mapping
from vmm_dwdp.errors import ConfigError

DISABLE: Final = "VMM_DWDP_DISABLE"  # "1": SGLang's own DWDP runs
CONFIG: Final = "VMM_DWDP_CONFIG"  # path of a YAML file of `DWDPConfig`, with what `Stated` has besides

# Of ranks that share experts, unless the config says otherwise: engines prefill, which is best staged, and decode,
# which is not; and they begin a step of decoding before they take the results of a prefill (docs/several-gpus.md).
_MODE: Final = "auto"


@dataclass(frozen=True)
class Stated:
    """How the experts of an engine are to be spread.

    Attributes:
        config: of the group; ``num_local_experts`` may be ``"auto"`` still.
        spills: ``host_experts: auto``: what does not fit on the ranks goes to host memory.
        kv_cache: bytes of a GPU's memory that experts leave to the KV cache, instead of ``memory_bytes`` that they may
            take; ``None`` if nothing is said.
    """

    config: DWDPConfig
    spills: bool = False
    kv_cache: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether numbers of experts are to be found that fit."""
        return self.config.num_local_experts == "auto"


def disabled() -> bool:
    """Whether the user wants SGLang's own DWDP."""
    return os.environ.get(DISABLE) == "1"


def wanted(dwdp_size: int) -> bool:
    """Whether experts are to be spread at all: over the ranks of ``--dwdp-size``, or to host memory by a config."""
    return dwdp_size > 1 or CONFIG in os.environ


def stated(dwdp_size: int) -> Stated:
    """What is stated for this engine.

    Raises:
        ConfigError: the file cannot be read, or does not fit ``--dwdp-size``.
    """
    group_size = max(1, dwdp_size)
    path = os.environ.get(CONFIG)
    if path is None:
        return Stated(DWDPConfig(group_size=group_size, mode=_MODE))
    found = read(path)
    config = found.config
    if config.group_size != group_size:
        raise ConfigError(f"{path} states group_size {config.group_size}, but --dwdp-size is {group_size}")
    if config.assembly != "vmm":
        raise ConfigError(f"{path} states assembly: {config.assembly}, but SGLang's kernels need assembly: vmm")
    if config.resident_cache:
        raise ConfigError(f"{path} states resident_cache, but SGLang's layers do not tell which experts tokens use")
    if config.movable_experts:
        raise ConfigError(f"{path} states movable_experts, but SGLang's layers do not map what their routers choose")
    if group_size == 1 and not (config.host_experts or found.spills):
        raise ConfigError(f"{path} states group_size 1 and no host_experts, so there is nothing to spread")
    return found


def read(path: str) -> Stated:
    """What a file of YAML states, for an engine of any size. Raises `ConfigError` if it cannot be."""
    values: dict[Any, Any] = read_mapping(path)
    spills = values.get("host_experts") == "auto"
    if spills:
        if values.get("num_local_experts") not in (None, "auto"):
            raise ConfigError(f"{path} states host_experts: auto, which leaves no number to num_local_experts")
        values |= {"host_experts": 0, "num_local_experts": "auto"}
    kv_cache = in_bytes(values.pop("kv_cache", None))
    if (
        values.get("group_size", 1) != 1
        and values.get("prefetch_depth") != 0
        and values.get("assembly", "vmm") == "vmm"
    ):
        values.setdefault("mode", _MODE)
    config = DWDPConfig.from_dict(values)
    if kv_cache is not None:
        if not isinstance(kv_cache, int) or isinstance(kv_cache, bool) or kv_cache < 0:
            raise ConfigError(f"{path} states kv_cache: {kv_cache!r}, which is no size such as 40 GB")
        if config.num_local_experts != "auto" or config.memory_bytes is not None:
            instead = "num_local_experts: auto or host_experts: auto, and no memory_bytes"
            raise ConfigError(f"{path} states kv_cache, which needs {instead}")
    return Stated(config, spills, kv_cache)

"""What the environment says about SGLang's DWDP: whether this library takes part, and how."""

from __future__ import annotations

import os
from typing import Final

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError

DISABLE: Final = "VMM_DWDP_DISABLE"  # "1": SGLang's own DWDP runs
CONFIG: Final = "VMM_DWDP_CONFIG"  # path of a YAML file of `DWDPConfig`


def disabled() -> bool:
    """Whether the user wants SGLang's own DWDP."""
    return os.environ.get(DISABLE) == "1"


def wanted(dwdp_size: int) -> bool:
    """Whether experts are to be spread at all: over the ranks of ``--dwdp-size``, or to host memory by a config."""
    return dwdp_size > 1 or CONFIG in os.environ


def config(dwdp_size: int) -> DWDPConfig:
    """The config of this engine.

    Raises:
        ConfigError: the file cannot be read, or does not fit ``--dwdp-size``.
    """
    group_size = max(1, dwdp_size)
    path = os.environ.get(CONFIG)
    if path is None:
        return DWDPConfig(group_size=group_size)
    stated = DWDPConfig.from_yaml(path)
    if stated.group_size != group_size:
        raise ConfigError(f"{path} states group_size {stated.group_size}, but --dwdp-size is {group_size}")
    if stated.assembly != "vmm":
        raise ConfigError(f"{path} states assembly: {stated.assembly}, but SGLang's kernels need assembly: vmm")
    if stated.resident_cache:
        raise ConfigError(f"{path} states resident_cache, but SGLang's layers do not tell which experts tokens use")
    if stated.movable_experts:
        raise ConfigError(f"{path} states movable_experts, but SGLang's layers do not map what their routers choose")
    if stated.num_local_experts == "auto":
        raise ConfigError(f"{path} states num_local_experts: auto, but SGLang loads a layer before it knows the next")
    if group_size == 1 and not stated.host_experts:
        raise ConfigError(f"{path} states group_size 1 and no host_experts, so there is nothing to spread")
    if group_size > 1 and (stated.host_experts or stated.num_local_experts is not None):
        key = "host_experts" if stated.host_experts else "num_local_experts"
        raise ConfigError(
            f"{path} states {key}, but with --dwdp-size SGLang itself loads an equal share of the experts on every rank"
        )
    return stated

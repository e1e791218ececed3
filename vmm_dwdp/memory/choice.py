"""The assembly that a config asks for, with memory of a place and a kind that this machine has."""

from __future__ import annotations

from collections.abc import Sequence

from vmm_dwdp.allocator.driver import DEVICE, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.numa import numa_nodes
from vmm_dwdp.allocator.probe import refusal
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.assembly import Assembly
from vmm_dwdp.memory.sleep import SleepingAssembly
from vmm_dwdp.memory.tensor_list import TensorListAssembly


def make_assembly(
    config: DWDPConfig,
    rank: int,
    driver: Driver,
    ledger: Ledger,
    layers: Sequence[Layer],
    *,
    over_network: bool = False,
) -> Assembly:
    """The memory of rank ``rank``, of which nothing is taken yet; the caller closes it. ``layers`` may become more.

    Args:
        over_network: whether ranks hand it to each other over a network, to which descriptors cannot be given.

    Raises:
        ConfigError: the machine lacks what the config asks for; the sentence says what.
    """
    if config.assembly == "tensor_list":
        if over_network:
            raise ConfigError("assembly: tensor_list shares memory within one machine: ranks that meet by TCP need vmm")
        return TensorListAssembly(driver, ledger, rank, layers, config.prefetch_depth)
    host_location = _host_location(config, driver) if config.host_experts else DEVICE
    handle_type = None
    if config.group_size > 1:
        handle_type = HandleType.FABRIC if over_network else HandleType.POSIX_FD  # the same on all ranks
        for location in {DEVICE, host_location}:
            _require_shared(driver, location, handle_type)
    depth, in_place = config.prefetch_depth, config.reads_in_place
    kept = config.resident_cache, config.expert_bank
    stated = (driver, ledger, rank, layers, depth, handle_type, host_location, in_place, *kept)
    assembly = SleepingAssembly(*stated, saved_location=Location(_numa_node(config, driver)))
    if 0 < config.resident_cache < assembly.granularity:
        raise ConfigError(
            f"resident_cache is {config.resident_cache} bytes, and a page of memory has {assembly.granularity} here"
        )
    return assembly


def _host_location(config: DWDPConfig, driver: Driver) -> Location:
    node = _numa_node(config, driver)
    if node not in numa_nodes():
        there = ", ".join(map(str, numa_nodes()))
        raise ConfigError(f"host_numa_node is {node}, but this machine has no such NUMA node; it has {there}")
    return Location(node)


def _numa_node(config: DWDPConfig, driver: Driver) -> int:
    return driver.numa_node if config.host_numa_node is None else config.host_numa_node


def _require_shared(driver: Driver, location: Location, handle_type: HandleType) -> None:
    """Raise `ConfigError` unless memory at ``location`` can be created, exported and imported here."""
    if (why := refusal(driver, location, handle_type)) is None:
        return
    if handle_type is HandleType.FABRIC:
        raise ConfigError(
            f"ranks that meet by TCP hand over memory by fabric handles, which cannot be had here ({why}): "
            "ranks of a group on one machine, with a directory as rendezvous, need none"
        )
    raise ConfigError(f"memory cannot be shared by file descriptors here ({why}); use assembly: tensor_list")

"""``vmm-dwdp doctor``: what this machine can do, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import DEVICE, Location
from vmm_dwdp.allocator.native import HAS_NATIVE
from vmm_dwdp.allocator.probe import supported_handle_types
from vmm_dwdp.cli.checks import why_no_gpu
from vmm_dwdp.cli.connections import Connections, connections
from vmm_dwdp.cli.console import print_table, size
from vmm_dwdp.errors import ConfigError, DWDPError
from vmm_dwdp.kernels import providers
from vmm_dwdp.layout.turns import MOST_UNDER_WAY, RUN_BYTES
from vmm_dwdp.planning.calibrate import preset_of
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.link_rates import LinkRates, measure_link
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.presets import preset_names
from vmm_dwdp.planning.run_gap import LOST, measure_gap, shortest_run
from vmm_dwdp.schedule.mode_choice import crossover

_PACKAGES: Final = ("vmm-dwdp", "torch", "cuda-bindings", "transformers", "flashinfer-python", "nvidia-cutlass-dsl")


@dataclass
class Finding:
    """One thing tried on this machine: ``why_not`` is None where it works, else the sentence that says why not."""

    why_not: str | None = None


@dataclass
class Memory(Finding):
    """Physical memory in one place, as the driver of a device sees it."""

    granularity: int | None = None  # bytes per page
    handle_types: dict[str, Finding] = field(default_factory=dict)  # how a page of it can be handed to another process


@dataclass
class Device(Finding):
    """A GPU, or the CPU, whose driver is the host driver."""

    driver: str | None = None  # "cuda" or "host"
    product: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    memory: dict[str, Memory] = field(default_factory=dict)  # by location: "device" or "NUMA node 0"
    peer_access: dict[str, Finding] = field(default_factory=dict)  # by the other device


@dataclass
class Kernel(Finding):
    """A provider of grouped GEMMs."""

    supports: str | None = None


@dataclass
class HostMemory:
    """Experts in host memory: the rates at which a device gets them, and what follows for mode auto."""

    rates: LinkRates
    staged_from: dict[str, float]  # by model: tokens a pass from which staging is expected to be faster


@dataclass
class Runs(Finding):
    """Bytes whose owner is chosen run by run, as the runtime gives them; ``why_not``: nothing could be measured."""

    longest_bytes: int = RUN_BYTES
    under_way: int = 1  # of a rank beside others that pull; the next is given shortly before its end
    under_way_alone: int = MOST_UNDER_WAY
    gap_s: float | None = None  # that each run more takes
    link_rate: float | None = None  # bytes a second from another GPU, by the preset of this one
    worth_from_bytes: int | None = None  # a run of which the gap takes at most 2 %


@dataclass
class Report:
    """All that is found; `asdict` of it is what ``--json`` prints."""

    versions: dict[str, str | None]
    devices: dict[str, Device]
    descriptor_limit: int  # open files a process may have; each imported handle takes one
    mapping_limit: int | None  # mappings a process may have on the host; None where the kernel does not say
    connections: Connections  # to a GPU, for copies
    native_thread: Finding  # which gives copies to a GPU's driver without the interpreter
    kernels: dict[str, Kernel]  # by function and provider, in the order in which provider="auto" tries them
    host_memory: dict[str, HostMemory]  # by device; empty unless asked for
    runs: dict[str, Runs]  # the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure how fast experts in host memory are copied and read in place, and where mode auto will change; "
        "and what the gap between two runs of copies costs",
    )


def run(arguments: argparse.Namespace) -> int:
    report = examine(calibrate=arguments.calibrate)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    return 0


def examine(*, calibrate: bool) -> Report:
    """Try everything; nothing stays allocated, and nothing raises because the machine lacks something.

    With ``calibrate``, also measure host memory: on every GPU, or where there is none on the CPU.
    """
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = {str(device): _examine_device(device) for device in (torch.device("cpu"), *gpus)}
    if not gpus:
        devices["cuda"] = Device(why_no_gpu())
    mapping_limit = Path("/proc/sys/vm/max_map_count")
    return Report(
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        devices=devices,
        descriptor_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        mapping_limit=int(mapping_limit.read_text()) if mapping_limit.exists() else None,
        connections=connections(os.environ, len(gpus)),
        native_thread=Finding(None if HAS_NATIVE else "there was no C compiler when vmm-dwdp was installed"),
        kernels={
            provider.name: Kernel(None, provider.reason) if provider.usable else Kernel(provider.reason)
            for provider in providers()
        },
        host_memory={str(device): _measure(device) for device in gpus or [torch.device("cpu")] if calibrate},
        runs={str(device): _measure_runs(device) for device in gpus or [torch.device("cpu")] if calibrate},
    )


def _measure(device: torch.device) -> HostMemory:
    rates = measure_link(device)
    models = {name: load_model(name) for name in preset_names("models")}
    share = rates.in_place / rates.copies
    staged_from = {name: crossover(model.num_experts, model.top_k, share) for name, model in models.items()}
    return HostMemory(rates, staged_from)


def _measure_runs(device: torch.device) -> Runs:
    if device.type == "cpu":
        return Runs("there is no GPU, and so no link: what the runtime has where nothing was measured")
    try:
        driver = open_driver(device)
        with driver.current():
            gap = measure_gap(driver)
    except DWDPError as error:
        return Runs(str(error))
    try:
        rate = load_gpu(preset_of(torch.cuda.get_device_name(device))).pull_rate
    except ConfigError:
        return Runs(gap_s=gap)
    return Runs(gap_s=gap, link_rate=rate, worth_from_bytes=shortest_run(gap, rate))


def _examine_device(device: torch.device) -> Device:
    try:
        driver = open_driver(device)
    except DWDPError as error:
        return Device(str(error))
    if device.type == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * pages, os.sysconf("SC_PHYS_PAGES") * pages
        locations, product = [DEVICE], platform.processor() or platform.machine()
    else:
        free, total = torch.cuda.mem_get_info(device)
        locations, product = [DEVICE, Location(driver.numa_node)], torch.cuda.get_device_name(device)
    memory = {}
    for location in locations:
        try:
            with driver.current():
                granularity = driver.granularity(location)
                types = supported_handle_types(driver, location)
            memory[str(location)] = Memory(None, granularity, {t.value: Finding(why) for t, why in types.items()})
        except DWDPError as error:
            memory[str(location)] = Memory(str(error))
    others = [] if device.type == "cpu" else [i for i in range(torch.cuda.device_count()) if i != device.index]
    peers = {
        f"cuda:{other}": Finding(
            None
            if torch.cuda.can_device_access_peer(device, other)
            else f"{device} has neither NVLink nor PCIe peer access to cuda:{other}"
        )
        for other in others
    }
    return Device(None, driver.name, product, free, total, memory, peers)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(report: Report) -> None:
    def size_or_none(nbytes: int | None) -> str:
        return "" if nbytes is None else size(nbytes)

    versions = [(name, version or "not installed") for name, version in report.versions.items()]
    print_table("Versions", ("package", "version"), versions)
    print_table(
        "Devices",
        ("device", "driver", "product", "free", "total", "usable"),
        [
            (
                name,
                d.driver or "",
                d.product or "",
                size_or_none(d.free_bytes),
                size_or_none(d.total_bytes),
                _outcome(d),
            )
            for name, d in report.devices.items()
        ],
    )
    print_table(
        "Memory that can be mapped and handed to another process",
        ("device", "location", "page", "as", "possible"),
        [
            (name, location, size_or_none(memory.granularity), handle_type, _outcome(finding))
            for name, device in report.devices.items()
            for location, memory in device.memory.items()
            for handle_type, finding in (memory.handle_types or {"": memory}).items()
        ],
    )
    peers = [
        (name, other, _outcome(finding))
        for name, device in report.devices.items()
        for other, finding in device.peer_access.items()
    ]
    if peers:
        print_table("Peer access", ("device", "reads", "possible"), peers)
    for name, host in report.host_memory.items():
        rates = f"copied at {host.rates.copies / 1e9:.1f} GB/s, read in place at {host.rates.in_place / 1e9:.1f} GB/s"
        print_table(
            f"Experts in host memory, {name}: {rates}",
            ("model", "expected to be faster staged"),
            [(model, f"from {tokens:.0f} tokens a pass") for model, tokens in host.staged_from.items()],
        )
    for name, runs in report.runs.items():
        _print_runs(name, runs)
    print_table(
        "Limits of a process",
        ("limit", "value"),
        [("open files", str(report.descriptor_limit)), ("mappings", str(report.mapping_limit or "unknown"))],
    )
    _print_giving(report)
    print_table(
        "Grouped GEMMs",
        ("provider", "usable", ""),
        [
            (name, "no" if kernel.why_not else "yes", kernel.why_not or kernel.supports or "")
            for name, kernel in report.kernels.items()
        ],
    )


def _outcome(finding: Finding | Connections) -> str:
    return finding.why_not or "yes"


def _print_runs(name: str, runs: Runs) -> None:
    rows = [
        ("longest run", size(runs.longest_bytes)),
        ("runs of a rank under way while others pull", str(runs.under_way)),
        ("while no other pulls", str(runs.under_way_alone)),
    ]
    if runs.gap_s is not None:
        rows.append(("lost by each run more", f"{runs.gap_s * 1e6:.1f} microseconds"))
    if runs.worth_from_bytes is not None:
        rows.append((f"that is at most {LOST:.0%} of a run from", size(runs.worth_from_bytes)))
    print_table(f"Runs whose owner is chosen (slice_bytes: auto), {name}", ("what", ""), rows)
    if runs.why_not:
        print(f"Not measured: {runs.why_not}.")


def _print_giving(report: Report) -> None:
    print_table(
        "Giving copies to a GPU's driver",
        ("by", "possible"),
        [("a thread that needs no interpreter", _outcome(report.native_thread)), ("a thread of Python's", "yes")],
    )
    found = report.connections
    stated = ", ".join(f"{name}={value}" for name, value in found.stated.items())
    print_table(
        "Connections of a process to a GPU, for copies",
        ("there are", "stated", "copy streams of a rank", "enough"),
        [(str(found.for_copies or "unknown"), stated or "nothing", str(found.streams), _outcome(found))],
    )

"""What the host driver does to this process, as the kernel sees it; its rules are in test_driver_conformance.py."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from support.forks import in_child

from vmm_dwdp.allocator import host_pages, open_driver
from vmm_dwdp.allocator.driver import Access, Copy, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Descriptor, Event, Ledger, Reservation, ResourceStack, Stream
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import ConfigError, DriverError

PAGE = 4096


@pytest.fixture
def host() -> HostDriver:
    return HostDriver(PAGE)


@pytest.fixture
def mapped(host: HostDriver, ledger: Ledger, stack: ResourceStack) -> Reservation:
    """Two pages of memory in the middle of four pages of addresses."""
    memory = stack.push(Allocation.create(host, ledger, 2 * PAGE, handle_type=HandleType.POSIX_FD))
    addresses = stack.push(Reservation(host, ledger, 4 * PAGE))
    addresses.map(PAGE, memory)
    return addresses


def protection(address: int) -> str:
    """As in /proc/self/maps: rwx, and p for private or s for shared memory; empty if nothing is there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, flags, *_ = line.split()
        first, last = (int(end, 16) for end in addresses.split("-"))
        if first <= address < last:
            return flags
    return ""


@pytest.mark.parametrize("granularity", [0, -4096, 2048, 4097, 3 * 4096])
def test_granularity_that_cannot_be(granularity: int) -> None:
    with pytest.raises(ConfigError, match=f"not {granularity}"):
        HostDriver(granularity)


@pytest.mark.parametrize("granularity", [4096, 1 << 16, 2 << 20])
def test_granularity_is_that_of_sizes_and_addresses(granularity: int, ledger: Ledger) -> None:
    driver = HostDriver(granularity)
    assert driver.granularity() == driver.granularity(Location(numa_node=0)) == granularity
    with pytest.raises(DriverError, match=f"no multiple of {granularity}"):
        driver.create(granularity // 2)
    with Reservation(driver, ledger, 3 * granularity) as addresses:
        assert addresses.address % granularity == 0


def test_driver_of_a_device() -> None:
    assert open_driver(torch.device("cpu")).granularity() == 2 << 20
    assert open_driver(torch.device("cpu"), granularity=PAGE).granularity() == PAGE
    with pytest.raises(ConfigError, match="no driver for the device meta"):
        open_driver(torch.device("meta"))
    with pytest.raises(ConfigError, match="granularity of cuda:0"):
        open_driver(torch.device("cuda:0"), granularity=PAGE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants missing")
def test_driver_of_a_device_that_is_not_there() -> None:
    with pytest.raises(DriverError, match="while trying to use cuda:0"):
        open_driver(torch.device("cuda:0"))


def test_memory_on_a_node_that_does_not_exist(host: HostDriver) -> None:
    with pytest.raises(DriverError, match="NUMA node 99, which this machine does not have"):
        host.create(PAGE, Location(numa_node=99))


def test_access_is_set_in_the_kernel(mapped: Reservation) -> None:
    first, last = mapped.address + PAGE, mapped.address + 3 * PAGE - 1
    assert protection(first) == protection(last) == "---s"
    mapped.set_access(PAGE, 2 * PAGE, Access.READ)
    assert protection(first) == protection(last) == "r--s"
    mapped.set_access(PAGE, 2 * PAGE, Access.READ_WRITE)
    assert protection(first) == protection(last) == "rw-s"
    assert protection(mapped.address) == protection(mapped.address + 3 * PAGE) == "---p"


def test_memory_is_not_mapped_beyond_the_end_of_a_reservation(host: HostDriver, mapped: Reservation) -> None:
    """A GPU driver may let this pass, where it has rounded the reservation up."""
    memory = host.create(2 * PAGE)
    with pytest.raises(DriverError, match="which is not reserved"):
        host.map(mapped.address + 3 * PAGE, 2 * PAGE, memory)
    host.release(memory)


def test_a_gap_is_no_mapping(host: HostDriver, ledger: Ledger) -> None:
    with Allocation.create(host, ledger, PAGE) as memory, Reservation(host, ledger, 3 * PAGE) as addresses:
        addresses.map(0, memory)
        addresses.map(2 * PAGE, memory)
        for call in (host.unmap, functools.partial(host.set_access, access=Access.READ)):
            with pytest.raises(DriverError, match="not made up of whole mappings"):
                call(addresses.address, 3 * PAGE)


def test_aligning_a_reservation_costs_no_addresses() -> None:
    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    driver, before = HostDriver(1 << 36), address_space()
    address = driver.reserve(1 << 36)
    assert abs(address_space() - before - (1 << 36)) < 1 << 30
    driver.free(address, 1 << 36)
    assert abs(address_space() - before) < 1 << 30


def test_unmapped_addresses_stay_reserved(host: HostDriver) -> None:
    memory, address = host.create(PAGE), host.reserve(2 * PAGE)
    host.map(address, PAGE, memory)
    host.unmap(address, PAGE)
    assert protection(address) == "---p"
    host.free(address, 2 * PAGE)
    assert protection(address) == ""
    host.release(memory)


def test_a_refusal_changes_nothing(host: HostDriver, mapped: Reservation) -> None:
    mapped.set_access(PAGE, 2 * PAGE, Access.READ_WRITE)
    before = Path("/proc/self/maps").read_text()
    for call in (host.unmap, host.free):
        with pytest.raises(DriverError):
            call(mapped.address + PAGE, PAGE)
    with pytest.raises(DriverError):
        mapped.set_access(PAGE, PAGE, Access.READ)
    assert Path("/proc/self/maps").read_text() == before


def test_too_many_addresses(host: HostDriver) -> None:
    with pytest.raises(DriverError, match=r"mmap failed with ENOMEM .* the limit vm\.max_map_count"):
        host.reserve(1 << 47)


def test_too_many_open_files(host: HostDriver, open_descriptors: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(DriverError, match=r"memfd_create failed with EMFILE .* may have 3 files open"):
            host.create(PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_handle_is_released_once(host: HostDriver) -> None:
    handle = host.create(PAGE)
    host.release(handle)
    for call in (host.release, lambda handle: host.export(handle, HandleType.POSIX_FD)):
        with pytest.raises(DriverError, match="which is no handle"):
            call(handle)


def test_only_memory_whose_size_is_final_is_imported(host: HostDriver, open_descriptors: None) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        with pytest.raises(DriverError, match=f"no memory of {PAGE} bytes"):
            host.import_(file.fileno(), HandleType.POSIX_FD, PAGE)


def test_exported_memory_cannot_be_cut(host: HostDriver, ledger: Ledger, open_descriptors: None) -> None:
    with Allocation.create(host, ledger, PAGE, handle_type=HandleType.POSIX_FD) as memory:
        descriptor = memory.export(HandleType.POSIX_FD)
        assert isinstance(descriptor, Descriptor)
        with descriptor, pytest.raises(PermissionError):
            os.ftruncate(descriptor.fd, 0)


@pytest.mark.parametrize("token", [b"/proc/self/fd/0", b"/proc/1/fd/../mem", b"/etc/passwd", b"/proc/1/fd/1\n"])
def test_a_token_that_names_no_allocation(host: HostDriver, token: bytes) -> None:
    with pytest.raises(DriverError, match="names no allocation"):
        host.open_allocation(token, PAGE)


@pytest.mark.parametrize(
    ("call", "arguments", "sentence"),
    [
        ("reserve", (PAGE + 1,), "reserve 4097 bytes, no multiple of 4096"),
        ("allocate", (0,), "allocate 0 bytes"),
        ("close_allocation", (PAGE,), "close 0x1000, which was not opened"),
        ("record", (7, 0), "use 7, which is no event"),
    ],
)
def test_what_cannot_be_is_refused(host: HostDriver, call: str, arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(DriverError, match=sentence):
        getattr(host, call)(*arguments)


def test_an_allocation_is_opened_with_its_own_size(host: HostDriver, open_descriptors: None) -> None:
    address = host.allocate(100)
    token = host.export_allocation(address)
    with pytest.raises(DriverError, match="which has not 101 bytes"):
        host.open_allocation(token, 101)
    opened = host.open_allocation(token, 100)
    ctypes.memset(address, 5, 100)
    assert ctypes.string_at(opened, 100) == b"\5" * 100
    host.close_allocation(opened)
    host.deallocate(address)
    assert protection(address) == protection(opened) == ""


def test_stream_0_is_the_calling_thread(host: HostDriver, ledger: Ledger) -> None:
    source, target = ctypes.create_string_buffer(b"bytes"), ctypes.create_string_buffer(6)
    with Event(host, ledger) as event:
        host.copy(host.prepare([Copy(ctypes.addressof(target), ctypes.addressof(source), 6)]), host.current_stream())
        assert target.value == b"bytes"
        host.record(event.event, host.current_stream())
        assert host.complete(event.event)


def test_a_stream_has_a_thread_until_it_is_destroyed(host: HostDriver) -> None:
    before = threading.enumerate()
    stream = host.create_stream()
    (thread,) = set(threading.enumerate()) - set(before)
    assert thread.name == f"vmm-dwdp stream {stream}"
    host.destroy_stream(stream)
    assert threading.enumerate() == before
    with pytest.raises(DriverError, match=f"{stream}, which is no stream"):
        host.destroy_stream(stream)


def test_unmapping_under_a_copy_ends_the_work_of_a_stream(
    host: HostDriver, mapped: Reservation, ledger: Ledger, stack: ResourceStack
) -> None:
    mapped.set_access(PAGE, 2 * PAGE, Access.READ_WRITE)
    first, second = (stack.push(Stream(host, ledger)).stream for _ in range(2))
    event, gate = stack.push(Event(host, ledger)).event, threading.Event()
    source, target = ctypes.create_string_buffer(b"source", 8), ctypes.create_string_buffer(8)
    host._streams[first].submit(gate.wait)
    host.copy(host.prepare([Copy(mapped.address + PAGE, ctypes.addressof(source), 8)]), first)
    host.copy(host.prepare([Copy(ctypes.addressof(target), ctypes.addressof(source), 8)]), first)
    host.record(event, first)
    host.wait(second, event)
    mapped.close()
    gate.set()
    for call in (
        lambda: host.synchronize(first),
        lambda: host.synchronize(second),
        lambda: host.synchronize(),
        lambda: host.wait(host.current_stream(), event),
        lambda: host.complete(event),
    ):
        with pytest.raises(DriverError) as refusal:
            call()
        assert refusal.value.code == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert target.value == b"", "a copy after the one that failed was run"


@pytest.mark.parametrize("call", ["protect", "displace", "remove"])
def test_what_the_kernel_refuses_is_an_error(call: str) -> None:
    """No address that is not a multiple of a page can be protected, mapped or given up."""
    arguments = {"protect": (1, host_pages.PAGE_BYTES, True)}.get(call, (1, host_pages.PAGE_BYTES))
    with pytest.raises(DriverError) as refusal:
        getattr(host_pages, call)(*arguments)
    assert refusal.value.code == "EINVAL"


def test_a_child_of_fork_is_refused_and_waits_for_nothing(host: HostDriver) -> None:
    stream, event = host.create_stream(), host.create_event(timed=True)
    held = threading.Event()
    host._streams[stream].submit(held.wait)  # which the child has no thread for
    host.record(event, stream)
    calls = [
        functools.partial(host.record, event, stream),
        functools.partial(host.record, event, 0),
        functools.partial(host.wait, 0, event),
        functools.partial(host.wait, stream, event),
        functools.partial(host.complete, event),
        functools.partial(host.elapsed, event, event),
        functools.partial(host.copy, (), stream),
        functools.partial(host.copy, (), 0),
        functools.partial(host.synchronize),
        functools.partial(host.synchronize, stream),
        functools.partial(host.destroy_stream, stream),
        functools.partial(host.destroy_event, event),
        functools.partial(host.create_event, timed=False),
        host.create_stream,
    ]

    def work() -> None:
        for call in calls:
            with pytest.raises(DriverError, match=r"NOT_INITIALIZED .* opened before this process was forked"):
                call()
        own = HostDriver(PAGE)  # which it can have
        stream = own.create_stream()
        own.synchronize(stream)
        own.destroy_stream(stream)

    in_child(work)
    held.set()
    host.synchronize()
    host.destroy_event(event)
    host.destroy_stream(stream)

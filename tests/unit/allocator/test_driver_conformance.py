"""The rules that every driver keeps: see "[Note: The rules of virtual memory]" in vmm_dwdp/allocator/driver.py.

Each test runs on both drivers. A rule that the host driver kept and a GPU did not would make every other test of this
project, most of which run on the host driver, worth less.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from vmm_dwdp.allocator.driver import DEVICE, Access, Copy, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import (
    Allocation,
    Descriptor,
    Event,
    Ledger,
    PlainMemory,
    Reservation,
    ResourceStack,
    Stream,
)
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.probe import refusal
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.errors import DriverError

HOST = Location(numa_node=0)
INVALID_VALUE = "CUDA_ERROR_INVALID_VALUE"
INVALID_CONTEXT = "CUDA_ERROR_INVALID_CONTEXT"
LOCATIONS = pytest.mark.parametrize("location", [DEVICE, HOST], ids=str)
HANDLE_TYPES = pytest.mark.parametrize("handle_type", HandleType, ids=lambda handle_type: handle_type.value)


@contextlib.contextmanager
def refused(code: str | None = None) -> Iterator[None]:
    """The block is refused by the driver, with ``code`` where the rule names one."""
    with pytest.raises(DriverError) as refusal:
        yield
    assert code is None or refusal.value.code == code


class Rig:
    """A driver, and what a test takes from it."""

    def __init__(self, driver: Driver, ledger: Ledger, stack: ResourceStack) -> None:
        self.driver, self.ledger, self.stack = driver, ledger, stack
        self.page = driver.granularity()

    def memory(
        self, pages: int = 1, location: Location = DEVICE, handle_type: HandleType = HandleType.POSIX_FD
    ) -> Allocation:
        """Skips the test where this machine has no such handles: few have a fabric."""
        if handle_type is HandleType.FABRIC and (why := refusal(self.driver, location, handle_type)) is not None:
            pytest.skip(why)
        nbytes = pages * self.page
        return self.stack.push(Allocation.create(self.driver, self.ledger, nbytes, location, handle_type))

    def exported(self, memory: Allocation, handle_type: HandleType) -> Descriptor | bytes:
        shared = memory.export(handle_type)
        return self.stack.push(shared) if isinstance(shared, Descriptor) else shared

    def imported(self, memory: Allocation, handle_type: HandleType) -> Allocation:
        shared = self.exported(memory, handle_type)
        return self.stack.push(Allocation.import_(self.driver, self.ledger, shared, handle_type, memory.nbytes))

    def addresses(self, pages: int) -> Reservation:
        return self.stack.push(Reservation(self.driver, self.ledger, pages * self.page))

    def mapped(self, *memories: Allocation, access: Access | None = Access.READ_WRITE) -> Reservation:
        """The memories, one after another, from the beginning of a range that is exactly large enough."""
        nbytes = sum(memory.nbytes for memory in memories)
        addresses = self.addresses(nbytes // self.page)
        offset = 0
        for memory in memories:
            addresses.map(offset, memory)
            offset += memory.nbytes
        if access is not None:
            addresses.set_access(0, nbytes, access)
        return addresses

    def bytes_at(self, address: int, nbytes: int) -> torch.Tensor:
        return tensor_at(address, (nbytes,), torch.uint8, self.driver.device)

    def copy(self, *copies: Copy, stream: int = 0) -> None:
        self.driver.copy(self.driver.prepare(copies), stream)

    def stream(self) -> int:
        return self.stack.push(Stream(self.driver, self.ledger)).stream

    def event(self, timed: bool = False) -> int:
        return self.stack.push(Event(self.driver, self.ledger, timed=timed)).event

    @contextlib.contextmanager
    def held(self, stream: int) -> Iterator[None]:
        """Work given to ``stream`` in this block does not begin before the block ends, which waits for its end."""
        release = hold(self.driver, stream)
        try:
            yield
        finally:
            release()
            self.driver.synchronize(stream)


def hold(driver: Driver, stream: int) -> Callable[[], object]:
    """Make ``stream`` wait until the function that is returned is called."""
    if isinstance(driver, HostDriver):
        gate = threading.Event()
        driver._streams[stream].submit(gate.wait)
        return gate.set
    from cuda.bindings import driver as cuda

    gate = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    equal = cuda.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
    (result,) = cuda.cuStreamWaitValue32(stream, gate.data_ptr(), 1, equal)
    assert result == cuda.CUresult.CUDA_SUCCESS
    return lambda: gate.fill_(1)


@pytest.fixture
def rig(driver: Driver, ledger: Ledger, stack: ResourceStack) -> Iterator[Rig]:
    yield Rig(driver, ledger, stack)
    driver.synchronize()  # before the stack unmaps what kernels may still use


def pattern(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Bytes in which no two pages are equal."""
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- physical memory ---------------------------------------------------------------------------------------------------


@LOCATIONS
def test_granularity_is_a_power_of_two(rig: Rig, location: Location) -> None:
    assert rig.driver.granularity(location).bit_count() == 1


@LOCATIONS
@pytest.mark.parametrize("pages", [0, 0.5, 1.5])
def test_memory_comes_in_whole_pages(rig: Rig, location: Location, pages: float) -> None:
    with refused(INVALID_VALUE):
        rig.driver.create(int(pages * rig.page), location)


def test_host_memory_can_be_filled_by_the_cpu(rig: Rig) -> None:
    location, content = Location(rig.driver.numa_node), pattern(2 * rig.page)
    addresses = rig.mapped(rig.memory(1, location), rig.memory(1, location))
    rig.driver.allow_cpu(addresses.address, addresses.nbytes, location)
    tensor_at(addresses.address, content.shape, content.dtype, torch.device("cpu")).copy_(content)
    assert torch.equal(rig.bytes_at(addresses.address, addresses.nbytes).cpu(), content)


def test_memory_needs_a_node_that_exists(rig: Rig) -> None:
    with refused():
        rig.driver.create(rig.page, Location(numa_node=1000))


@LOCATIONS
def test_memory_keeps_what_is_written(rig: Rig, location: Location) -> None:
    content = pattern(2 * rig.page)
    view = rig.bytes_at(rig.mapped(rig.memory(2, location)).address, 2 * rig.page)
    view.copy_(content)
    assert torch.equal(view.cpu(), content)


def test_released_memory_stays_while_it_is_mapped(rig: Rig) -> None:
    memory = rig.memory()
    view = rig.bytes_at(rig.mapped(memory).address, rig.page)
    view.fill_(1)
    memory.close()
    rig.memory()  # which must not be the same memory
    view[0] = 2
    assert view.sum().item() == rig.page + 1


# -- sharing within one process ----------------------------------------------------------------------------------------


@HANDLE_TYPES
def test_memory_is_exported_only_as_it_was_created(rig: Rig, handle_type: HandleType) -> None:
    others = [None, *(other for other in HandleType if other is not handle_type)]
    for created in others:
        if created is None or refusal(rig.driver, DEVICE, created) is None:
            with Allocation.create(rig.driver, rig.ledger, rig.page, DEVICE, created) as memory, refused():
                memory.export(handle_type)


@HANDLE_TYPES
@LOCATIONS
def test_an_imported_handle_is_another_handle_to_the_same_memory(
    rig: Rig, location: Location, handle_type: HandleType
) -> None:
    memory = rig.memory(2, location, handle_type)
    imported = rig.imported(memory, handle_type)
    assert imported.handle != memory.handle
    ours, theirs = (rig.bytes_at(rig.mapped(each).address, 2 * rig.page) for each in (memory, imported))
    ours.copy_(pattern(2 * rig.page))
    assert torch.equal(theirs.cpu(), pattern(2 * rig.page))
    theirs.zero_()
    assert not ours.any().item()


@HANDLE_TYPES
def test_an_imported_handle_outlives_the_one_it_came_from(rig: Rig, handle_type: HandleType) -> None:
    memory = rig.memory(handle_type=handle_type)
    imported = rig.imported(memory, handle_type)
    memory.close()
    rig.bytes_at(rig.mapped(imported).address, rig.page).fill_(7)


def test_an_exported_descriptor_belongs_to_the_caller(rig: Rig) -> None:
    memory = rig.memory()
    first, second = memory.export(HandleType.POSIX_FD), memory.export(HandleType.POSIX_FD)
    assert isinstance(first, Descriptor)
    assert isinstance(second, Descriptor)
    assert first.fd != second.fd
    first.close()
    rig.stack.push(Allocation.import_(rig.driver, rig.ledger, second, HandleType.POSIX_FD, rig.page))
    second.close()


def test_a_fabric_handle_is_64_bytes_that_nobody_owns(rig: Rig) -> None:
    memory = rig.memory(handle_type=HandleType.FABRIC)
    for _ in range(2):
        shared = rig.exported(memory, HandleType.FABRIC)
        assert isinstance(shared, bytes)
        assert len(shared) == 64


def test_what_is_no_handle_of_a_kind_is_not_imported_as_one(rig: Rig) -> None:
    """It may come from another rank, and a driver would read as many bytes as it expects."""
    for shared, handle_type in (
        (b"", HandleType.FABRIC),
        (bytes(63), HandleType.FABRIC),
        (0, HandleType.FABRIC),
        (bytes(64), HandleType.POSIX_FD),
    ):
        with refused(INVALID_VALUE):
            rig.driver.import_(shared, handle_type, rig.page)


@HANDLE_TYPES
def test_memory_is_not_mapped_with_another_size_than_it_was_exported_with(rig: Rig, handle_type: HandleType) -> None:
    shared = rig.exported(rig.memory(2, handle_type=handle_type), handle_type)
    with (
        rig.addresses(1) as addresses,
        refused(),
        Allocation.import_(rig.driver, rig.ledger, shared, handle_type, rig.page) as imported,
    ):
        addresses.map(0, imported)


# -- mapping -----------------------------------------------------------------------------------------------------------


def test_addresses_are_reserved_apart_and_aligned(rig: Rig) -> None:
    first, second = rig.addresses(3), rig.addresses(3)
    assert first.address % rig.page == second.address % rig.page == 0
    assert abs(first.address - second.address) >= 3 * rig.page


def test_a_terabyte_of_addresses_can_be_reserved(rig: Rig) -> None:
    rig.addresses((1 << 40) // rig.page)


def test_neighbouring_handles_make_one_range(rig: Rig) -> None:
    content = pattern(6 * rig.page)
    addresses = rig.mapped(rig.memory(1), rig.memory(3), rig.memory(2))
    view = rig.bytes_at(addresses.address, 6 * rig.page)
    view.copy_(content)
    assert torch.equal(view.cpu(), content)


def test_a_handle_can_be_mapped_at_several_addresses(rig: Rig) -> None:
    memory = rig.memory(2)
    first, second = rig.mapped(memory), rig.mapped(rig.memory(), memory)
    rig.bytes_at(first.address, 2 * rig.page).copy_(pattern(2 * rig.page))
    rig.driver.synchronize()
    assert torch.equal(rig.bytes_at(second.address + rig.page, 2 * rig.page).cpu(), pattern(2 * rig.page))


@pytest.mark.parametrize("pages", [1, 3], ids=["part", "more"])
def test_a_handle_is_mapped_whole(rig: Rig, pages: int) -> None:
    memory, addresses = rig.memory(2), rig.addresses(3)
    with refused("CUDA_ERROR_NOT_SUPPORTED"):
        rig.driver.map(addresses.address, pages * rig.page, memory.handle)


def test_mappings_do_not_overlap(rig: Rig) -> None:
    memory, addresses = rig.memory(2), rig.addresses(4)
    addresses.map(rig.page, memory)
    for offset in (0, rig.page, 2 * rig.page):
        with refused(INVALID_VALUE):
            addresses.map(offset, memory)


def test_memory_is_mapped_only_at_whole_pages(rig: Rig) -> None:
    memory, addresses = rig.memory(), rig.addresses(2)
    with refused(INVALID_VALUE):
        addresses.map(rig.page // 2, memory)


def test_memory_is_mapped_only_where_addresses_are_reserved(rig: Rig) -> None:
    memory, addresses = rig.memory(2), rig.addresses(2)
    addresses.close()
    with refused(INVALID_VALUE):
        rig.driver.map(addresses.address, memory.nbytes, memory.handle)


def test_mappings_are_removed_whole(rig: Rig) -> None:
    addresses = rig.mapped(rig.memory(2), rig.memory(2))
    rig.bytes_at(addresses.address, 4 * rig.page).fill_(3)
    for first, pages in ((0, 1), (1, 1), (1, 2), (0, 3)):
        with refused(INVALID_VALUE):
            rig.driver.unmap(addresses.address + first * rig.page, pages * rig.page)
    assert rig.bytes_at(addresses.address, 4 * rig.page).eq(3).all().item()


def test_one_call_removes_several_mappings(rig: Rig) -> None:
    memories, addresses = [rig.memory(1), rig.memory(2)], rig.driver.reserve(3 * rig.page)
    try:
        for _ in range(2):  # the second time into the addresses that the first has left
            rig.driver.map(addresses, rig.page, memories[0].handle)
            rig.driver.map(addresses + rig.page, 2 * rig.page, memories[1].handle)
            rig.driver.unmap(addresses, 3 * rig.page)
    finally:
        rig.driver.free(addresses, 3 * rig.page)


def test_addresses_are_freed_as_they_were_reserved(rig: Rig) -> None:
    addresses = rig.addresses(2)
    for first, pages in ((0, 1), (1, 1)):
        with refused(INVALID_VALUE):
            rig.driver.free(addresses.address + first * rig.page, pages * rig.page)


def test_addresses_are_not_freed_while_memory_is_mapped_there(rig: Rig) -> None:
    addresses = rig.mapped(rig.memory(), access=None)
    with refused(INVALID_VALUE):
        rig.driver.free(addresses.address, addresses.nbytes)


# -- access ------------------------------------------------------------------------------------------------------------


def test_access_is_set_on_whole_mappings(rig: Rig) -> None:
    addresses = rig.mapped(rig.memory(2), rig.memory(2))
    for first, pages in ((0, 1), (1, 1), (1, 2)):
        with refused(INVALID_VALUE):
            addresses.set_access(first * rig.page, pages * rig.page, Access.READ)


def test_access_is_set_only_where_memory_is_mapped(rig: Rig) -> None:
    addresses = rig.addresses(2)
    addresses.map(0, rig.memory())
    with refused(INVALID_VALUE):
        addresses.set_access(0, 2 * rig.page, Access.READ_WRITE)


def test_mapped_memory_gives_no_access_by_itself(rig: Rig) -> None:
    addresses, other = rig.mapped(rig.memory(), access=None), rig.mapped(rig.memory())
    for copy in (Copy(addresses.address, other.address, 16), Copy(other.address, addresses.address, 16)):
        with refused(INVALID_VALUE):
            rig.copy(copy, stream=rig.stream())


@pytest.mark.parametrize("imported", [False, True], ids=["own", "imported"])
@LOCATIONS
def test_memory_mapped_to_be_read_refuses_to_be_written(rig: Rig, location: Location, imported: bool) -> None:
    memory, other = rig.memory(2, location), rig.mapped(rig.memory(2))
    content = pattern(2 * rig.page)
    rig.bytes_at(rig.mapped(memory).address, 2 * rig.page).copy_(content)
    readable = rig.mapped(rig.imported(memory, HandleType.POSIX_FD) if imported else memory, access=Access.READ)

    for stream in (0, rig.stream()):
        with refused(INVALID_VALUE):
            rig.copy(Copy(readable.address + 5, other.address, 16), stream=stream)
        rig.driver.synchronize(stream)
    assert torch.equal(rig.bytes_at(readable.address, 2 * rig.page).cpu(), content)


def test_access_can_be_taken_and_given_again(rig: Rig) -> None:
    addresses, other = rig.mapped(rig.memory()), rig.mapped(rig.memory())
    addresses.set_access(0, rig.page, Access.READ)
    with refused(INVALID_VALUE):
        rig.copy(Copy(addresses.address, other.address, rig.page), stream=rig.stream())
    addresses.set_access(0, rig.page, Access.READ_WRITE)
    rig.copy(Copy(addresses.address, other.address, rig.page))


# -- memory without the above ------------------------------------------------------------------------------------------


def test_plain_memory_keeps_what_is_written(rig: Rig) -> None:
    for nbytes in (1, 1000, 3 * rig.page + 1):
        memory = rig.stack.push(PlainMemory.create(rig.driver, rig.ledger, nbytes))
        view = rig.bytes_at(memory.address, nbytes)
        view.copy_(pattern(nbytes))
        assert torch.equal(view.cpu(), pattern(nbytes))


def test_plain_memory_is_given_back_once(rig: Rig) -> None:
    address = rig.driver.allocate(100)
    rig.driver.deallocate(address)
    with refused(INVALID_VALUE):
        rig.driver.deallocate(address)


def test_plain_memory_is_opened_only_by_a_token(rig: Rig) -> None:
    for token in (b"", b"/etc/passwd", bytes(64)):
        with refused():
            rig.driver.open_allocation(token, 100)


# -- streams, events, copies -------------------------------------------------------------------------------------------


def test_copies_move_exactly_their_bytes(rig: Rig) -> None:
    expected, nbytes = torch.zeros(8 * rig.page, dtype=torch.uint8), 8 * rig.page
    source, target = rig.mapped(rig.memory(3), rig.memory(5)), rig.mapped(rig.memory(5), rig.memory(3))
    rig.bytes_at(source.address, nbytes).copy_(pattern(nbytes))
    rig.bytes_at(target.address, nbytes).zero_()
    rig.driver.synchronize()
    copies = []
    for dst, src, size in ((0, 1, 1), (3, 2 * rig.page + 7, 2 * rig.page), (7 * rig.page, 0, rig.page)):
        expected[dst : dst + size] = pattern(nbytes)[src : src + size]
        copies.append(Copy(target.address + dst, source.address + src, size))
    prepared, stream = rig.driver.prepare(copies), rig.stream()
    for _ in range(2):  # what is prepared can be used again
        rig.driver.copy(prepared, stream)
        rig.driver.synchronize(stream)
        assert torch.equal(rig.bytes_at(target.address, nbytes).cpu(), expected)
        rig.bytes_at(target.address, nbytes).zero_()
        rig.driver.synchronize()


def test_copies_reach_memory_of_torch(rig: Rig) -> None:
    ours, theirs = rig.mapped(rig.memory()), torch.zeros(rig.page, dtype=torch.uint8, device=rig.driver.device)
    rig.bytes_at(ours.address, rig.page).copy_(pattern(rig.page))
    rig.driver.synchronize()
    stream = rig.stream()
    rig.copy(Copy(theirs.data_ptr(), ours.address, rig.page), stream=stream)
    rig.driver.synchronize(stream)
    assert torch.equal(theirs.cpu(), pattern(rig.page))


def test_copies_are_given_while_the_device_is_current(rig: Rig) -> None:
    ours, theirs, stream = rig.mapped(rig.memory()), rig.mapped(rig.memory()), rig.stream()
    rig.bytes_at(theirs.address, rig.page).copy_(pattern(rig.page))
    rig.bytes_at(ours.address, rig.page).zero_()
    rig.driver.synchronize()
    codes: list[str] = []

    def attempt(offset: int) -> None:
        try:
            rig.copy(Copy(ours.address + offset, theirs.address + offset, 1), stream=stream)
        except DriverError as error:
            codes.append(error.code)

    def work() -> None:
        attempt(0)  # a new thread has no context
        with rig.driver.current():
            with rig.driver.current():
                attempt(1)
            with contextlib.suppress(ZeroDivisionError), rig.driver.current():
                raise ZeroDivisionError
            attempt(2)
        attempt(3)
        codes.append(str(rig.driver.is_current()))  # it is device 0, which is what a new thread is at anyway
        attempt(4)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    rig.driver.synchronize(stream)
    refusals = INVALID_VALUE, INVALID_CONTEXT  # the first by calls that take many copies
    assert [code in refusals or code for code in codes] == [True, True, "True"]
    first = pattern(rig.page)[:5] * torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8)  # those that were copied
    assert torch.equal(rig.bytes_at(ours.address, 5).cpu(), first)


def test_an_event_is_complete_until_it_is_recorded(rig: Rig) -> None:
    event, stream = rig.event(), rig.stream()
    assert rig.driver.complete(event)
    rig.driver.wait(stream, event)
    with rig.held(stream):
        rig.driver.record(event, stream)
        assert not rig.driver.complete(event)
    assert rig.driver.complete(event)


def test_an_event_is_complete_after_the_work_before_it(rig: Rig) -> None:
    source, target, stream, event = rig.mapped(rig.memory()), rig.mapped(rig.memory()), rig.stream(), rig.event()
    rig.bytes_at(source.address, rig.page).copy_(pattern(rig.page))
    rig.bytes_at(target.address, rig.page).zero_()
    rig.driver.synchronize()
    with rig.held(stream):
        rig.copy(Copy(target.address, source.address, rig.page), stream=stream)
        rig.driver.record(event, stream)
        # Compute does not wait for the stream. This reads by a copy, as compute-sanitizer runs no kernel meanwhile.
        assert not rig.bytes_at(target.address, rig.page).cpu().any().item()
    rig.driver.wait(rig.driver.current_stream(), event)
    assert torch.equal(rig.bytes_at(target.address, rig.page).cpu(), pattern(rig.page))


def test_a_stream_waits_for_an_event(rig: Rig) -> None:
    held, waiting, recorded, passed = rig.stream(), rig.stream(), rig.event(), rig.event()
    with rig.held(held):
        rig.driver.record(recorded, held)
        rig.driver.wait(waiting, recorded)
        rig.driver.record(passed, waiting)
        assert not rig.driver.complete(passed)
    rig.driver.synchronize(waiting)
    assert rig.driver.complete(passed)


def test_a_wait_is_for_the_latest_record_before_it(rig: Rig) -> None:
    held, free, waiting, event, passed = rig.stream(), rig.stream(), rig.stream(), rig.event(), rig.event()
    with rig.held(held):
        rig.driver.record(event, held)
        rig.driver.wait(waiting, event)
        rig.driver.record(passed, waiting)
        rig.driver.record(event, free)  # too late for the wait
        rig.driver.synchronize(free)
        assert rig.driver.complete(event)
        assert not rig.driver.complete(passed)
    rig.driver.synchronize(waiting)

    with rig.held(held):
        rig.driver.record(event, free)
        rig.driver.wait(waiting, event)
        rig.driver.record(event, held)  # too late for the wait
        rig.driver.record(passed, waiting)
        rig.driver.synchronize(waiting)
        assert rig.driver.complete(passed)


def test_time_passes_from_event_to_event(rig: Rig) -> None:
    stream, first, second = rig.stream(), rig.event(timed=True), rig.event(timed=True)
    with refused("CUDA_ERROR_INVALID_HANDLE"):
        rig.driver.elapsed(first, second)  # which were never recorded
    rig.driver.record(first, stream)
    with rig.held(stream):
        rig.driver.record(second, stream)
        with refused("CUDA_ERROR_NOT_READY"):
            rig.driver.elapsed(first, second)
    assert rig.driver.elapsed(first, second) >= 0
    assert rig.driver.elapsed(second, first) == -rig.driver.elapsed(first, second)


def test_only_timed_events_have_a_time(rig: Rig) -> None:
    stream, timed, other = rig.stream(), rig.event(timed=True), rig.event()
    for event in (timed, other):
        rig.driver.record(event, stream)
    rig.driver.synchronize(stream)
    for start, end in ((timed, other), (other, timed), (other, other)):
        with refused("CUDA_ERROR_INVALID_HANDLE"):
            rig.driver.elapsed(start, end)


def test_synchronizing_the_device_waits_for_all_streams(rig: Rig) -> None:
    events = []
    for _ in range(3):
        stream, event = rig.stream(), rig.event()
        rig.copy(Copy(rig.mapped(rig.memory()).address, rig.mapped(rig.memory()).address, rig.page), stream=stream)
        rig.driver.record(event, stream)
        events.append(event)
    rig.driver.synchronize()
    assert all(rig.driver.complete(event) for event in events)

"""Owned resources: counted while they are open, closed once, and still there when an undoing call fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vmm_dwdp.allocator.driver import Access, HandleType
from vmm_dwdp.allocator.handles import (
    KINDS,
    Allocation,
    Descriptor,
    Event,
    Ledger,
    Owned,
    PlainMemory,
    Reservation,
    ResourceStack,
    Stream,
)
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import DriverError

PAGE = 4096


class FailingDriver(HostDriver):
    """A host driver whose calls named in ``failing`` fail, and which logs the calls that undo something."""

    UNDOING = (
        "release",
        "free",
        "unmap",
        "deallocate",
        "close_allocation",
        "destroy_stream",
        "destroy_event",
    )
    TAKING = ("create", "import_", "reserve", "map", "allocate", "open_allocation", "create_stream", "create_event")

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.failing: set[str] = set()
        self.log: list[str] = []
        for name in self.UNDOING + self.TAKING:
            setattr(self, name, self._wrapped(name, getattr(self, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if name in self.failing:
                raise DriverError(name, "INJECTED", "test")
            if name in self.UNDOING:
                self.log.append(name)
            return call(*args)

        return wrapper


@pytest.fixture
def failing() -> FailingDriver:
    return FailingDriver()


def open_plain_memory(driver: HostDriver, ledger: Ledger) -> Owned:
    with PlainMemory.create(driver, Ledger(), 100) as memory:
        return PlainMemory.open(driver, ledger, memory.token(), 100)


def imported(driver: HostDriver, ledger: Ledger) -> Owned:
    with Allocation.create(driver, Ledger(), PAGE, handle_type=HandleType.POSIX_FD) as memory:
        descriptor = memory.export(HandleType.POSIX_FD)
        assert isinstance(descriptor, Descriptor)
        with descriptor:
            return Allocation.import_(driver, ledger, descriptor, HandleType.POSIX_FD, PAGE)


# kind, the call that takes it, the call that undoes it, how to make one
RESOURCES: list[tuple[str, str, str, Callable[[HostDriver, Ledger], Owned]]] = [
    ("handles", "create", "release", lambda driver, ledger: Allocation.create(driver, ledger, PAGE, label="thing")),
    ("handles", "import_", "release", imported),
    ("reservations", "reserve", "free", lambda driver, ledger: Reservation(driver, ledger, PAGE, "thing")),
    ("allocations", "allocate", "deallocate", lambda driver, ledger: PlainMemory.create(driver, ledger, 100, "thing")),
    ("allocations", "open_allocation", "close_allocation", open_plain_memory),
    ("streams", "create_stream", "destroy_stream", lambda driver, ledger: Stream(driver, ledger, "thing")),
    ("events", "create_event", "destroy_event", lambda driver, ledger: Event(driver, ledger, "thing")),
]
EACH_RESOURCE = pytest.mark.parametrize(
    ("kind", "take", "undo", "make"), RESOURCES, ids=[take for _, take, _, _ in RESOURCES]
)


@EACH_RESOURCE
def test_a_resource_is_counted_until_it_is_closed(
    failing: FailingDriver, ledger: Ledger, kind: str, take: str, undo: str, make: Callable[..., Owned]
) -> None:
    with make(failing, ledger) as resource:
        assert ledger.counts() == {each: int(each == kind) for each in KINDS}
    failing.log.clear()
    resource.close()
    assert failing.log == []  # closed once


@EACH_RESOURCE
def test_a_resource_that_was_not_taken_is_not_counted(
    failing: FailingDriver, ledger: Ledger, kind: str, take: str, undo: str, make: Callable[..., Owned]
) -> None:
    failing.failing = {take}
    with pytest.raises(DriverError, match="INJECTED"):
        make(failing, ledger)
    assert ledger.open() == []


@EACH_RESOURCE
def test_a_second_close_finishes(
    failing: FailingDriver, ledger: Ledger, kind: str, take: str, undo: str, make: Callable[..., Owned]
) -> None:
    resource = make(failing, ledger)
    failing.failing = {undo}
    for _ in range(2):
        with pytest.raises(DriverError, match=f"{undo} failed with INJECTED"):
            resource.close()
        assert ledger.counts()[kind] == len(ledger.open()) == 1
    failing.failing = set()
    resource.close()
    assert ledger.open() == []


def test_mappings_are_undone_in_reverse_order_before_the_addresses(failing: FailingDriver, ledger: Ledger) -> None:
    with ResourceStack() as stack:
        addresses = stack.push(Reservation(failing, ledger, 3 * PAGE, "addresses"))
        for page in range(3):
            addresses.map(page * PAGE, stack.push(Allocation.create(failing, ledger, PAGE, label=f"page {page}")))
        addresses.set_access(0, 3 * PAGE, Access.READ)
        assert ledger.counts() == dict.fromkeys(KINDS, 0) | {"handles": 3, "mappings": 3, "reservations": 1}
        assert "mappings: page 2 in addresses at offset 8192" in ledger.open()
    assert failing.log == ["release"] * 3 + ["unmap"] * 3 + ["free"]


def test_addresses_whose_memory_is_not_unmapped_stay(failing: FailingDriver, ledger: Ledger) -> None:
    addresses = Reservation(failing, ledger, 2 * PAGE, "addresses")
    with Allocation.create(failing, ledger, 2 * PAGE) as memory:
        addresses.map(0, memory)
    failing.failing = {"unmap"}
    with pytest.raises(DriverError, match="unmap failed"):
        addresses.close()
    assert ledger.counts()["reservations"] == ledger.counts()["mappings"] == 1
    failing.failing = {"free"}
    with pytest.raises(DriverError, match="free failed"):
        addresses.close()
    assert ledger.open() == ["reservations: addresses"]
    failing.failing = set()
    addresses.close()


def test_memory_that_is_not_mapped_is_not_counted_as_mapped(failing: FailingDriver, ledger: Ledger) -> None:
    failing.failing = {"map"}
    with (
        Allocation.create(failing, ledger, PAGE) as memory,
        Reservation(failing, ledger, PAGE) as addresses,
        pytest.raises(DriverError, match="map failed"),
    ):
        addresses.map(0, memory)
    assert ledger.open() == []


class Note(Owned):
    """Appends its name to a list when it is closed, and fails while ``broken``."""

    def __init__(self, name: str, closed: list[str], broken: bool = False) -> None:
        self.name, self.closed, self.broken = name, closed, broken

    def close(self) -> None:
        if self.broken:
            raise DriverError(self.name, "BROKEN", "close")
        self.closed.append(self.name)


def test_a_stack_goes_on_past_failures_and_keeps_what_failed() -> None:
    closed: list[str] = []
    stack = ResourceStack()
    notes = [stack.push(Note(name, closed, broken=name in "bd")) for name in "abcde"]
    with pytest.raises(DriverError, match="d failed with BROKEN") as failure:
        stack.close()
    assert closed == ["e", "c", "a"]
    assert failure.value.__notes__ == ["and then: b failed with BROKEN while trying to close"]
    for note in notes:
        note.broken = False
    stack.close()
    assert closed == ["e", "c", "a", "d", "b"]
    stack.close()
    assert len(closed) == 5


def test_an_exception_in_the_block_closes_the_stack() -> None:
    closed: list[str] = []
    stack = ResourceStack()
    stack.push(Note("a", closed))
    with pytest.raises(ZeroDivisionError), stack:
        raise ZeroDivisionError
    assert closed == ["a"]


def test_a_close_that_fails_is_a_note_on_what_the_block_raised() -> None:
    note = Note("a", [], broken=True)
    with pytest.raises(ZeroDivisionError) as raised, note:
        raise ZeroDivisionError
    assert raised.value.__notes__ == ["and then: a failed with BROKEN while trying to close"]
    with pytest.raises(DriverError, match="BROKEN"), note:
        pass


def test_a_sweep_closes_what_nobody_owns_and_leaves_memory_alone(failing: FailingDriver, ledger: Ledger) -> None:
    Stream(failing, ledger)
    Event(failing, ledger)
    Allocation.create(failing, ledger, PAGE)
    with Reservation(failing, ledger, PAGE, "addresses"):
        ledger.sweep()
        assert failing.log == ["release", "destroy_event", "destroy_stream"]
        assert ledger.open() == ["reservations: addresses"]


def test_a_descriptor_closes_the_kernel_s(ledger: Ledger, open_descriptors: None) -> None:
    with Descriptor(ledger, os.open("/dev/null", os.O_RDONLY)) as descriptor:
        assert ledger.counts()["descriptors"] == 1
        os.fstat(descriptor.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor.fd)


def test_a_descriptor_that_somebody_else_closed(open_descriptors: None) -> None:
    ledger = Ledger()
    descriptor = Descriptor(ledger, os.open("/dev/null", os.O_RDONLY), "the descriptor")
    os.close(descriptor.fd)
    with pytest.raises(DriverError, match="dup failed with EBADF while trying to duplicate the descriptor"):
        descriptor.duplicate()
    with pytest.raises(DriverError, match="close failed with EBADF while trying to close the descriptor"):
        descriptor.close()
    assert ledger.open() == ["descriptors: the descriptor"]


def test_a_ledger_counts_from_many_threads() -> None:
    ledger = Ledger()

    def work() -> None:
        for _ in range(200):
            kept, removed = ledger.add("events", "kept"), ledger.add("events", "removed")
            assert kept != removed
            ledger.remove(removed)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.counts()["events"] == 1600
    assert set(ledger.open()) == {"events: kept"}


def test_a_ledger_refuses_what_it_does_not_count() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="does not count 'kernels'"):
        ledger.add("kernels", "")
    token = ledger.add("threads", "")
    ledger.remove(token)
    with pytest.raises(KeyError):
        ledger.remove(token)

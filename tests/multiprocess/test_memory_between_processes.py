"""The rules of memory that two processes share: like those of test_driver_conformance.py, every driver keeps them."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import DEVICE, Access, Copy, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Descriptor, Ledger, PlainMemory, Reservation, ResourceStack
from vmm_dwdp.allocator.sharing import receive, send
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.errors import DriverError

HOST = Location(numa_node=0)
LOCATIONS = (DEVICE, HOST)
PAGES = 2
PLAIN_BYTES = 5000
FAULTED = 3

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["vmm_dwdp.allocator"])


def deadline() -> float:
    return time.monotonic() + 60


def open_small(device: str) -> Driver:
    """The driver, with the smallest pages it has."""
    return open_driver(torch.device(device), granularity=4096 if device == "cpu" else None)


def view_of(driver: Driver, address: int, nbytes: int) -> torch.Tensor:
    return tensor_at(address, (nbytes,), torch.uint8, driver.device)


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def digest(content: torch.Tensor) -> bytes:
    return hashlib.sha256(content.cpu().numpy().tobytes()).digest()


class Side:
    """One process's driver, and what it has of it."""

    def __init__(self, driver: Driver, ledger: Ledger, stack: ResourceStack) -> None:
        self.driver, self.ledger, self.stack = driver, ledger, stack
        self.nbytes = PAGES * driver.granularity()

    def create(self, location: Location) -> Allocation:
        return self.stack.push(Allocation.create(self.driver, self.ledger, self.nbytes, location, HandleType.POSIX_FD))

    def export(self, memory: Allocation) -> Descriptor:
        descriptor = memory.export(HandleType.POSIX_FD)
        assert isinstance(descriptor, Descriptor)
        return self.stack.push(descriptor)

    def import_(self, descriptor: Descriptor) -> Allocation:
        return self.stack.push(
            Allocation.import_(self.driver, self.ledger, descriptor, HandleType.POSIX_FD, self.nbytes)
        )

    def map(self, memory: Allocation, access: Access) -> torch.Tensor:
        addresses = self.stack.push(Reservation(self.driver, self.ledger, self.nbytes))
        addresses.map(0, memory)
        addresses.set_access(0, self.nbytes, access)
        return view_of(self.driver, addresses.address, self.nbytes)


def export(device: str, path: str) -> None:
    """The other process: shares memory at each location, and plain memory; then answers every message with digests of
    what they hold now, until it is killed."""
    side = Side(open_small(device), Ledger(), ResourceStack())
    memories = [side.create(location) for location in LOCATIONS]
    plain = side.stack.push(PlainMemory.create(side.driver, side.ledger, PLAIN_BYTES))
    views = [side.map(memory, Access.READ_WRITE) for memory in memories]
    views.append(view_of(side.driver, plain.address, PLAIN_BYTES))
    for seed, view in enumerate(views):
        view.copy_(pattern(view.numel(), seed))
    side.driver.synchronize()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        send(sock, plain.token(), [side.export(memory).fd for memory in memories], deadline=deadline())
        while True:
            receive(sock, max_bytes=0, max_fds=0, deadline=deadline(), ledger=side.ledger)
            send(sock, b"".join(map(digest, views)), deadline=deadline())


class Exporter(NamedTuple):
    """A process that runs `export`, and what it has sent."""

    process: BaseProcess
    sock: socket.socket
    descriptors: list[Descriptor]
    token: bytes

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def digests(self) -> list[bytes]:
        send(self.sock, b"", deadline=deadline())
        answer, _ = receive(self.sock, max_bytes=1000, max_fds=0, deadline=deadline(), ledger=Ledger())
        return [answer[first : first + 32] for first in range(0, len(answer), 32)]


@pytest.fixture
def exporter(driver: Driver, ledger: Ledger, stack: ResourceStack, tmp_path: Path) -> Iterator[Exporter]:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(60)
        process = processes.Process(target=export, args=(driver.device.type, path))
        process.start()
        try:
            sock, _ = listener.accept()
            with sock:
                token, descriptors = receive(sock, max_bytes=1000, max_fds=9, deadline=deadline(), ledger=ledger)
                for descriptor in descriptors:
                    stack.push(descriptor)
                yield Exporter(process, sock, descriptors, token)
        finally:
            process.kill()
            process.join()
            process.close()


@pytest.fixture
def side(driver: Driver, ledger: Ledger, stack: ResourceStack) -> Iterator[Side]:
    yield Side(driver, ledger, stack)
    driver.synchronize()  # before the stack unmaps what kernels may still use


def test_what_one_process_writes_the_other_reads(exporter: Exporter, side: Side) -> None:
    views = [side.map(side.import_(descriptor), Access.READ_WRITE) for descriptor in exporter.descriptors]
    assert len(views) == len(LOCATIONS)
    for seed, view in enumerate(views):
        assert torch.equal(view.cpu(), pattern(side.nbytes, seed))
        view.copy_(pattern(side.nbytes, seed + 10))
    side.driver.synchronize()
    assert exporter.digests()[: len(views)] == [digest(pattern(side.nbytes, seed)) for seed in (10, 11)]


def test_memory_imported_to_be_read_refuses_to_be_written(exporter: Exporter, side: Side) -> None:
    before = exporter.digests()
    own = torch.zeros(side.nbytes, dtype=torch.uint8, device=side.driver.device)
    for descriptor in exporter.descriptors:
        view = side.map(side.import_(descriptor), Access.READ)
        copies = side.driver.prepare([Copy(view.data_ptr(), own.data_ptr(), side.nbytes)])
        with pytest.raises(DriverError) as refusal:
            side.driver.copy(copies, side.driver.current_stream())
        assert refusal.value.code == "CUDA_ERROR_INVALID_VALUE"
    side.driver.synchronize()
    assert exporter.digests() == before


def test_memory_survives_the_process_that_created_it(exporter: Exporter, side: Side) -> None:
    mapped_before = [side.map(side.import_(descriptor), Access.READ) for descriptor in exporter.descriptors]
    exporter.kill()
    mapped_after = [side.map(side.import_(descriptor), Access.READ_WRITE) for descriptor in exporter.descriptors]
    for seed, (old, new) in enumerate(zip(mapped_before, mapped_after, strict=True)):
        assert torch.equal(old.cpu(), pattern(side.nbytes, seed))
        new.zero_()
        side.driver.synchronize()
        assert not old.any().item()


def test_plain_memory_is_shared_by_its_token(exporter: Exporter, side: Side) -> None:
    with pytest.raises(DriverError):
        side.driver.open_allocation(exporter.token, PLAIN_BYTES + 1)
    with PlainMemory.open(side.driver, side.ledger, exporter.token, PLAIN_BYTES) as plain:
        view = view_of(side.driver, plain.address, PLAIN_BYTES)
        assert torch.equal(view.cpu(), pattern(PLAIN_BYTES, len(LOCATIONS)))
        view.fill_(8)
        side.driver.synchronize()
    assert exporter.digests()[-1] == digest(torch.full((PLAIN_BYTES,), 8, dtype=torch.uint8))


def test_a_token_is_worth_nothing_once_its_process_is_gone(exporter: Exporter, side: Side) -> None:
    exporter.kill()
    with pytest.raises(DriverError):
        side.driver.open_allocation(exporter.token, PLAIN_BYTES)


def write_what_may_be_read(device: str, location: Location, imported: bool) -> None:
    """A kernel writes memory that is mapped to be read: the process ends by SIGSEGV, or with status `FAULTED`."""
    side = Side(open_small(device), Ledger(), ResourceStack())
    memory = side.create(location)
    view = side.map(side.import_(side.export(memory)) if imported else memory, Access.READ)
    view.sum().item()  # reading is fine
    view.fill_(1)
    try:
        side.driver.synchronize()
    except DriverError as error:
        sys.exit(FAULTED if error.code == "CUDA_ERROR_ILLEGAL_ADDRESS" else f"another error: {error}")


@pytest.mark.faults
@pytest.mark.parametrize("imported", [False, True], ids=["own", "imported"])
@pytest.mark.parametrize("location", LOCATIONS, ids=str)
def test_a_kernel_that_writes_what_may_be_read_faults(driver: Driver, location: Location, imported: bool) -> None:
    process = processes.Process(target=write_what_may_be_read, args=(driver.device.type, location, imported))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGSEGV if driver.name == "host" else FAULTED)

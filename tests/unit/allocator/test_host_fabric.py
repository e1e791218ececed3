"""The host's fabric handles: names that any process resolves as long as anybody holds the memory, and none after."""

from __future__ import annotations

import multiprocessing
import os
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from support.ranks import start_server

from vmm_dwdp import DriverError
from vmm_dwdp.allocator.driver import Access, HandleType
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.tensors import tensor_at

PAGE = 4096
FABRIC = HandleType.FABRIC
pytestmark = pytest.mark.usefixtures("open_descriptors")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """It keeps descriptors open, which are no test's."""
    start_server()


@pytest.fixture
def host() -> HostDriver:
    return HostDriver(PAGE)


@pytest.fixture
def elsewhere() -> Iterator[tuple[bytes, Callable[[], None]]]:
    """A name of memory that begins with 7, made by another process, and what kills that."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=_create, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def kill() -> None:
        process.kill()
        process.join()

    try:
        yield ours.recv(), kill
    finally:
        kill()
        process.close()
        ours.close()


def _create(commands: Connection) -> None:
    host, ledger = HostDriver(PAGE), Ledger()
    memory = Allocation.create(host, ledger, PAGE, handle_type=FABRIC)
    _first_byte(host, ledger, memory, 7)
    commands.send(memory.export(FABRIC))
    commands.recv()


def _first_byte(host: HostDriver, ledger: Ledger, memory: Allocation, write: int | None = None) -> int:
    with Reservation(host, ledger, PAGE) as addresses:
        addresses.map(0, memory)
        addresses.set_access(0, PAGE, Access.READ_WRITE)
        found = tensor_at(addresses.address, (PAGE,), torch.uint8, host.device)
        if write is not None:
            found[0] = write
        return int(found[0])


def test_a_name_is_resolved_in_another_process(
    host: HostDriver, ledger: Ledger, elsewhere: tuple[bytes, Callable[[], None]]
) -> None:
    name, _ = elsewhere
    with Allocation.import_(host, ledger, name, FABRIC, PAGE) as memory:
        assert _first_byte(host, ledger, memory) == 7


def test_whoever_holds_the_memory_stands_for_who_made_it(
    host: HostDriver, ledger: Ledger, elsewhere: tuple[bytes, Callable[[], None]]
) -> None:
    """The name that the dead made, and the one that a survivor makes; and when the last has gone, neither."""
    name, kill = elsewhere
    with Allocation.import_(host, ledger, name, FABRIC, PAGE) as memory:
        kill()
        anew = memory.export(FABRIC)
        for each in (name, anew):
            with Allocation.import_(host, ledger, each, FABRIC, PAGE) as again:
                assert _first_byte(host, ledger, again) == 7
    for each in (name, anew):
        with pytest.raises(DriverError, match="whose memory nobody holds any more"):
            host.import_(each, FABRIC, PAGE)  # type: ignore[arg-type]


def test_another_file_with_the_number_in_the_name_is_not_taken_for_it(host: HostDriver, ledger: Ledger) -> None:
    with Allocation.create(host, ledger, PAGE, handle_type=FABRIC) as memory:
        name = memory.export(FABRIC)
        assert isinstance(name, bytes)
    with (
        Allocation.create(host, ledger, PAGE, handle_type=FABRIC),  # gets that number
        pytest.raises(DriverError, match="nobody holds any more"),
    ):
        host.import_(name, FABRIC, PAGE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name: name[:-1], "63 bytes that are no fabric handle"),
        (lambda name: b"", "0 bytes that are no fabric handle"),
        (lambda name: bytes(64), "64 bytes that are no fabric handle"),
        (lambda name: name[:8] + bytes(16) + name[24:], "of another machine"),
        (lambda name: name[:24] + bytes(16) + name[40:], "nobody holds any more"),
    ],
)
def test_bytes_that_name_nothing(
    host: HostDriver, ledger: Ledger, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with Allocation.create(host, ledger, PAGE, handle_type=FABRIC) as memory:
        name = memory.export(FABRIC)
        assert isinstance(name, bytes)
        with pytest.raises(DriverError, match=sentence):
            host.import_(change(name), FABRIC, PAGE)


def test_a_wrong_hint_is_only_slower(host: HostDriver, ledger: Ledger) -> None:
    with Allocation.create(host, ledger, PAGE, handle_type=FABRIC) as memory:
        name = memory.export(FABRIC)
        assert isinstance(name, bytes)
        for fd, process in ((0, os.getpid()), (1 << 31, 1 << 31), (0, 1)):
            hinted = name[:40] + struct.pack("!II", fd, process) + name[48:]
            host.release(host.import_(hinted, FABRIC, PAGE))

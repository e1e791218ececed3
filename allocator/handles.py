"""Owned driver resources: each is closed once, by one owner, and counted in a ledger until then.

A resource exists from the moment its constructor returns until `close` returns. If the constructor raises, nothing was
taken. If `close` raises because the undoing call failed, the resource is still open and still in the ledger, and
another `close` tries again. Nothing is closed by the garbage collector: what was forgotten shows in the ledger.
"""

from __future__ import annotations

import abc
import collections
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from vmm_dwdp.allocator.driver import DEVICE, Access, Address, Driver, HandleId, HandleType, Location
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import DriverError

KINDS: Final = (
    "handles",
    "mappings",
    "reservations",
    "allocations",
    "descriptors",
    "streams",
    "events",
    "threads",
)

_NEVER_KEPT: Final = ("handles", "descriptors", "streams", "events")

T = TypeVar("T", bound="Owned")


class Ledger:
    """What is open, by kind. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._entries: dict[int, tuple[str, str, Owned | None]] = {}

    def add(self, kind: str, label: str, owned: Owned | None = None) -> int:
        """Count one more of ``kind``, one of `KINDS`; returns the token that `remove` takes."""
        if kind not in KINDS:
            raise ValueError(f"a ledger does not count {kind!r}: its kinds are {', '.join(KINDS)}")
        with self._lock:
            token = next(self._tokens)
            self._entries[token] = (kind, label, owned)
        return token

    def remove(self, token: int) -> None:
        """Count it no longer; raises `KeyError` for a token that is not open."""
        with self._lock:
            del self._entries[token]

    def counts(self) -> dict[str, int]:
        """How many are open of each kind (handles, mappings, reservations, ...), zeros included."""
        with self._lock:
            found = collections.Counter(kind for kind, _, _ in self._entries.values())
        return {kind: found[kind] for kind in KINDS}

    def open(self) -> list[str]:
        """One line for each that is open, oldest first."""
        with self._lock:
            return [f"{kind}: {label}" for kind, label, _ in self._entries.values()]

    def sweep(self) -> None:
        """Close what has no owner any more, because whoever was to own it was interrupted before it did. To be called
        when all owners have closed what is theirs; memory that a caller's tensors may keep is left alone."""
        with self._lock:
            left = [owned for kind, _, owned in self._entries.values() if kind in _NEVER_KEPT]
        for owned in reversed(left):
            if owned is not None:
                owned.close()


def undo_after(error: BaseException | None, undo: Callable[[], object]) -> None:
    """Call ``undo`` after something that raised ``error``, which stays what is raised: a failure of ``undo`` becomes a
    note on it. Without an ``error`` the failure is raised."""
    try:
        undo()
    except Exception as failure:
        if error is None:
            raise
        error.add_note(f"and then: {failure}")


class Owned(abc.ABC):
    """Something that its owner closes, at the latest at the end of a ``with`` block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give it back; does nothing if that is already done. Raises `DriverError` if the driver refuses."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        undo_after(error, self.close)


class Failures:
    """What went wrong in steps of which none is to stop the others."""

    def __init__(self) -> None:
        self._failures: list[Exception] = []

    def __bool__(self) -> bool:
        return bool(self._failures)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """One step."""
        try:
            yield
        except Exception as failure:
            self._failures.append(failure)

    def raise_first(self, *notes: str) -> None:
        """Raise the first failure, with the others and ``notes`` as notes on it; do nothing if there is none."""
        if self._failures:
            first, *others = self._failures
            for note in (*(f"and then: {other}" for other in others), *notes):
                first.add_note(note)
            raise first


class ResourceStack(Owned):
    """Resources that are closed in the reverse of the order in which they were pushed. Threads take turns."""

    def __init__(self) -> None:
        self._resources: list[Owned] = []
        self._lock = threading.RLock()  # what is closed may close others of the same stack

    def push(self, owned: T) -> T:
        """Take ``owned`` over, and return it."""
        self._resources.append(owned)
        return owned

    def close_one(self, owned: Owned) -> None:
        """Close one of them before its turn; it stays if that fails. A second call does nothing."""
        with uninterrupted(), self._lock:
            owned.close()
            if owned in self._resources:
                self._resources.remove(owned)

    def close(self) -> None:
        """Close all of them. One that fails is kept for the next `close`, and does not stop the others.

        Raises the first failure, with the others as notes on it.
        """
        failures = Failures()
        with uninterrupted(), self._lock:
            for index in reversed(range(len(self._resources))):
                with failures.noted():
                    self._resources[index].close()
                    del self._resources[index]
        failures.raise_first()


class _Whole(abc.ABCMeta):
    """Of classes whose objects take something when they are made: what is taken is counted, whatever signal comes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with uninterrupted():
            return super().__call__(*args, **kwargs)


class _Counted(Owned, metaclass=_Whole):
    """One entry of a ledger, from construction until `close` has undone it."""

    def __init__(self, ledger: Ledger, kind: str, label: str) -> None:
        self.label = label
        self._ledger = ledger
        self._token: int | None = ledger.add(kind, label, self)

    def close(self) -> None:
        if self._token is None:
            return
        with uninterrupted():
            self._undo()
            self._ledger.remove(self._token)
            self._token = None

    @abc.abstractmethod
    def _undo(self) -> None:
        """The driver's undoing call."""


class Descriptor(_Counted):
    """An open file descriptor, ``fd``."""

    def __init__(self, ledger: Ledger, fd: int, label: str = "") -> None:
        super().__init__(ledger, "descriptors", label or f"descriptor {fd}")
        self.fd = fd

    def duplicate(self) -> Descriptor:
        """Another descriptor of the same file, which the caller owns."""
        try:
            with uninterrupted():
                return Descriptor(self._ledger, os.dup(self.fd), self.label)
        except OSError as error:
            raise _failure("dup", error, f"duplicate {self.label}") from error

    def _undo(self) -> None:
        try:
            os.close(self.fd)
        except OSError as error:
            raise _failure("close", error, f"close {self.label}") from error


def _failure(call: str, error: OSError, attempt: str) -> DriverError:
    return DriverError(call, errno.errorcode.get(error.errno or 0, str(error)), attempt)


class Allocation(_Counted):
    """Physical memory: ``nbytes`` behind the driver's ``handle``. It may be closed while it is mapped."""

    def __init__(self, driver: Driver, ledger: Ledger, handle: HandleId, nbytes: int, label: str) -> None:
        """Takes over ``handle``; `create` and `import_` are the ways to get one."""
        super().__init__(ledger, "handles", label or f"{nbytes} bytes")
        self.handle = handle
        self.nbytes = nbytes
        self._driver = driver

    @classmethod
    def create(
        cls,
        driver: Driver,
        ledger: Ledger,
        nbytes: int,
        location: Location = DEVICE,
        handle_type: HandleType | None = None,
        label: str = "",
    ) -> Self:
        """New memory; ``nbytes`` is a multiple of the driver's granularity at ``location``."""
        with uninterrupted():
            return cls(driver, ledger, driver.create(nbytes, location, handle_type), nbytes, label)

    @classmethod
    def import_(
        cls,
        driver: Driver,
        ledger: Ledger,
        shared: Descriptor | bytes,
        handle_type: HandleType,
        nbytes: int,
        label: str = "",
    ) -> Self:
        """Another process's memory of ``nbytes``; ``shared`` stays with the caller, who may close it afterwards."""
        value = shared.fd if isinstance(shared, Descriptor) else shared
        with uninterrupted():
            return cls(driver, ledger, driver.import_(value, handle_type, nbytes), nbytes, label)

    def export(self, handle_type: HandleType) -> Descriptor | bytes:
        """What another process can import; a descriptor belongs to the caller."""
        with uninterrupted():
            shared = self._driver.export(self.handle, handle_type)
            return Descriptor(self._ledger, shared, self.label) if isinstance(shared, int) else shared

    def _undo(self) -> None:
        self._driver.release(self.handle)


class Mapping(_Counted):
    """A whole allocation at one address."""

    def __init__(self, driver: Driver, ledger: Ledger, address: Address, allocation: Allocation, label: str) -> None:
        driver.map(address, allocation.nbytes, allocation.handle)
        super().__init__(ledger, "mappings", label)
        self.address = address
        self.nbytes = allocation.nbytes
        self._driver = driver

    def _undo(self) -> None:
        self._driver.unmap(self.address, self.nbytes)


class Reservation(_Counted):
    """``nbytes`` of addresses from ``address``, a multiple of the granularity, with what is mapped there."""

    def __init__(self, driver: Driver, ledger: Ledger, nbytes: int, label: str = "") -> None:
        self.address = driver.reserve(nbytes)
        super().__init__(ledger, "reservations", label or f"{nbytes} bytes at {self.address:#x}")
        self.nbytes = nbytes
        self._driver = driver
        self._mappings = ResourceStack()

    def at(self, offset: int) -> Address:
        """Of the byte at ``offset``."""
        return Address(self.address + offset)

    def map(self, offset: int, allocation: Allocation) -> Mapping:
        """Put the whole allocation at ``offset``; `set_access` comes next. It stays mapped until `unmap` or `close`."""
        label = f"{allocation.label} in {self.label} at offset {offset}"
        with uninterrupted():
            return self._mappings.push(Mapping(self._driver, self._ledger, self.at(offset), allocation, label))

    def unmap(self, mapping: Mapping) -> None:
        """Undo `map`, which returned ``mapping``: other memory may come there. Nothing uses it any more."""
        self._mappings.close_one(mapping)

    def clear(self) -> None:
        """Undo every `map`; the addresses stay. Nothing uses them any more. Another call goes on where one failed."""
        self._mappings.close()

    def set_access(self, offset: int, nbytes: int, access: Access) -> None:
        """Allow this device to use the mappings that make up exactly ``[offset, offset + nbytes)``."""
        self._driver.set_access(self.at(offset), nbytes, access)

    def _undo(self) -> None:
        self._mappings.close()
        self._driver.free(self.address, self.nbytes)


class PlainMemory(_Counted):
    """``nbytes`` of ordinary device memory at ``address``, of this process or opened from another one."""

    def __init__(self, driver: Driver, ledger: Ledger, address: Address, nbytes: int, label: str, opened: bool) -> None:
        """Takes over ``address``; `create` and `open` are the ways to get one."""
        super().__init__(ledger, "allocations", label or f"{nbytes} bytes at {address:#x}")
        self.address = address
        self.nbytes = nbytes
        self._driver = driver
        self._opened = opened

    @classmethod
    def create(cls, driver: Driver, ledger: Ledger, nbytes: int, label: str = "") -> Self:
        """New memory of this process."""
        with uninterrupted():
            return cls(driver, ledger, driver.allocate(nbytes), nbytes, label, opened=False)

    @classmethod
    def open(cls, driver: Driver, ledger: Ledger, token: bytes, nbytes: int, label: str = "") -> Self:
        """The ``nbytes`` whose `token` another process of this machine sent."""
        with uninterrupted():
            return cls(driver, ledger, driver.open_allocation(token, nbytes), nbytes, label, opened=True)

    def at(self, offset: int) -> Address:
        """Of the byte at ``offset``."""
        return Address(self.address + offset)

    def token(self) -> bytes:
        """What another process opens this memory by, while this process holds it."""
        return self._driver.export_allocation(self.address)

    def _undo(self) -> None:
        if self._opened:
            self._driver.close_allocation(self.address)
        else:
            self._driver.deallocate(self.address)


class Stream(_Counted):
    """A stream for copies, ``stream`` to the driver. Synchronise it before `close`."""

    def __init__(self, driver: Driver, ledger: Ledger, label: str = "") -> None:
        self.stream = driver.create_stream()
        super().__init__(ledger, "streams", label or f"stream {self.stream:#x}")
        self._driver = driver

    def _undo(self) -> None:
        self._driver.destroy_stream(self.stream)


class Event(_Counted):
    """``event`` to the driver; `Driver.elapsed` takes it if it is ``timed``."""

    def __init__(self, driver: Driver, ledger: Ledger, label: str = "", *, timed: bool = False) -> None:
        self.event = driver.create_event(timed)
        super().__init__(ledger, "events", label or f"event {self.event:#x}")
        self._driver = driver

    def _undo(self) -> None:
        self._driver.destroy_event(self.event)

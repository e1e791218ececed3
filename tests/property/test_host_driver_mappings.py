"""The host driver's tables against a page-by-page model, and against what the kernel says of every page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_dwdp.allocator.driver import Access, Copy
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.errors import DriverError

PAGE = 4096
PAGES = 8
FLAGS = {None: "---s", Access.READ: "r--s", Access.READ_WRITE: "rw-s"}


@dataclass(frozen=True)
class Operation:
    """``name`` applied to ``count`` pages from page ``first``; for a copy, bytes from that page to page ``source``."""

    name: str
    first: int
    count: int
    access: Access
    source: int


def overlaps(operation: Operation) -> bool:
    """A copy onto itself, which no driver promises anything about."""
    return operation.name == "copy" and abs(operation.first - operation.source) < operation.count


operations = st.builds(
    Operation,
    name=st.sampled_from(["map", "map", "unmap", "set_access", "set_access", "copy", "free"]),
    first=st.integers(0, PAGES - 1),
    count=st.integers(1, 4),
    access=st.sampled_from(Access),
    source=st.integers(0, PAGES - 1),
).filter(lambda operation: not overlaps(operation))


class Model:
    """Which mapping each page belongs to, and what it allows."""

    def __init__(self) -> None:
        self.mapping: list[int | None] = [None] * PAGES
        self.access: list[Access | None] = [None] * PAGES
        self._mappings = 0

    def accepts(self, operation: Operation) -> bool:
        """Whether the operation is allowed; if so, it is done."""
        pages = range(operation.first, operation.first + operation.count)
        if pages.stop > PAGES:
            return False
        mappings = {self.mapping[page] for page in pages}
        whole = None not in mappings and all((m in mappings) == (p in pages) for p, m in enumerate(self.mapping))
        match operation.name:
            case "map":
                if mappings != {None}:
                    return False
                self._mappings += 1
                self._set(pages, self._mappings, None)
            case "unmap":
                if not whole:
                    return False
                self._set(pages, None, None)
            case "set_access":
                if not whole:
                    return False
                for page in pages:
                    self.access[page] = operation.access
            case "copy":
                sources = range(operation.source, operation.source + operation.count)
                readable = sources.stop <= PAGES and all(self.access[page] is not None for page in sources)
                return readable and all(self.access[page] is Access.READ_WRITE for page in pages)
            case "free":
                return False  # of less than everything
        return True

    def _set(self, pages: range, mapping: int | None, access: Access | None) -> None:
        for page in pages:
            self.mapping[page], self.access[page] = mapping, access

    def flags(self) -> list[str]:
        """As /proc/self/maps shows each page."""
        return [
            "---p" if mapping is None else FLAGS[access]
            for mapping, access in zip(self.mapping, self.access, strict=True)
        ]


def kernel_flags(address: int) -> list[str]:
    lines = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in addresses.split("-")), flags) for addresses, flags in lines]
    pages = range(address, address + PAGES * PAGE, PAGE)
    return [next(flags for first, last, flags in ranges if first <= page < last) for page in pages]


def apply(driver: HostDriver, address: int, operation: Operation) -> None:
    start, nbytes = address + operation.first * PAGE, operation.count * PAGE
    match operation.name:
        case "map":
            handle = driver.create(nbytes)
            try:
                driver.map(start, nbytes, handle)
            finally:
                driver.release(handle)
        case "unmap":
            driver.unmap(start, nbytes)
        case "set_access":
            driver.set_access(start, nbytes, operation.access)
        case "copy":
            # A byte less on both sides: a copy need not begin or end where a page does.
            source = address + operation.source * PAGE
            driver.copy(driver.prepare([Copy(start + 1, source + 1, nbytes - 2)]), 0)
        case "free":
            driver.free(start, nbytes)


@settings(max_examples=200, deadline=None)
@given(st.lists(operations, max_size=25))
def test_the_tables_agree_with_a_model_and_with_the_kernel(sequence: list[Operation]) -> None:
    driver, model = HostDriver(PAGE), Model()
    address = driver.reserve(PAGES * PAGE)
    try:
        for operation in sequence:
            accepted = model.accepts(operation)
            try:
                apply(driver, address, operation)
            except DriverError:
                assert not accepted, operation
            else:
                assert accepted, operation
            assert kernel_flags(address) == model.flags()
    finally:
        for mapping in dict.fromkeys(filter(None, model.mapping)):
            first, count = model.mapping.index(mapping), model.mapping.count(mapping)
            driver.unmap(address + first * PAGE, count * PAGE)
        driver.free(address, PAGES * PAGE)

"""What the allocator's calls cost, and how long they take for a model of the size of DeepSeek-R1.

calls     microseconds a handle, for handles of one size that are mapped side by side into one range. Access is set by
          one call for the whole range; everything else takes a call a handle.
copies    microseconds a copy until `Driver.copy` returns, for slices of host memory given to a stream together.
set-up    seconds in which one rank of four sets up 58 layers of four weights: it creates and exports its own shards,
          imports those of three peers (made in this process), maps each of them to be read, and maps each assembled
          range, its own shard between two blocks of a slot. Weights have the shapes of NVFP4 DeepSeek-R1, their bytes
          divided by --scale: that saves memory, and leaves the number of calls as it is.
"""

from __future__ import annotations

import functools
import itertools
import time

from common import Row, medians, parser, report

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import DEVICE, Access, Copy, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Descriptor, Ledger, Reservation, ResourceStack, Stream

MIB = 1 << 20
HANDLES = [(1, 2 * MIB), (64, 2 * MIB), (300, 2 * MIB), (1, 64 * MIB), (64, 16 * MIB), (1, 1024 * MIB)]
SLICES = [1, 16, 64, 256, 1024]
SLICE_BYTES = 2 * MIB

LAYERS, EXPERTS, RANKS, SLOTS = 58, 256, 4, 2
HIDDEN, INTERMEDIATE = 7168, 2048
EXPERT_BYTES = {
    "w13": 2 * INTERMEDIATE * HIDDEN // 2,
    "w2": HIDDEN * INTERMEDIATE // 2,
    "w13_scale": 2 * INTERMEDIATE * HIDDEN // 16,
    "w2_scale": HIDDEN * INTERMEDIATE // 16,
}


class Stopwatch:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        since, self._since = self._since, time.perf_counter()
        return self._since - since


def export(memory: Allocation) -> Descriptor:
    descriptor = memory.export(HandleType.POSIX_FD)
    assert isinstance(descriptor, Descriptor)
    return descriptor


def calls(driver: Driver, count: int, nbytes: int) -> dict[str, float]:
    """Seconds for each step over ``count`` handles of ``nbytes``."""
    fd = HandleType.POSIX_FD
    seconds = {}
    watch = Stopwatch()
    handles = [driver.create(nbytes, handle_type=fd) for _ in range(count)]
    seconds["create"] = watch.read()
    ledger, exported = Ledger(), ResourceStack()
    descriptors = [exported.push(Descriptor(ledger, int(driver.export(handle, fd)))) for handle in handles]
    seconds["export"] = watch.read()
    imported = [driver.import_(descriptor.fd, fd, nbytes) for descriptor in descriptors]
    seconds["import"] = watch.read()
    exported.close()
    watch.read()
    address = driver.reserve(count * nbytes)
    seconds["reserve"] = watch.read()
    for index, handle in enumerate(imported):
        driver.map(address + index * nbytes, nbytes, handle)
    seconds["map"] = watch.read()
    driver.set_access(address, count * nbytes, Access.READ_WRITE)
    seconds["set_access"] = watch.read()
    for index in range(count):
        driver.unmap(address + index * nbytes, nbytes)
    seconds["unmap"] = watch.read()
    driver.free(address, count * nbytes)
    seconds["free"] = watch.read()
    for handle in imported + handles:
        driver.release(handle)
    seconds["release"] = watch.read() / 2
    return seconds


def copies(driver: Driver, count: int) -> dict[str, float]:
    """Microseconds a copy to prepare, and to give to a stream, ``count`` copies."""
    ledger = Ledger()
    with ResourceStack() as stack:
        addresses = []
        for location in (DEVICE, Location(numa_node=0)):
            memory = stack.push(Allocation.create(driver, ledger, SLICE_BYTES, location))
            mapped = stack.push(Reservation(driver, ledger, SLICE_BYTES))
            mapped.map(0, memory)
            mapped.set_access(0, SLICE_BYTES, Access.READ_WRITE)
            addresses.append(mapped.address)
        stream = stack.push(Stream(driver, ledger)).stream
        watch = Stopwatch()
        prepared = driver.prepare([Copy(*addresses, SLICE_BYTES)] * count)
        prepare = watch.read()
        driver.copy(prepared, stream)
        issue = watch.read()
        driver.synchronize(stream)
    return {"prepare": prepare / count * 1e6, "copy": issue / count * 1e6}


def set_up(driver: Driver, scale: int) -> dict[str, float]:
    """Seconds for each step of one rank of four."""
    page, fd = driver.granularity(), HandleType.POSIX_FD
    shards = {weight: _round_up(EXPERTS // RANKS * nbytes // scale, page) for weight, nbytes in EXPERT_BYTES.items()}
    keys = list(itertools.product(range(LAYERS), shards))
    ledger, seconds = Ledger(), {}
    with ResourceStack() as stack:
        # One peer's shards stand for those of all three: importing does not tell them apart.
        peer = [stack.push(Allocation.create(driver, ledger, shards[weight], handle_type=fd)) for _, weight in keys]
        offers = [stack.push(export(memory)) for memory in peer]
        watch = Stopwatch()
        own = [stack.push(Allocation.create(driver, ledger, shards[weight], handle_type=fd)) for _, weight in keys]
        blocks = {
            (slot, weight, side): stack.push(Allocation.create(driver, ledger, pages * shards[weight]))
            for slot, weight, (side, pages) in itertools.product(range(SLOTS), shards, (("before", 1), ("after", 2)))
        }
        seconds["create"] = watch.read()
        for memory in own:
            export(memory).close()
        seconds["export"] = watch.read()
        imported = [
            stack.push(Allocation.import_(driver, ledger, offer, fd, memory.nbytes))
            for _ in range(RANKS - 1)
            for offer, memory in zip(offers, peer, strict=True)
        ]
        seconds["import"] = watch.read()
        for memory in imported:
            view = stack.push(Reservation(driver, ledger, memory.nbytes))
            view.map(0, memory)
            view.set_access(0, memory.nbytes, Access.READ)
        seconds["map peers"] = watch.read()
        for (layer, weight), memory in zip(keys, own, strict=True):
            before, after = (blocks[layer % SLOTS, weight, side] for side in ("before", "after"))
            assembled = stack.push(Reservation(driver, ledger, RANKS * memory.nbytes))
            assembled.map(0, before)
            assembled.map(memory.nbytes, memory)
            assembled.map(2 * memory.nbytes, after)
            assembled.set_access(0, assembled.nbytes, Access.READ_WRITE)
        seconds["map ranges"] = watch.read()
        seconds["all"] = sum(seconds.values())
        watch.read()
    return seconds | {"close": watch.read()}


def _round_up(nbytes: int, page: int) -> int:
    return -(-nbytes // page) * page


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--repeats", type=int, default=5, help="runs that a median is taken of (default: 5)")
    arguments_of.add_argument(
        "--scale", type=int, default=64, help="divides the bytes of DeepSeek-R1's experts (default: 64, 3 GB in all)"
    )
    arguments = arguments_of.parse_args()
    driver, repeats = open_driver(arguments.device), arguments.repeats

    call_rows: list[Row] = []
    for count, nbytes in HANDLES:
        figures = medians(functools.partial(calls, driver, count, nbytes), repeats)
        per_handle = {name: seconds / count * 1e6 for name, seconds in figures.items()}
        call_rows.append({"handles": count, "MiB": nbytes // MIB, **per_handle})
    copy_rows = [{"slices": count, **medians(functools.partial(copies, driver, count), repeats)} for count in SLICES]
    steps = medians(functools.partial(set_up, driver, arguments.scale), 1)
    report(
        arguments,
        {
            "calls: microseconds a handle": call_rows,
            f"copies: microseconds a slice of {SLICE_BYTES // MIB} MiB": copy_rows,
            f"set-up: seconds, DeepSeek-R1 with bytes divided by {arguments.scale}": [steps],
        },
    )


if __name__ == "__main__":
    main()

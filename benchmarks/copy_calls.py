"""What it costs to give one layer's copies to the driver, by the form of the calls, and what kernel launches suffer.

The bytes are those of a rank of four with DeepSeek-R1's FP8 experts: 7.9 GiB from three owners, here three pieces of
host memory of the same process, so that the link is PCIe.

GB/s        until the copies are complete
issue us    until the last call returns, in the thread that launches kernels
beside      in another thread: microseconds of a kernel launch while the calls are made, median and longest
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence

import torch
from common import Row, parser, report
from cuda.bindings import driver as cuda

from vmm_dwdp.allocator.cuda_batch import BatchCall, CopyBatch
from vmm_dwdp.allocator.cuda_driver import CudaDriver
from vmm_dwdp.allocator.driver import Access, Copy, Location
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack, Stream

MIB = 1 << 20
OWNERS, OWNED, SLICE = 3, 2688 * MIB, 2 * MIB
BATCHES = [64, 128, 256, 1024, OWNERS * OWNED // SLICE]

Issue = Callable[[], None]


class Rig:
    """Host memory of `OWNERS` owners, as much device memory, and as many streams."""

    def __init__(self, device: torch.device) -> None:
        self.driver = CudaDriver(device)
        self.stack = ResourceStack()
        ledger, push = Ledger(), self.stack.push
        self.source, self.target = (push(Reservation(self.driver, ledger, OWNERS * OWNED)) for _ in range(2))
        for owner in range(OWNERS):
            host = Location(self.driver.numa_node)
            self.source.map(owner * OWNED, push(Allocation.create(self.driver, ledger, OWNED, host)))
            self.target.map(owner * OWNED, push(Allocation.create(self.driver, ledger, OWNED)))
        for side in (self.source, self.target):
            side.set_access(0, side.nbytes, Access.READ_WRITE)
        self.streams = [push(Stream(self.driver, ledger)).stream for _ in range(OWNERS)]
        self.x = torch.zeros(1024, device=device)
        self.x.add_(1)  # a kernel is loaded at its first launch, which waits for copies

    def copy(self, offset: int, nbytes: int) -> Copy:
        return Copy(self.target.address + offset, self.source.address + offset, nbytes)

    def slices(self) -> list[Copy]:
        """Of all owners in turn."""
        return [self.copy(owner * OWNED + start, SLICE) for start in range(0, OWNED, SLICE) for owner in range(OWNERS)]


def variants(rig: Rig) -> dict[str, tuple[int, Issue]]:
    """By name: how many calls, and what makes them."""
    driver = rig.driver
    whole = [driver.prepare([rig.copy(owner * OWNED, OWNED)]) for owner in range(OWNERS)]

    def one_stream() -> None:
        for copies in whole:
            driver.copy(copies, rig.streams[0])

    def streams() -> None:
        for copies, stream in zip(whole, rig.streams, strict=True):
            driver.copy(copies, stream)

    found: dict[str, tuple[int, Issue]] = {
        "a copy an owner, one stream": (OWNERS, one_stream),
        "a copy an owner, a stream each": (OWNERS, streams),
    }
    call = BatchCall.find()
    if call is not None:
        slices = rig.slices()
        for size in BATCHES:
            batches = [CopyBatch(call, slices[start : start + size]) for start in range(0, len(slices), size)]
            found[f"slices, {size} a batch"] = (len(batches), lambda batches=batches: _give(batches, rig.streams[0]))
    return found


def _give(batches: Sequence[CopyBatch], stream: int) -> None:
    for batch in batches:
        assert batch.give(stream) == cuda.CUresult.CUDA_SUCCESS


def measure(rig: Rig, calls: int, issue: Issue) -> dict[str, float]:
    issue()
    torch.cuda.synchronize()
    start = time.perf_counter()
    issue()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()

    def in_thread() -> None:
        with rig.driver.current():
            issue()

    launches = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    while thread.is_alive():
        before = time.perf_counter()
        rig.x.add_(1)
        launches.append((time.perf_counter() - before) * 1e6)
    thread.join()
    torch.cuda.synchronize()
    return {
        "calls": calls,
        "GB/s": OWNERS * OWNED / (done - start) / 1e9,
        "issue us": (issued - start) * 1e6,
        "beside median": statistics.median(launches) if launches else 0.0,
        "beside longest": max(launches, default=0.0),
    }


def main() -> None:
    arguments_of = parser(__doc__)
    arguments = arguments_of.parse_args()
    if arguments.device.type != "cuda":
        arguments_of.error("there is no driver to give copies to")
    rig = Rig(arguments.device)
    rows: list[Row] = []
    for name, (calls, issue) in variants(rig).items():
        rows.append({"copies": name, **measure(rig, calls, issue)})
    rig.stack.close()
    report(arguments, {f"{OWNERS * OWNED // MIB} MiB from {OWNERS} owners": rows})


if __name__ == "__main__":
    main()

"""What the launching thread pays for `acquire` and `release` at the public calls, with a driver that does nothing.

Needs no GPU. The runtime is whole, on the host driver; its streams, events and copies are calls that return at once, so
what is left is our own: microseconds of the launching thread, medians.

cold      before each call more memory is written than the caches next to a core hold, as kernel launches drive out
          what ran before
warm      the same calls one after another
beside    warm, while a second thread of Python's computes: it takes the interpreter's lock whenever it may
nothing   what a cold call of the clock alone takes, which is part of each figure

By C, as compiled at installation, and by Python alone, in a process of its own that finds no C. The first layer of a
pass goes through Python either way, and is not among the medians; the mean over a pass says what it adds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common import Row, parser, report, seen

NATIVE = "vmm_dwdp.allocator._native"
PYTHON_ALONE = "--python-alone"
if PYTHON_ALONE in sys.argv:
    sys.modules[NATIVE] = None  # type: ignore[assignment]

import torch  # noqa: E402

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec  # noqa: E402
from vmm_dwdp.allocator.driver import Lane, LinesAt, NativeCalls  # noqa: E402
from vmm_dwdp.allocator.host_driver import HostDriver  # noqa: E402
from vmm_dwdp.allocator.native import HAS_NATIVE  # noqa: E402
from vmm_dwdp.schedule.issue import Job  # noqa: E402

LAYERS = 61  # as DeepSeek-R1
STREAMS = 3  # owners to copy from
# Does nothing, and returns 0 where its arguments differ, as those of every call here do
_NOTHING = ctypes.CDLL(None).pthread_equal
_ADDRESS = ctypes.cast(_NOTHING, ctypes.c_void_p).value or 0


class IdleThread:
    """See `vmm_dwdp.allocator.driver.IssuingThread`: C's, whose calls return at once, or Python's, which has none."""

    def __init__(self) -> None:
        from vmm_dwdp.allocator import _native

        self._thread = _native.Issuer(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, 0, RuntimeError)
        self.submit, self.flush, self.close = self._thread.submit, self._thread.flush, self._thread.close

    def job(self, lanes: Sequence[Lane]) -> Any:
        return self._thread.job(tuple((lane.stream, lane.after, (), lane.then) for lane in lanes), tuple(lanes))


class IdleIssuer:
    """What stands for it where there is no C: it hands nothing over."""

    def __init__(self) -> None:
        self.submit = self._submit

    def job(self, lanes: Sequence[Lane]) -> Job:
        return Job(lambda: None)

    def _submit(self, job: Job) -> None:
        job.done = True

    def flush(self) -> None: ...

    def close(self) -> None: ...


class IdleDriver(HostDriver):
    """Its streams, events and copies do nothing."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.wait: Any = _call
        self.record: Any = _call
        self.current_stream: Any = partial(int, 0)
        self.capturing: Any = bool
        if HAS_NATIVE:
            self.native_calls = NativeCalls(_ADDRESS, 0, _ADDRESS, _ADDRESS, _ADDRESS, int, _failure)

    def elapsed(self, start: int, end: int) -> float:
        return 0.0

    def issuing_thread(self, lines: LinesAt | None = None) -> Any:
        return IdleThread() if HAS_NATIVE else IdleIssuer()


_call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_ADDRESS)


def _failure(call: str, result: int) -> RuntimeError:
    return RuntimeError(f"{call}: {result}")


def published(directory: str) -> DWDPRuntime:
    """One rank whose layers are fetched from host memory, or said to be."""
    runtime = DWDPRuntime(DWDPConfig(group_size=1, host_experts=4), 0, "cpu", directory, driver=IdleDriver())
    for layer in range(LAYERS):
        runtime.add_layer(layer, {"w13": WeightSpec((8, 64), torch.float32), "w2": WeightSpec((8, 64), torch.float32)})
        for weight in ("w13", "w2"):
            runtime.local_shard(layer, weight).zero_()
            runtime.local_shard(layer, weight, "host").zero_()
    runtime.publish()
    return runtime


def times(runtime: DWDPRuntime, passes: int, before: Callable[[], object]) -> dict[str, float]:
    """Microseconds of `acquire` and `release` behind ``before``."""
    acquires, releases, wholes = [], [], []
    for _ in range(passes):
        whole = 0.0
        for layer in range(LAYERS):
            before()
            begin = time.perf_counter()
            runtime.acquire(layer)
            acquired = time.perf_counter()
            before()
            reached = time.perf_counter()
            runtime.release(layer)
            released = time.perf_counter()
            whole += acquired - begin + released - reached
            if layer:
                acquires.append(acquired - begin)
                releases.append(released - reached)
        wholes.append(whole / LAYERS)
    acquire, release = statistics.median(acquires) * 1e6, statistics.median(releases) * 1e6
    return {
        "acquire us": acquire,
        "release us": release,
        "both us": acquire + release,
        "mean of a pass us": statistics.median(wholes) * 1e6,
    }


def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for each circumstance."""
    by = "C" if HAS_NATIVE else "Python"
    trash = torch.zeros(arguments.mebibytes << 18, dtype=torch.int32)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory, published(f"{directory}/rendezvous") as runtime:
        times(runtime, 12, lambda: None)  # the first passes are all timed
        begins = []
        for _ in range(200):
            trash.add_(1)
            begin = time.perf_counter()
            begins.append(time.perf_counter() - begin)
        nothing = statistics.median(begins) * 1e6
        for name, before in (("cold", lambda: trash.add_(1)), ("warm", lambda: None)):
            rows.append(seen({"by": by, "": name, **times(runtime, arguments.passes, before), "nothing us": nothing}))
        over = threading.Event()
        other = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(over.is_set, True)])
        other.start()
        rows.append(seen({"by": by, "": "beside", **times(runtime, arguments.passes, lambda: None), "nothing us": 0.0}))
        over.set()
        other.join()
    return rows


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--passes", type=int, default=10, help="of 61 layers (default: 10)")
    arguments_of.add_argument(
        "--mebibytes", type=int, default=16, help="written before each cold call (default: 16, eight caches of a core)"
    )
    arguments_of.add_argument(PYTHON_ALONE, action="store_true", help="as where there was no C compiler; nothing else")
    arguments = arguments_of.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments)
    if not arguments.python_alone:
        again = [sys.executable, *sys.argv, PYTHON_ALONE, *(["--json"] if not arguments.json else [])]
        rows += json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE).stdout)["launching thread"]
    report(arguments, {"launching thread": rows})


if __name__ == "__main__":
    main()

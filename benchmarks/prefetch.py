"""How fast layers are prefetched, how well that hides behind compute, and what it costs the launching thread.

The rank under test is the first of a group whose other owners are host memory of the same process (far_owners.py). So
the link of every figure is PCIe, from host memory to one GPU: a real copy engine, and no NVLink.

link      GB/s of one large copy, of one layer's copies as they are planned, and the second divided by the first
cost      microseconds of the launching thread for `acquire` and `release` of a layer: the medians, both together, in
          launches of a kernel too, the mean and the longest; for all that it does for a layer with 60 kernels, the last
          20 of them after `release`, beside a thread that issues copies, if there is one; and for these kernels without
          a runtime. Until the device is done with the layer before, the thread launches kernels on another stream, as
          one at work does. One pass in eight is one whose waits the runtime times
launch    microseconds of a kernel launch, median and longest: with nothing else going on, while a layer is prefetched,
          and while the copies of that layer are given to the driver
overlap   milliseconds of a pass over all layers, several passes in a row, for several ratios of compute to copies: of
          compute alone, of copies alone, and of both; by how much both are longer than compute, which is the wait that
          is exposed; and both divided by the longer of the two alone, the median of turns and the largest
graph     the same in a CUDA graph, beside eager passes; by how much a replay is longer than an eager pass and one
          layer's copies; milliseconds to instantiate it, and microseconds to launch it

Compute is products of square bf16 matrices. A GPU that has rested computes faster for a while, so what is compared is
taken in turns there and back (a b b a), of which the medians count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from common import Row, parser, report, require_within_link, seen
from far_owners import SHAPES, FarOwners

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.driver import Copy
from vmm_dwdp.allocator.handles import Stream
from vmm_dwdp.observe.timing import EVERY, FIRST

RATIOS = [0.2, 0.5, 0.8, 1.1, 1.5, 2.0, 5.0]  # of compute to copies
PLANS = {"slices of 2 MiB": 2 << 20, "auto": "auto"}
LAUNCHES = 20  # kernels before `acquire`, after it, and after `release`
PACE = 30e-6  # seconds from one launch to the next of a thread that is at work


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def link(rig: FarOwners) -> dict[str, float]:
    """GB/s of one large copy and of a layer's copies, and their ratio; medians of turns."""
    driver, plan = rig.driver, rig.layers[0].plan
    largest = max((piece for run in plan.streams for piece in run), key=lambda piece: len(piece.bytes))
    owner_bytes = next(iter(rig.layers[0].layouts.values())).shard_bytes(largest.owner)
    whole = largest._replace(weight=next(iter(rig.layers[0].layouts)), bytes=owner_bytes)
    prepared = [driver.prepare(rig.assembly.copies(rig.layers[0], run)) for run in plan.streams]
    large: list[Copy] = rig.assembly.copies(rig.layers[0], [whole])
    one = driver.prepare(large)
    streams = [Stream(driver, rig.ledger) for _ in prepared]

    def fetch() -> None:
        for stream, copies in zip(streams, prepared, strict=True):
            driver.copy(copies, stream.stream)

    rates: dict[str, list[float]] = {"one large copy": [], "planned": []}
    for _ in range(4):
        rates["one large copy"].append(large[0].nbytes / seconds(lambda: driver.copy(one, streams[0].stream)) / 1e9)
        rates["planned"].append(plan.fetched_bytes / seconds(fetch) / 1e9)
    for stream in streams:
        stream.close()
    middle = {name: statistics.median(values[1:]) for name, values in rates.items()}
    require_within_link([middle], max(rates["one large copy"]), ["planned"])
    return {**middle, "efficiency": middle["planned"] / middle["one large copy"]}


def launched(
    layers: Iterable[int], before: Callable[[int], object], after: Callable[[int], object]
) -> list[tuple[float, float, float]]:
    """Seconds of ``before``, of ``after``, and of all that the launching thread does for each layer with its kernels.

    A layer is launched when the device has come to the one before. Until then the thread launches kernels on another
    stream, as one at work does.
    """
    x = torch.zeros(1024, device="cuda")
    other = torch.cuda.Stream()
    reached = torch.cuda.Event()

    def work() -> None:
        with torch.cuda.stream(other):
            x.add_(0)
        until = time.perf_counter() + PACE
        while time.perf_counter() < until:
            pass

    def kernels() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    def layer(index: int) -> tuple[float, float, float]:
        work()
        while not reached.query():
            work()
        begin = time.perf_counter()
        kernels()
        at_acquire = time.perf_counter()
        before(index)
        acquired = time.perf_counter()
        kernels()
        at_release = time.perf_counter()
        after(index)
        released = time.perf_counter()
        kernels()
        end = time.perf_counter()
        reached.record()
        return acquired - at_acquire, released - at_release, end - begin

    return [layer(index) for index in layers]


def cost(rig: FarOwners) -> dict[str, float]:
    """Microseconds of the launching thread for a layer, which is launched when the device has come to it."""
    rig.reset()
    layers = list(range(len(rig.layers))) * (FIRST + EVERY)
    found = launched(layers, rig.acquire, rig.release)[FIRST * len(rig.layers) :]
    torch.cuda.synchronize()
    alone = statistics.median(
        every for *_, every in launched(range(len(found)), lambda index: None, lambda index: None)
    )
    both = statistics.median(acquire + release for acquire, release, _ in found)
    return {
        "acquire us": statistics.median(acquire for acquire, _, _ in found) * 1e6,
        "release us": statistics.median(release for _, release, _ in found) * 1e6,
        "both us": both * 1e6,
        "mean us": statistics.mean(acquire + release for acquire, release, _ in found) * 1e6,
        "longest us": max(acquire + release for acquire, release, _ in found) * 1e6,
        "layer us": statistics.median(every for _, _, every in found) * 1e6,
        "its kernels alone us": alone * 1e6,
        "both in launches": both / (alone / (3 * LAUNCHES)),
    }


def launch(rig: FarOwners, rounds: int) -> dict[str, float]:
    """Microseconds of one kernel launch, alone and while a layer is prefetched."""
    x = torch.zeros(1024, device="cuda")

    def launches(duration: float) -> list[float]:
        found = []
        until = time.perf_counter() + duration
        while (start := time.perf_counter()) < until:
            x.add_(1)
            end = time.perf_counter()
            found.append((end - start) * 1e6)
            while time.perf_counter() < end + 20e-6:
                pass
        return found

    alone, first, rest = [], [], []
    for index in range(rounds):
        layer = index % len(rig.layers)
        rig.acquire(layer)
        torch.cuda.synchronize()  # both slots are full, and nothing is under way
        alone += launches(0.02)
        torch.cuda.synchronize()
        rig.release(layer)
        first += launches(0.005)
        rest += launches(0.03)
    return {
        "alone median": statistics.median(alone),
        "alone longest": max(alone),
        "beside median": statistics.median(first + rest),
        "beside longest": max(first + rest),
        "beside / alone": statistics.median(first + rest) / statistics.median(alone),
        "first 5 ms median": statistics.median(first),
    }


class Passes:
    """Passes over all layers with a chosen amount of compute for each."""

    def __init__(self, rig: FarOwners) -> None:
        self.rig = rig
        self._x = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
        self._y = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
        self._out = torch.empty_like(self._x)
        self.products(20)
        self.product_s = seconds(lambda: self.products(200)) / 200

    def products(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._x, self._y, out=self._out)

    def compute(self, products: int) -> None:
        for _ in self.rig.layers:
            self.products(products)

    def run(self, products: int) -> None:
        for index in range(len(self.rig.layers)):
            self.rig.acquire(index)
            self.products(products)
            self.rig.release(index)


def device_seconds(work: Callable[[], object], passes: int) -> float:
    """Of one pass, between events on the compute stream: from the end of a pass to the end of a later one."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    first.record()
    for _ in range(passes):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e-3 / passes


def there_and_back(works: list[Callable[[], object]], passes: int) -> list[float]:
    """Seconds of a pass of each of ``works``."""
    order = [*range(len(works)), *reversed(range(len(works)))]
    found = [0.0] * len(works)
    for index in order:
        found[index] += device_seconds(works[index], passes) / 2
    return found


def overlap(rig: FarOwners, link_rate: float, ratios: list[float], passes: int, turns: int) -> list[Row]:
    """A row for each of ``ratios``."""
    made = Passes(rig)
    copy_s = rig.layers[0].plan.fetched_bytes / link_rate / 1e9
    rows = []
    for ratio in ratios:
        products = max(1, round(ratio * copy_s / made.product_s))
        copies_s = statistics.median(device_seconds(partial(made.run, 0), passes) for _ in range(turns))
        found = []
        for _ in range(turns):
            compute_s, both_s = there_and_back([partial(made.compute, products), partial(made.run, products)], passes)
            found.append(
                {
                    "compute / copies": compute_s / copies_s,
                    "compute ms": compute_s * 1e3,
                    "copies ms": copies_s * 1e3,
                    "both ms": both_s * 1e3,
                    "exposed ms": (both_s - compute_s) * 1e3,
                    "both / longer": both_s / max(compute_s, copies_s),
                }
            )
        middle = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
        rows.append(seen({"wanted": ratio, **middle, "largest": max(turn["both / longer"] for turn in found)}))
    return rows


def graph(rig: FarOwners, link_rate: float, passes: int, turns: int) -> list[Row]:
    """Captured passes with less and more compute than copies, beside eager ones."""
    made = Passes(rig)
    copy_s = rig.layers[0].plan.fetched_bytes / link_rate / 1e9
    rows = []
    for ratio in (0.5, 1.5):
        products = max(1, round(ratio * copy_s / made.product_s))
        captured = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(captured):
            made.run(products)
        start = time.perf_counter()
        captured.instantiate()
        instantiated = time.perf_counter()
        copies_s = statistics.median(device_seconds(partial(made.run, 0), passes) for _ in range(turns))
        layer_s = copies_s / len(rig.layers)
        found = []
        for _ in range(turns):
            eager_s, replay_s = there_and_back([partial(made.run, products), captured.replay], passes)
            found.append(
                {
                    "eager ms": eager_s * 1e3,
                    "replay ms": replay_s * 1e3,
                    "one layer's copies ms": layer_s * 1e3,
                    "over both ms": (replay_s - eager_s - layer_s) * 1e3,
                }
            )
        launches = []
        for _ in range(5):
            torch.cuda.synchronize()
            before = time.perf_counter()
            captured.replay()
            launches.append(time.perf_counter() - before)
        torch.cuda.synchronize()
        middle = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
        of_graph = {
            "instantiate ms": (instantiated - start) * 1e3,
            "launch us": statistics.median(launches) * 1e6,
        }
        rows.append(seen({"wanted": ratio, "products a layer": products, **middle, **of_graph}))
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """All tables: figures of one layer with the shapes of ``--cost-shape``, those of passes with ``--shape``."""
    tables: dict[str, list[Row]] = {"link": [], "cost": [], "launch": []}

    def rank_0(shape: str, plan: str, layers: int) -> FarOwners:
        config = DWDPConfig(group_size=arguments.group_size, slice_bytes=PLANS[plan], assembly=arguments.assembly)
        return FarOwners(arguments.device, config, SHAPES[shape], layers)

    for plan in PLANS:
        rig = rank_0(arguments.cost_shape, plan, arguments.cost_layers)
        tables["link"].append(seen(about(rig, arguments.cost_shape, plan) | link(rig)))
        tables["cost"].append(seen(about(rig, arguments.cost_shape, plan) | cost(rig)))
        tables["launch"].append(seen(about(rig, arguments.cost_shape, plan) | launch(rig, rounds=6)))
        rig.close()
    for plan in PLANS:
        rig = rank_0(arguments.shape, plan, arguments.layers)
        rates = link(rig)
        tables["link"].append(seen(about(rig, arguments.shape, plan) | rates))
        tables["cost"].append(seen(about(rig, arguments.shape, plan) | cost(rig)))
        timed = rig, rates["one large copy"]
        repeats = arguments.passes, arguments.turns
        tables[f"overlap, {plan}"] = overlap(*timed, arguments.ratio or RATIOS, *repeats)
        if plan == "auto":
            tables["graph"] = graph(*timed, *repeats)
        rig.close()
    return tables


def about(rig: FarOwners, shape: str, plan: str) -> dict[str, object]:
    path = rig.stats().copy_path
    assert path is not None
    return {"shape": shape, "plan": plan, "copies": path.num_copies, "streams": path.num_streams, "by": path.issued_by}


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument(
        "--group-size", type=int, default=4, help="owners, all but one in host memory (default: 4)"
    )
    arguments_of.add_argument("--assembly", choices=["vmm", "tensor_list"], default="vmm")
    arguments_of.add_argument("--shape", choices=SHAPES, default="qwen3-30b-bf16", help="of overlap and graph")
    arguments_of.add_argument("--layers", type=int, default=8, help="of overlap and graph (default: 8)")
    arguments_of.add_argument(
        "--cost-shape", choices=SHAPES, default="deepseek-r1-fp8", help="of link, cost and launch"
    )
    arguments_of.add_argument("--cost-layers", type=int, default=4, help="of link, cost and launch (default: 4)")
    arguments_of.add_argument("--ratio", type=float, action="append", help="of overlap; may be repeated")
    arguments_of.add_argument("--passes", type=int, default=3, help="in a row that are timed together (default: 3)")
    arguments_of.add_argument("--turns", type=int, default=3, help="repetitions, of which the median (default: 3)")
    arguments = arguments_of.parse_args()
    if arguments.device.type != "cuda":
        arguments_of.error("there is no link to time without a GPU")
    report(arguments, measure(arguments))


if __name__ == "__main__":
    main()

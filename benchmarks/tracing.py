"""What a trace costs: passes over layers that copy and do nothing else, with a trace and without, in turns.

The rank under test reads half of its experts from host memory, so there is one owner and one copy stream: a layer and
pass makes five marks.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import nullcontext

import torch
from common import parser, report

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec

LAYERS, PASSES = 8, 100
WEIGHTS = {"w": WeightSpec((2, 1 << 21), torch.uint8)}


def seconds(runtime: DWDPRuntime, *, traced: bool) -> float:
    """Of the launching thread, for `PASSES` passes."""
    with runtime.trace() if traced else nullcontext():
        start = time.perf_counter()
        for _ in range(PASSES):
            for number in range(LAYERS):
                with runtime.layer(number):
                    pass
        return time.perf_counter() - start


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--turns", type=int, default=7, help="of which the median is taken (default: 7)")
    arguments = arguments_of.parse_args()
    config = DWDPConfig(group_size=1, host_experts=1)
    with tempfile.TemporaryDirectory() as rendezvous, DWDPRuntime(config, 0, arguments.device, rendezvous) as runtime:
        for number in range(LAYERS):
            runtime.add_layer(number, WEIGHTS)
        runtime.publish()
        seconds(runtime, traced=True)
        found = [(seconds(runtime, traced=False), seconds(runtime, traced=True)) for _ in range(arguments.turns)]
    plain, traced = (statistics.median(column) / PASSES / LAYERS * 1e6 for column in zip(*found, strict=True))
    row = {"layers": LAYERS, "passes": PASSES, "plain us": plain, "traced us": traced, "ratio": traced / plain}
    report(arguments, {"microseconds of the launching thread for a layer": [row]})


if __name__ == "__main__":
    main()

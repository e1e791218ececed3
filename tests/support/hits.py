"""A small runtime whose layers are hit, and a pass over it."""

from __future__ import annotations

from typing import Any, Final

import torch

from support.groups import random_model, same_bytes
from vmm_dwdp import DWDPConfig, DWDPRuntime

MODEL: Final = random_model({number: {"w": ((6, 300), torch.float32)} for number in range(5)}, seed=5)
CONFIG: Final = DWDPConfig(group_size=1, host_experts=4)


def run_pass(runtime: DWDPRuntime) -> None:
    for number, weights in MODEL.items():
        whole: Any = runtime.acquire(number, tokens=3)["w"]
        assert same_bytes(whole, weights["w"])
        runtime.release(number)

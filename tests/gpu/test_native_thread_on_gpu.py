"""The thread that gives copies to a GPU's driver without the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.groups import check_pass, join, random_model

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.native import HAS_NATIVE


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_NATIVE, reason="there was no C compiler when this package was installed")
def test_it_gives_the_copies_except_while_a_trace_is_recorded(tmp_path: Path) -> None:
    weights = {"w": ((6, 700_000), torch.float32), "v": ((6, 1000), torch.uint8)}
    model = random_model(dict.fromkeys(range(5), weights))
    config = DWDPConfig(group_size=1, host_experts=4)
    runtime = join(config, 0, tmp_path / "rendezvous", model, open_driver(torch.device("cuda")))
    path = runtime.stats().copy_path
    assert path is not None
    assert path.issued_by == "native thread"
    for order in (None, None, [3, 0, 4, 4, 1], None):
        check_pass(runtime, model, order)
    with runtime.trace() as trace:
        check_pass(runtime, model)
    assert trace.spans
    check_pass(runtime, model)
    assert runtime.close().open() == []

"""A rank whose kernel faulted closes: its group sees that it left, and its process keeps no socket and no thread."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from support.groups import check_pass, join, random_model

from vmm_dwdp import DriverError, DWDPConfig
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.testing import run_group

pytestmark = [pytest.mark.gpu, pytest.mark.faults]

MODEL_SHAPE = {"w": ((6, 500_001), torch.bfloat16)}


def _threads() -> set[str]:
    native = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    return {name for name in native | {each.name for each in threading.enumerate()} if "vmm-dwdp" in name}


def _rank(rendezvous: Path, rank: int) -> list[str]:
    model = random_model(dict.fromkeys(range(4), MODEL_SHAPE))
    config = DWDPConfig(group_size=2, mode="in_place")
    runtime = join(config, rank, rendezvous, model, open_driver(torch.device("cuda")))
    check_pass(runtime, model, mode="staged")
    if rank == 1:
        while runtime.peers()[0]:
            check_pass(runtime, model)
        check_pass(runtime, model, mode="staged")
        return runtime.close().open()
    assert _threads()
    weights = runtime.acquire(0, mode="in_place")
    weights["w"][5].fill_(1)  # type: ignore[union-attr]  # of rank 1, mapped to be read
    with pytest.raises(RuntimeError):
        torch.cuda.synchronize()
    for _ in range(2):
        with pytest.raises(DriverError) as raised:
            runtime.close()
        assert raised.value.__notes__[-1].startswith("left open: ")
    assert not (rendezvous / "rank-0").exists()
    assert _threads() == set()
    return []


def test_a_rank_whose_kernel_faulted_leaves_its_group(tmp_path: Path) -> None:
    assert run_group(partial(_rank, tmp_path / "group"), 2, "cuda") == [[], []]

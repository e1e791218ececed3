"""benchmarks/versus_sglang.py: SGLang's own transport, buffer and manager fetch the same bytes as this library.

Here both do so over the host driver. CUDA's streams and events, which everything here happens without, are stand-ins.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from vmm_dwdp import DWDPConfig
from vmm_dwdp.allocator.driver import Access, HandleType
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.integrations.sglang import contract
from vmm_dwdp.testing import RankFailed, run_group

pytestmark = pytest.mark.skipif(
    contract.version() != "0.5.17", reason="the benchmark drives the classes of SGLang 0.5.17"
)

SHAPE, NUM_LAYERS = "tiny-bf16", 3


def over_the_host_driver(driver: Any) -> dict[str, Any]:
    """SGLang's functions around CUDA's virtual memory, by name."""
    return {
        "get_allocation_granularity": lambda device: driver.granularity(),
        "create_fabric_handle": lambda size, device: driver.create(size, handle_type=HandleType.POSIX_FD),
        "create_local_handle": lambda size, device: driver.create(size),
        "release_handle": driver.release,
        "reserve_va": lambda size, granularity: driver.reserve(size),
        "free_va": driver.free,
        "map_handle": lambda address, size, handle, offset=0: driver.map(address, size, handle),
        "unmap_va": driver.unmap,
        "set_access": lambda address, size, device: driver.set_access(address, size, Access.READ_WRITE),
        "tensor_from_ptr": lambda ptr, shape, dtype, device_id: tensor_at(ptr, shape, dtype, driver.device),
        "check_drv": lambda result, label: None,
        "cuda": SimpleNamespace(cuMemcpyDtoD=ctypes.memmove),
    }


def compare(rank: int, *, wrong: bool) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    versus = importlib.import_module("versus_sglang")
    sglang = versus.SGLang()
    weights = versus._streamed(SHAPE)
    rig = versus.FarOwners(torch.device("cpu"), DWDPConfig(group_size=versus.GROUP_SIZE), weights, NUM_LAYERS)
    pool = importlib.import_module("sglang.srt.layers.moe.dwdp.page_pool")
    with ExitStack() as patches:
        for name in ("Stream", "Event", "current_stream", "synchronize", "empty_cache"):
            patches.enter_context(patch.object(torch.cuda, name, Mock(return_value=Mock(cuda_stream=0))))
        patches.enter_context(patch.object(torch.cuda, "stream", lambda stream: nullcontext()))
        for module in (sglang.vmm, sglang.transport, sglang.buffer, pool):
            for name, function in over_the_host_driver(rig.driver).items():
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, function))
        theirs = versus.beside(sglang, rig, weights, NUM_LAYERS)
        if wrong:
            theirs.prefetch_first_layers = lambda: None
        versus.check_bytes(theirs, rig)
        sglang.end(theirs)
    rig.close()


def test_both_fetch_the_same_bytes() -> None:
    run_group(partial(compare, wrong=False), 1)


def test_a_difference_is_seen() -> None:
    with pytest.raises(RankFailed, match=r"SGLang's \w+ is not ours"):
        run_group(partial(compare, wrong=True), 1)

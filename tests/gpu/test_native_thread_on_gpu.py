"""The thread that gives copies to a GPU's driver without the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.groups import check_pass, join, random_model

from vmm_dwdp import DriverError, DWDPConfig
from vmm_dwdp.allocator import HAS_NATIVE_THREAD, open_driver
from vmm_dwdp.allocator.driver import Copy, Lane

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_NATIVE_THREAD, reason="there was no C compiler when this package was installed"),
]
PAGE = 2 << 20
UNMAPPED = 4096  # no address of anything


@pytest.mark.parametrize("slice_bytes", ["auto", 4096])
def test_it_gives_few_copies_and_many(slice_bytes: int | str, tmp_path: Path) -> None:
    model = random_model(
        {number: {"w": ((6, 700_000), torch.float32), "v": ((6, 1000), torch.uint8)} for number in range(5)}
    )
    config = DWDPConfig(group_size=1, host_experts=4, slice_bytes=slice_bytes)
    runtime = join(config, 0, tmp_path / "rendezvous", model, open_driver(torch.device("cuda")))
    path = runtime.stats().copy_path
    assert path is not None
    assert path.issued_by == "native thread"
    assert (path.num_copies > 1000) == (slice_bytes == 4096)
    for order in (None, None, [3, 0, 4, 4, 1], None):
        check_pass(runtime, model, order)
    with runtime.trace() as trace:  # while which the launching thread gives copies
        check_pass(runtime, model)
    assert trace.spans
    check_pass(runtime, model)
    assert runtime.close().open() == []


def test_what_the_driver_refuses_is_told_and_the_thread_goes_on() -> None:
    driver = open_driver(torch.device("cuda"))
    source = torch.arange(64, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    stream, after, then = driver.create_stream(), driver.create_event(False), driver.create_event(False)
    thread = driver.issuing_thread()
    assert thread is not None
    good, bad = (
        thread.job([Lane(stream, after, driver.prepare([Copy(dst, source.data_ptr(), 64)]), then)])
        for dst in (target.data_ptr(), UNMAPPED)
    )
    thread.submit(bad)
    thread.submit(good)
    with pytest.raises(DriverError, match="cuMemcpyBatchAsync failed with CUDA_ERROR_INVALID_VALUE"):
        bad.result()
    assert not bad.done
    good.result()
    driver.synchronize(stream)
    assert torch.equal(source, target)
    thread.close()
    driver.destroy_stream(stream)
    for event in (after, then):
        driver.destroy_event(event)

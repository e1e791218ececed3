"""What only the CUDA driver has: capture, batches, kernels over assembled addresses, and what the machine can share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vmm_dwdp.allocator.cuda_driver import CudaDriver
from vmm_dwdp.allocator.driver import DEVICE, Access, Copy, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack, Stream
from vmm_dwdp.allocator.probe import supported_handle_types
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.errors import DriverError

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> Iterator[CudaDriver]:
    driver = CudaDriver(torch.device("cuda"))
    yield driver
    driver.synchronize()


@pytest.mark.parametrize("location", [DEVICE, Location(numa_node=0)], ids=str)
def test_memory_can_be_shared_by_descriptors(cuda: CudaDriver, location: Location) -> None:
    refusals = supported_handle_types(cuda, location)
    assert refusals[HandleType.POSIX_FD] is None
    fabric = refusals[HandleType.FABRIC]
    assert fabric is None or "while trying to" in fabric


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(DriverError, match="while trying to use cuda:99"):
        CudaDriver(torch.device("cuda:99"))


def test_captured_copies_run_when_the_graph_does(cuda: CudaDriver) -> None:
    """A batch of copies is refused in a capture, which goes on without them."""
    source, target = torch.zeros(2, 4096, device="cuda")
    copies = cuda.prepare([Copy(target.data_ptr() + start, source.data_ptr() + start, 4096) for start in (0, 8192)])
    graph = torch.cuda.CUDAGraph()
    assert cuda.capture(cuda.current_stream()) == 0
    with torch.cuda.graph(graph):
        assert cuda.capture(cuda.current_stream()) != 0
        cuda.copy(copies, cuda.current_stream())
        target += 1
    for value in (5, 6):
        source.fill_(value)
        target.zero_()
        graph.replay()
        expected = torch.ones(4, 1024)
        expected[::2] += value
        assert torch.equal(target.view(4, 1024).cpu(), expected)


@pytest.mark.parametrize("batched", [True, False])
def test_many_slices_arrive(cuda: CudaDriver, ledger: Ledger, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if batched:
        assert cuda._batch_call is not None
    else:
        monkeypatch.setattr(cuda, "_batch_call", None)  # as where the driver is too old
    source = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    target = torch.zeros_like(source)
    nbytes, order = 4096, torch.randperm(1024, generator=torch.Generator().manual_seed(0)).tolist()
    copies = [
        Copy(target.data_ptr() + to * nbytes, source.data_ptr() + slice * nbytes, nbytes)
        for to, slice in enumerate(order)
    ]
    torch.cuda.synchronize()
    with Stream(cuda, ledger) as stream:
        cuda.copy(cuda.prepare(copies), stream.stream)
        cuda.synchronize(stream.stream)
    assert torch.equal(target.view(1024, -1).cpu(), source.view(1024, -1).cpu()[order])


def test_a_grouped_gemm_on_assembled_addresses_is_that_on_torch_memory(
    cuda: CudaDriver, ledger: Ledger, stack: ResourceStack
) -> None:
    page, generator = cuda.granularity(), torch.Generator("cuda").manual_seed(0)
    x = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda", generator=generator)
    weights = torch.randn(8, 1024, 768, dtype=torch.bfloat16, device="cuda", generator=generator)  # 12 MiB
    offsets = torch.arange(64, 513, 64, dtype=torch.int32, device="cuda")
    pages = (1, 3, 2)  # experts of 1.5 MiB lie across the borders of these handles
    addresses = stack.push(Reservation(cuda, ledger, sum(pages) * page))
    offset = 0
    for count in pages:
        addresses.map(offset, stack.push(Allocation.create(cuda, ledger, count * page)))
        offset += count * page
    addresses.set_access(0, addresses.nbytes, Access.READ_WRITE)
    assembled = tensor_at(addresses.address, weights.shape, weights.dtype, weights.device)
    assembled.copy_(weights)
    assert torch.equal(
        torch.nn.functional.grouped_mm(x, assembled, offs=offsets),
        torch.nn.functional.grouped_mm(x, weights, offs=offsets),
    )
    cuda.synchronize()

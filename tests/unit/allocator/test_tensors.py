"""Tensors over addresses, and knowing when nothing uses them any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Ledger, PlainMemory
from vmm_dwdp.allocator.tensors import StorageWatch, tensor_at

DTYPES = [
    torch.uint8,
    torch.int32,
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]


@pytest.fixture
def memory(driver: Driver, ledger: Ledger) -> Iterator[PlainMemory]:
    with PlainMemory.create(driver, ledger, 4096) as memory:
        yield memory
        driver.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24,), (2, 3, 4), (4, 0, 3), ()])
def test_a_tensor_has_the_bytes_at_its_address(
    driver: Driver, memory: PlainMemory, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor_at(memory.address, (4096,), torch.uint8, driver.device).copy_(torch.arange(4096) % 251)
    tensor = tensor_at(memory.address + 64, shape, dtype, driver.device)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.device == driver.device
    assert tensor.is_contiguous()
    nbytes = tensor.numel() * dtype.itemsize
    assert tensor.untyped_storage().nbytes() == nbytes
    if nbytes:
        assert tensor.data_ptr() == memory.address + 64
        content = tensor.reshape(-1).view(torch.uint8).cpu()
        assert torch.equal(content, (torch.arange(64, 64 + nbytes) % 251).to(torch.uint8))


def test_a_tensor_owns_nothing() -> None:
    buffer = ctypes.create_string_buffer(64)
    tensor = tensor_at(ctypes.addressof(buffer), (64,), torch.uint8, torch.device("cpu"))
    tensor.fill_(9)
    del tensor
    assert buffer.raw == b"\x09" * 64


def saved_by_autograd(tensor: torch.Tensor) -> object:
    return torch.ones_like(tensor, requires_grad=True) * tensor


def rebound(tensor: torch.Tensor) -> object:
    parameter = torch.nn.Parameter(torch.empty(0, dtype=tensor.dtype))
    parameter.data = tensor
    return parameter


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "the tensor": lambda tensor: tensor,
    "a slice": lambda tensor: tensor[1:],
    "another dtype": lambda tensor: tensor.view(torch.int32),
    "detached": lambda tensor: tensor.detach(),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor),
    "a parameter's data": rebound,
    "a storage": lambda tensor: tensor.untyped_storage(),
    "a numpy array": lambda tensor: tensor.numpy(),
    "a DLPack capsule, in C++": lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    "autograd, in C++": saved_by_autograd,
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_storage_is_alive_while_anything_holds_it(holder: Callable[[torch.Tensor], object]) -> None:
    buffer = ctypes.create_string_buffer(64)
    tensor = tensor_at(ctypes.addressof(buffer), (4, 4), torch.float32, torch.device("cpu"))
    watch = StorageWatch(tensor)
    assert watch.alive()
    held = holder(tensor)
    del tensor
    assert watch.alive()
    del held
    assert not watch.alive()


def test_a_watch_is_of_one_storage() -> None:
    buffer = ctypes.create_string_buffer(64)
    first, second = (tensor_at(ctypes.addressof(buffer), (64,), torch.uint8, torch.device("cpu")) for _ in range(2))
    watch = StorageWatch(first)
    del first
    assert not watch.alive()
    assert StorageWatch(second).alive()


def test_a_copy_does_not_hold_the_storage() -> None:
    buffer = ctypes.create_string_buffer(64)
    tensor = tensor_at(ctypes.addressof(buffer), (64,), torch.uint8, torch.device("cpu"))
    watch, copied = StorageWatch(tensor), tensor.clone()
    del tensor
    assert not watch.alive()
    assert copied.shape == (64,)

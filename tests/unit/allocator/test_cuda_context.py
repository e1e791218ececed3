"""Which CUDA device is current before, in and after what a driver does, by a model of the driver's stacks and torch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vmm_dwdp import DriverError

pytest.importorskip("cuda.bindings.driver")

from cuda.bindings import driver as cuda

from vmm_dwdp.allocator import cuda_driver
from vmm_dwdp.allocator.cuda_driver import CudaDriver
from vmm_dwdp.allocator.driver import Access, HandleType

SUCCESS = cuda.CUresult.CUDA_SUCCESS


class Machine:
    """Some GPUs. A context is 1000 + the device's number.

    Attributes:
        made: calls that went to the current context, with that.
        primary: devices whose primary context there is.
        capturing: devices whose current stream is captured.
    """

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.primary: set[int] = set()
        self.capturing: set[int] = set()
        self.refused: str | None = None  # the call that fails
        self.visible = 2
        self._threads = threading.local()

    @property
    def here(self) -> Any:
        """The thread's ``stack`` of contexts, ``device`` where that is empty, and torch's ``target``, if any."""
        if not hasattr(self._threads, "state"):
            self._threads.state = SimpleNamespace(stack=[], device=0, target=None)
        return self._threads.state

    def state(self) -> tuple[Any, ...]:
        return (*self.here.stack, "device", self.torch_device())

    # -- the driver, the CUDA runtime and torch as they are described in c10/cuda/CUDAFunctions.cpp
    def call(self, name: str) -> tuple[Any, ...]:
        stack = self.here.stack
        if name == self.refused or not stack:
            return (cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        self.made.append((name, stack[-1]))
        return (SUCCESS, 7)

    def retain(self, device: int) -> tuple[Any, ...]:
        self.primary.add(int(device))
        return (SUCCESS, cuda.CUcontext(1000 + int(device)))

    def get_current(self) -> tuple[Any, ...]:
        return (SUCCESS, cuda.CUcontext(self.here.stack[-1] if self.here.stack else 0))

    def set_current(self, context: Any) -> tuple[Any, ...]:
        self.here.stack[-1:] = [int(context)]
        return (SUCCESS,)

    def push(self, context: Any) -> tuple[Any, ...]:
        if self.refused == "cuCtxPushCurrent":
            return (cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self.here.stack.append(int(context))
        return (SUCCESS,)

    def pop(self) -> tuple[Any, ...]:
        return (SUCCESS, self.here.stack.pop())

    def device(self) -> int:
        """cudaGetDevice"""
        return self.here.stack[-1] % 1000 if self.here.stack else self.here.device

    def set_device(self, device: int) -> None:
        """cudaSetDevice"""
        self.primary.add(device)
        self.here.stack[-1:] = [1000 + device]
        self.here.device = device

    def torch_device(self) -> int:
        return self.device() if self.here.target is None else self.here.target

    def set_torch_device(self, device: int) -> None:
        self.here.target = None
        if self.device() != device:
            self.set_device(device)

    def exchange(self, device: int) -> int:
        before, target = self.torch_device(), self.here.target
        self.here.target = None
        if target is not None or before != device:
            self.set_device(device)
        return before

    def maybe_exchange(self, device: int) -> int:
        before = self.torch_device()
        if device != self.device():
            if device in self.primary:
                self.set_device(device)
            else:
                self.here.target = device
        return before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()

    def answer(name: str, function: Any) -> None:
        named = lambda *arguments: function(*arguments)  # noqa: E731
        named.__name__ = name
        monkeypatch.setattr(cuda, name, named)

    answer("cuInit", lambda flags: (SUCCESS,))
    answer("cuDeviceGet", lambda index: (SUCCESS, index))
    answer("cuDeviceGetAttribute", lambda attribute, device: (SUCCESS, 0))
    answer("cuDevicePrimaryCtxRetain", machine.retain)
    answer("cuCtxGetCurrent", machine.get_current)
    answer("cuCtxSetCurrent", machine.set_current)
    answer("cuCtxPushCurrent", machine.push)
    answer("cuCtxPopCurrent", machine.pop)
    for name in ("cuEventCreate", "cuMemAlloc", "cuCtxSynchronize"):
        answer(name, lambda *arguments, name=name: machine.call(name))
    monkeypatch.setattr(cuda_driver.BatchCall, "find", lambda: None)
    monkeypatch.setattr(cuda_driver.EventCalls, "find", lambda: SimpleNamespace(natively=lambda *known: None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.visible)
    monkeypatch.setattr(torch.cuda, "current_device", machine.torch_device)
    monkeypatch.setattr(torch.cuda, "set_device", machine.set_torch_device)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", machine.maybe_exchange)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", machine.torch_device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    capturing = lambda: machine.torch_device() in machine.capturing  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", capturing)
    return machine


def drivers() -> list[CudaDriver]:
    return [CudaDriver(torch.device("cuda", index)) for index in range(2)]


def use(machine: Machine, driver: CudaDriver) -> None:
    """Calls that go to the current context reach the driver's, and a capture there is seen."""
    index = driver.device.index
    driver.create_event(timed=False)
    driver.allocate(1)
    driver.synchronize()
    calls = ("cuEventCreate", "cuMemAlloc", "cuCtxSynchronize")
    assert machine.made[-3:] == [(call, 1000 + index) for call in calls]
    for capturing in ({index}, {1 - index}):
        machine.capturing = capturing
        assert driver.capturing() == (index in capturing)


def set_up(machine: Machine, before: str) -> None:
    """What the calling thread did before a driver is made, as users of torch do it."""
    if before == "a context of device 0":
        machine.set_device(0)
    elif before == "a context of device 1":
        machine.set_device(1)
    elif before == "back to a device without a context":  # after an operation on a tensor of device 1
        machine.maybe_exchange(machine.exchange(1))
        assert (machine.here.stack, machine.torch_device()) == ([1001], 0)
    elif before == "somebody's own context":
        machine.here.stack.append(5001)


BEFORE = [
    "nothing",
    "a context of device 0",
    "a context of device 1",
    "back to a device without a context",
    "somebody's own context",
]


@pytest.mark.parametrize("before", BEFORE)
def test_calls_reach_their_device_and_leave_the_current_one(before: str, machine: Machine) -> None:
    set_up(machine, before)
    device = machine.torch_device()
    made = drivers()
    for driver in (*made, *reversed(made)):
        state = machine.state()
        assert machine.torch_device() == device
        with driver.current():
            use(machine, driver)
            torch_works_on(machine, driver)
            for inner in made:
                with inner.current():
                    use(machine, inner)
            use(machine, driver)
        assert machine.torch_device() == device
        if before != "back to a device without a context":  # which it has now: it may be topmost, as torch says
            assert machine.state() == state
        with pytest.raises(ZeroDivisionError), driver.current():
            raise ZeroDivisionError
        assert machine.torch_device() == device


def torch_works_on(machine: Machine, driver: CudaDriver) -> None:
    """An operation on a tensor of the driver's device."""
    machine.maybe_exchange(machine.exchange(driver.device.index))


def test_a_device_that_torch_only_goes_back_to_still_gets_no_context(machine: Machine) -> None:
    set_up(machine, "back to a device without a context")
    driver = CudaDriver(torch.device("cuda", 1))
    for _ in range(2):
        assert not driver.is_current()  # although its context is topmost
        with driver.current():
            use(machine, driver)
            torch_works_on(machine, driver)
        assert (machine.here.stack, machine.torch_device()) == ([1001], 0)
    assert machine.primary == {1}


@pytest.mark.parametrize("before", BEFORE)
def test_where_a_device_is_current_calls_can_be_made(before: str, machine: Machine) -> None:
    set_up(machine, before)
    device = machine.torch_device()
    made = drivers()
    for driver in made * 2:
        topmost = machine.here.stack[-1:]
        current = driver.is_current()
        assert topmost in ([], machine.here.stack[-1:])  # what was there stays
        assert machine.torch_device() == device
        assert current == (machine.here.stack[-1:] == [1000 + driver.device.index] and device == driver.device.index)
        if current:
            use(machine, driver)


def test_one_thread_says_nothing_of_another(machine: Machine) -> None:
    made = drivers()
    assert [driver.is_current() for driver in made] == [True, False]

    def work() -> None:
        assert machine.here.stack == []
        with made[1].current():
            use(machine, made[1])
        assert machine.here.stack == []
        assert [driver.is_current() for driver in made] == [True, False]
        use(machine, made[0])
        machine.set_torch_device(1)
        assert [driver.is_current() for driver in made] == [False, True]
        use(machine, made[1])

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
    use(machine, made[0])


def test_what_somebody_else_makes_current_is_seen(machine: Machine) -> None:
    first, second = drivers()
    assert (first.is_current(), second.is_current()) == (True, False)
    machine.set_current(1001)
    assert (first.is_current(), second.is_current()) == (False, True)
    machine.set_current(1000)
    assert (first.is_current(), second.is_current()) == (True, False)


def test_a_device_that_cannot_be_made_current_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, driver = drivers()
    state = machine.state()
    machine.refused = "cuCtxPushCurrent"
    with pytest.raises(DriverError, match=r"cuCtxPushCurrent failed with .* while trying to make cuda:1 current"):
        driver.current().__enter__()
    assert machine.state() == state
    machine.refused = None

    def broken(device: int) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    machine.here.target = 2
    state = machine.state()
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        driver.current().__enter__()
    assert machine.state() == state


@pytest.mark.parametrize("visible", [1, 2])
def test_memory_of_a_gpu_that_is_not_visible_is_refused_with_advice(
    visible: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.visible = visible
    driver = CudaDriver(torch.device("cuda", 0))
    refuse = lambda *arguments: (cuda.CUresult.CUDA_ERROR_INVALID_DEVICE,)  # noqa: E731
    for name in ("cuMemImportFromShareableHandle", "cuMemSetAccess"):
        monkeypatch.setattr(refuse, "__name__", name)
        monkeypatch.setattr(cuda, name, refuse)
    for call in (lambda: driver.import_(3, HandleType.POSIX_FD, 8), lambda: driver.set_access(0, 8, Access.READ)):
        with pytest.raises(DriverError, match="failed with CUDA_ERROR_INVALID_DEVICE") as refused:
            call()
        assert ("let all ranks see all GPUs" in str(refused.value)) == (visible == 1)

"""An unsharded model of random bytes, and groups of runtimes that share it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.config import Mode
from vmm_dwdp.group.doors import Where

PAGE = 4096  # bytes: the smallest page of the host driver, so that small weights span several

Shapes = dict[int, dict[str, tuple[tuple[int, ...], torch.dtype]]]  # layer number -> weight -> shape [E, ...], dtype
Model = dict[int, dict[str, torch.Tensor]]  # layer number -> weight -> the unsharded tensor [E, ...]
T = TypeVar("T")


def random_model(layers: Shapes, seed: int = 0) -> Model:
    """Random bytes in the given shapes and dtypes, the same for the same seed in every process."""
    generator = torch.Generator().manual_seed(seed)

    def weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nbytes = (*shape[:-1], shape[-1] * dtype.itemsize)
        return torch.randint(0, 256, nbytes, dtype=torch.uint8, generator=generator).view(dtype)

    return {
        number: {name: weight(shape, dtype) for name, (shape, dtype) in weights.items()}
        for number, weights in layers.items()
    }


def same_bytes(tensor: torch.Tensor, reference: torch.Tensor) -> bool:
    """Equal in shape, dtype and every byte, whatever the dtype can compare."""
    if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
        return False
    return torch.equal(tensor.cpu().contiguous().view(torch.uint8), reference.contiguous().view(torch.uint8))


def add_layers(runtime: DWDPRuntime, model: Model) -> None:
    for number, weights in model.items():
        runtime.add_layer(number, {name: WeightSpec(tuple(t.shape), t.dtype) for name, t in weights.items()})


def fill_shards(runtime: DWDPRuntime, model: Model) -> None:
    """What a loader does: this rank's experts into its shard, and the host pool's on the rank that creates it."""
    owners = [runtime.rank, HOST] if runtime.rank == 0 and runtime.config.host_experts else [runtime.rank]
    for number, weights in model.items():
        for name, tensor in weights.items():
            for owner in owners:
                experts = runtime.local_experts(number, owner)
                shard = runtime.local_shard(number, name, owner)
                shard.view(torch.uint8).copy_(tensor[experts.start : experts.stop].view(torch.uint8))


def join(config: DWDPConfig, rank: int, rendezvous: Where, model: Model, driver: Driver | None = None) -> DWDPRuntime:
    """One published rank; by default on the host driver with small pages."""
    driver = driver or HostDriver(PAGE)
    runtime = DWDPRuntime(config, rank, driver.device, rendezvous, driver=driver)
    add_layers(runtime, model)
    fill_shards(runtime, model)
    runtime.publish()
    return runtime


def check_pass(
    runtime: DWDPRuntime,
    model: Model,
    order: Sequence[int] | None = None,
    mode: Mode | None = None,
    tokens: int | None = None,
) -> None:
    """One pass in which every byte of every weight is compared with the unsharded model."""
    for number in order or list(model):
        with runtime.layer(number, mode=mode, tokens=tokens) as weights:
            assert weights.keys() == model[number].keys()
            for name, reference in model[number].items():
                found = weights[name]
                whole = torch.cat([part.view(torch.uint8) for part in found]) if isinstance(found, list) else found
                assert same_bytes(whole.view(reference.dtype), reference), (runtime.rank, number, name)


def answered(runtime: DWDPRuntime) -> None:
    """Whoever has asked it something by now has been told."""
    exchange = runtime._membership._exchange
    assert exchange is not None
    for thread in list(exchange._transport._clients)[1:]:  # the first accepts others
        thread.join()


def in_threads(function: Callable[[int], T], group_size: int) -> list[T]:
    """All ranks of a group in this process, for tests that would start too many processes."""
    with ThreadPoolExecutor(group_size) as pool:
        return list(pool.map(function, range(group_size)))


@contextmanager
def published(config: DWDPConfig, rendezvous: Where, model: Model) -> Iterator[list[DWDPRuntime]]:
    """A group in this process; closed at the end, and its ledgers read zero then."""
    drivers = [HostDriver(PAGE) for _ in range(config.group_size)]  # active in this thread, which runs the passes
    runtimes = in_threads(lambda rank: join(config, rank, rendezvous, model, drivers[rank]), config.group_size)
    try:
        yield runtimes
    finally:
        for runtime in runtimes:
            runtime.close()
    assert [runtime.ledger.open() for runtime in runtimes] == [[]] * config.group_size


def until_rank_1_has_died() -> None:
    """Of `beside`: ranks that gave it up may have waited no longer for one that was slow."""
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # whose end `beside` is to see, too


@contextmanager
def beside(
    config: DWDPConfig, rendezvous: Where, model: Model, script: Callable[[DWDPRuntime], object]
) -> Iterator[list[DWDPRuntime]]:
    """Ranks 0 and 2; rank 1 is a process of its own, which dies in the middle of ``script``, or at its end."""
    child = os.fork()
    if not child:
        try:
            runtime = join(config, 1, rendezvous, model)
            script(runtime)
            answered(runtime)
            os._exit(7)
        finally:
            os._exit(1)
    drivers = [HostDriver(PAGE), HostDriver(PAGE)]
    ranks = in_threads(lambda n: join(config, 2 * n, rendezvous, model, drivers[n]), 2)
    try:
        yield ranks
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        for runtime in ranks:
            runtime.close()
    assert [runtime.ledger.open() for runtime in ranks] == [[], []]

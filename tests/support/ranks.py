"""Ranks that do what they are told, in threads of this process or in processes of their own."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple
from unittest import mock

import torch

from support.groups import PAGE
from support.hosts import enter
from vmm_dwdp import DWDPConfig, DWDPError, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.group.doors import Where

processes: Final = multiprocessing.get_context("forkserver")  # which imports torch once, for all of them
processes.set_forkserver_preload(["support.ranks"])

Shape = tuple[tuple[int, ...], str]  # [E, ...], and the name of a dtype
Bytes = dict[tuple[int, str], bytes]  # by layer and weight: those of the unsharded tensor


class Outcome(NamedTuple):
    """How a call ended.

    Attributes:
        kind: ``"done"``, the name of the `DWDPError` that refused it, ``"raw"`` for any other exception, or ``"dead"``.
        told: what it returned, or the sentence.
    """

    kind: str
    told: Any


def digest(data: bytes | torch.Tensor) -> str:
    """Of the bytes, in order."""
    if isinstance(data, torch.Tensor):
        data = data.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def tensor(data: bytes, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Of these bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


@dataclass
class Side:
    """The rank's own side: each public method is a command."""

    config: DWDPConfig
    rank: int
    rendezvous: Where
    layers: Mapping[int, Mapping[str, Shape]]
    driver: Callable[[], HostDriver] | None = None
    network: int | None = None  # a process in whose network namespace the rank is to live
    kept: list[Any] = field(default_factory=list)
    runtime: DWDPRuntime | None = None

    def __call__(self, command: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                return Outcome("done", getattr(self, command)(*arguments, **options))
            except DWDPError as error:
                sentence, kind = str(error), type(error).__name__
                traceback.clear_frames(error.__traceback__)
                return Outcome(kind, sentence)
            except Exception as error:
                told = "".join(traceback.format_exception(error)[-3:])
                traceback.clear_frames(error.__traceback__)
                return Outcome("raw", told)

    @property
    def _made(self) -> DWDPRuntime:
        assert self.runtime is not None
        return self.runtime

    def make(self) -> None:
        if self.network is not None:
            enter(self.network)
        driver = HostDriver(PAGE) if self.driver is None else self.driver()
        self.runtime = DWDPRuntime(self.config, self.rank, "cpu", self.rendezvous, driver=driver)

    def add_layer(self, number: int) -> None:
        specs = {name: WeightSpec(shape, getattr(torch, dtype)) for name, (shape, dtype) in self.layers[number].items()}
        self._made.add_layer(number, specs)
        self.order(number)  # who computes asks for the tables first

    def fill(self, model: Bytes) -> None:
        for (number, name), data in model.items():
            shape, dtype = self.layers[number][name]
            whole = tensor(data, shape, dtype)
            for owner in self._made.held_owners:
                experts = self._made.local_experts(number, owner)
                shard = self._made.local_shard(number, name, owner)
                shard.copy_(whole[experts.start : experts.stop])

    def acquire(self, layer: Any, chosen: Any = None, keep: bool = False, **options: Any) -> dict[str, str]:
        """The digest of each weight, in the order of experts."""
        told = None if chosen is None else torch.tensor(chosen)
        weights = self._made.acquire(layer, chosen=told, **options)
        found = {}
        for name, value in weights.items():
            whole = torch.cat(value) if isinstance(value, list) else value
            found[name] = digest(whole[self.order(layer)])
        if keep:
            self.kept.append(weights)
        return found

    def order(self, layer: int) -> list[int] | slice:
        """In which rows the experts are, as kernels are told."""
        if not self.config.movable_experts:
            return slice(None)
        rows: list[int] = self._made.logical_to_physical(layer).tolist()
        return rows

    def rebalance(self, most: Any, timeout: float) -> tuple[int, list[Any]]:
        """How many experts moved, and where all are then."""
        moved = self._made.rebalance(most=most, timeout=timeout)
        return moved, [self.order(layer) for layer in self.layers]

    def release(self, layer: Any) -> None:
        self._made.release(layer)

    def looked_up(self, layer: int, chosen: list[int], **options: Any) -> dict[str, str]:
        """The digest of what each weight has of the chosen experts, one a token, in their order."""
        with self._made.layer(layer, **options):
            weights, rows = self._made.look_up(layer, torch.tensor(chosen)[:, None])
            found = {}
            for name, value in weights.items():
                whole = torch.cat(value) if isinstance(value, list) else value
                found[name] = digest(whole[rows.flatten()])
        return found

    def tensor_list(self, layer: Any, weight: Any) -> str:
        parts = self._made.tensor_list(layer, weight)
        assert len(parts) <= 3
        return digest(torch.cat(parts)[self.order(layer)])

    def update(self, model: Bytes, owners: list[Any] | None, timeout: float, singly: bool = False) -> None:
        """Write what this rank holds of ``model``; of ``owners`` only, if they are told; ``singly``: by experts."""
        values = {}
        for (number, name), data in model.items():
            whole = tensor(data, *self.layers[number][name])
            for owner in self._made.held_owners:
                if owners is None or owner in owners:
                    values[number, name, owner] = whole[[*self._made.held_experts(number, owner)]]
        if not singly:
            self._made.update(values, timeout)
            return
        with self._made.updating(timeout) as update:
            for (number, name, owner), shard in values.items():
                for expert, value in zip(self._made.held_experts(number, owner), shard, strict=True):
                    update.write(number, name, value, experts=expert, owner=owner)

    def stated_pass(self, layers: list[int], raises: bool, **stated: Any) -> list[dict[str, str]]:
        """The digest of each weight of each layer, in a pass that is stated once, and may raise at its end."""
        with self._made.forward_pass(**stated):
            found = []
            for layer in layers:
                found.append(self.acquire(layer))
                self._made.release(layer)
            if raises:
                raise DWDPError(repr(found))
        return found

    def bad_update(self, what: str) -> None:
        """What cannot be written."""
        layer, name = next((layer, name) for layer, weights in self.layers.items() for name in weights)
        shape, dtype = self.layers[layer][name]
        good = torch.zeros((len(self._made.held_experts(layer)), *shape[1:]), dtype=getattr(torch, dtype))
        shards: dict[Any, Any] = {
            "shape": {(layer, name, self.rank): torch.zeros((3, 1, 4), dtype=good.dtype)},
            "dtype": {(layer, name, self.rank): good.to(torch.float64)},
            "layer": {(98, name, self.rank): good},
            "weight": {(layer, "no such", self.rank): good},
            "owner": {(layer, name, (self.rank + 1) % 7): good},
            "no owner": {(layer, name): good},
            "no tensor": {(layer, name, self.rank): [1, 2, 3]},
        }[what]
        self._made.update(shards, 0.2)

    def bad_set_up(self, what: str) -> None:
        """What cannot be asked for in set-up, or comes too late."""
        layer, name = next((layer, name) for layer, weights in self.layers.items() for name in weights)
        calls: dict[str, Callable[[], object]] = {
            "add again": lambda: self.add_layer(layer),
            "no layer": lambda: self._made.local_shard(98, name),
            "no weight": lambda: self._made.local_shard(layer, "no such"),
            "no owner": lambda: self._made.local_shard(layer, name, 9),
            "owner in words": lambda: self._made.local_shard(layer, name, "rank 0"),  # type: ignore[arg-type]
            "no experts": lambda: self._made.local_experts(98),
            "nobody's experts": lambda: self._made.local_experts(layer, 9),
        }
        calls[what]()

    def shard_late(self) -> None:
        layer, name = next((layer, name) for layer, weights in self.layers.items() for name in weights)
        self._made.local_shard(layer, name)

    def stats(self) -> tuple[int, int]:
        """Acquires that were counted, and bytes in the cache."""
        stats = self._made.stats()
        return stats.hits + stats.misses + stats.in_place, 0 if stats.cache is None else stats.cache.used_bytes

    def traced(self, layers: list[int], nested: bool) -> int:
        """A few layers while a trace is recorded; how many spans it has."""
        with self._made.trace() as trace:
            if nested:
                with self._made.trace():
                    pass
            for layer in layers:
                with self._made.layer(layer, mode="staged", tokens=3):
                    pass
        return len(trace.spans)

    def abandoned(self, layer: int, **options: Any) -> None:
        """A forward pass of the layer that fails."""
        with self._made.layer(layer, **options):
            raise DWDPError("the caller's own")

    def forget(self) -> None:
        """Let go of what `acquire` was told to keep."""
        self.kept.clear()

    def close(self) -> list[str]:
        """What is left."""
        if left := self._made.close().open():
            gc.collect()  # of tensors that a traceback held in a cycle
            left = self._made.close().open()
        return left

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Any other method of the runtime."""
        return getattr(self._made, name)(*arguments, **options)


class InThread:
    """A rank in a thread of this process."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._pool = ThreadPoolExecutor(1)

    def begin(self, command: str, *arguments: Any, **options: Any) -> Callable[[], Outcome]:
        """Tell it what to do; what is returned waits until it is done."""
        future: Future[Outcome] = self._pool.submit(self._side, command, arguments, options)
        return future.result

    def end(self) -> None:
        """Its runtime is closed."""
        self._pool.submit(self._side.forget).result()
        self._pool.shutdown()


class InProcess:
    """A rank in a process of its own, which can be killed."""

    def __init__(self, side: Side) -> None:
        self._connection, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(side, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, command: str, *arguments: Any, **options: Any) -> Callable[[], Outcome]:
        self._connection.send((command, arguments, options))

        def result() -> Outcome:
            try:
                outcome: Outcome = self._connection.recv()
            except (EOFError, ConnectionResetError):
                return Outcome("dead", None)
            return outcome

        return result

    def kill(self) -> None:
        """By a signal that it does not see coming."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    def end(self) -> None:
        self._connection.close()
        self._process.join()
        self._process.close()


def start_server() -> None:
    """Once, what makes processes: it keeps some descriptors open."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # or it could not import what it is to
        forkserver.ensure_running()


def _serve(side: Side, commands: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            command, arguments, options = commands.recv()
        except EOFError:
            return
        commands.send(side(command, arguments, options))

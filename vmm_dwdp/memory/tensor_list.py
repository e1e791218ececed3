"""Ordinary allocations instead of mapped pages: every weight is a list of tensors, for a GEMM that takes such a list.

    rank 1's list of a weight      [ staged: experts 0..1 ]  [ own: experts 2..3 ]  [ staged: experts 4..7 ]

For machines without virtual memory management. Memory is shared by legacy CUDA IPC: an owner must outlive its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vmm_dwdp.allocator.driver import Address, Driver
from vmm_dwdp.allocator.handles import Ledger, PlainMemory
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.config import Mode
from vmm_dwdp.errors import ExchangeError, StateError
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.memory.assembly import Assembly, Place, Share, Weights
from vmm_dwdp.memory.tensor_memory import TensorMemory


class TensorListAssembly(Assembly):
    """Shards, and staging tensors for the experts before and after them."""

    def __init__(self, driver: Driver, ledger: Ledger, rank: int, layers: Sequence[Layer], prefetch_depth: int) -> None:
        super().__init__(driver, ledger, rank, layers, prefetch_depth)
        self._own: dict[tuple[int, str], TensorMemory[PlainMemory]] = {}
        self._views: dict[tuple[int, str, Owner], PlainMemory] = {}
        self._staging: dict[tuple[int, str, int], TensorMemory[PlainMemory]] = {}  # by first byte of the staged run
        self._lists: dict[int, dict[str, list[torch.Tensor]]] = {}

    @property
    def granularity(self) -> int:
        return 1

    def num_mappings(self) -> int:
        return 0

    def shard(self, layer: Layer, weight: str, owner: Owner) -> torch.Tensor:
        spec, experts = layer.weights[weight], layer.placement.experts(owner)
        if not experts:
            return tensor_at(0, spec.of(0), spec.dtype, self._driver.device)
        if owner != self.rank:
            address = self._views[layer.number, weight, owner].address
            return tensor_at(address, spec.of(len(experts)), spec.dtype, self._driver.device)
        if (layer.number, weight) not in self._own:
            nbytes = len(layer.layouts[weight].shard_bytes(owner))
            self._own[layer.number, weight] = self._take(nbytes, f"layer {layer.number}, {weight}")
            self.resident_nbytes += nbytes
        return self._own[layer.number, weight].tensor(0, spec.of(len(experts)), spec.dtype)

    def _take(self, nbytes: int, label: str) -> TensorMemory[PlainMemory]:
        memory = TensorMemory(PlainMemory.create(self._driver, self._ledger, nbytes, label), self._driver.device)
        self._ranges.append(memory)
        return memory

    def _export(self, owner: Owner, place: Place) -> list[Share]:
        return [
            self._own[layer.number, weight].memory.token()
            for layer, weight in self._weights_of_layers()
            if layer.placement.experts(owner)
        ]

    def num_shares(self, owner: Owner, place: Place = "device") -> int:
        return sum(bool(layer.placement.experts(owner)) for layer, _ in self._weights_of_layers())

    def _attach(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        tokens = iter(shares)
        for layer, weight in self._weights_of_layers():
            if not layer.placement.experts(owner):
                continue
            token = next(tokens)
            if not isinstance(token, bytes):
                raise ExchangeError(f"rank {owner} sent a descriptor where a token of its memory was expected")
            label = f"layer {layer.number}, {weight}, of rank {owner}"
            nbytes = len(layer.layouts[weight].shard_bytes(owner))
            memory = PlainMemory.open(self._driver, self._ledger, token, nbytes, label)
            self._views[layer.number, weight, owner] = self._resources.push(memory)

    def _adopt(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        raise StateError("assembly: tensor_list cannot rejoin: its memory is gone with the process that created it")

    @contextmanager
    def writing(self, layer: Layer, weight: str, owner: Owner) -> Iterator[torch.Tensor]:
        yield self.shard(layer, weight, owner)

    def check_integrity(self) -> None:
        expected = len(self._own) + len(self._views) + len({id(memory) for memory in self._staging.values()})
        counted = self._ledger.counts()["allocations"]
        if counted != expected:
            raise StateError(f"the ledger counts {counted} allocations, but the layouts have {expected}")

    def build(self) -> None:
        for slot, layers in enumerate(self._layers_of_slot()):
            self._build_slot(slot, layers)
        for layer, weight in self._weights_of_layers():
            spec, layout = layer.weights[weight], layer.layouts[weight]
            tensors = []
            for run in self._parts(layer, weight):
                first = layout.bytes_of(run).start
                memory = self._staging.get((layer.number, weight, first)) or self._own[layer.number, weight]
                tensors.append(memory.tensor(0, spec.of(len(run)), spec.dtype))
            self._lists.setdefault(layer.number, {})[weight] = tensors

    def _build_slot(self, slot: int, layers: Sequence[Layer]) -> None:
        """Staging memory as large as the largest layer wants it, region by region."""
        regions = [
            [(layer, weight, run) for weight in layer.weights for run in layer.layouts[weight].staged_bytes(self.rank)]
            for layer in layers
        ]
        for index in range(max(map(len, regions))):
            sharing = [found[index] for found in regions if index < len(found) and found[index][2]]
            if not sharing:
                continue
            nbytes = max(len(run) for _, _, run in sharing)
            memory = self._take(nbytes, f"slot {slot}")
            self.staged_nbytes += nbytes
            for layer, weight, run in sharing:
                self._staging[layer.number, weight, run.start] = memory

    def weights(self, layer: Layer, mode: Mode) -> Weights:
        return self._lists[layer.number]

    def tensor_list(self, layer: Layer, weight: str, mode: Mode) -> list[torch.Tensor]:
        return self._lists[layer.number][weight]

    def _destination(self, layer: Layer, weight: str, byte: int) -> Address:
        for run in layer.layouts[weight].staged_bytes(self.rank):
            if byte in run:
                return self._staging[layer.number, weight, run.start].memory.at(byte - run.start)
        raise AssertionError(f"byte {byte} of {weight} is not staged on rank {self.rank}")

    def _source(self, layer: Layer, weight: str, owner: Owner, byte: int) -> Address:
        offset = byte - layer.layouts[weight].shard_bytes(owner).start
        return self._views[layer.number, weight, owner].at(offset)

    def close(self) -> None:
        self._lists.clear()
        super().close()

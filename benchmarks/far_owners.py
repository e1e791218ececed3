"""Rank 0 of a group, whose other owners are host memory of the same process: what stands in for a link between GPUs.

Several processes on one GPU copy inside that GPU, which says nothing about a link. Here every byte that is fetched
comes over PCIe, by the same calls as from a peer over NVLink: the shards of the other ranks are physical memory of the
host's NUMA node, exported, imported again and mapped to be read. All layers share the far bytes of one, to save memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vmm_dwdp import DWDPConfig, WeightSpec
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import DEVICE, HandleType, Location
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.assembly import Assembly, Share, Weights
from vmm_dwdp.config import AssemblyKind
from vmm_dwdp.layer import describe_layer
from vmm_dwdp.staging import Staging
from vmm_dwdp.tensor_list_assembly import TensorListAssembly
from vmm_dwdp.virtual_assembly import VirtualAssembly

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES: dict[str, dict[str, WeightSpec]] = {
    "deepseek-r1-fp8": {
        "w13": WeightSpec((256, 4096, 7168), FP8),
        "w13_scale": WeightSpec((256, 32, 56), torch.float32),
        "w2": WeightSpec((256, 7168, 2048), FP8),
        "w2_scale": WeightSpec((256, 56, 16), torch.float32),
    },
    "qwen3-30b-bf16": {
        "gate_up": WeightSpec((128, 1536, 2048), BF16),
        "down": WeightSpec((128, 2048, 768), BF16),
    },
    "tiny-bf16": {
        "gate_up": WeightSpec((16, 1024, 1024), BF16),
        "down": WeightSpec((16, 1024, 512), BF16),
    },
}


class _OneProcess:
    """A driver in whose process all owners are. The far one takes host memory wherever the device's is asked for."""

    def __init__(self, driver: Any, far: bool) -> None:
        self._driver = driver
        self._far = far
        self._pinned: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def create(self, nbytes: int, location: Location = DEVICE, handle_type: HandleType | None = None) -> int:
        there = Location(self._driver.numa_node) if self._far else location
        return int(self._driver.create(nbytes, there, handle_type))

    def allocate(self, nbytes: int) -> int:
        if not self._far:
            return int(self._driver.allocate(nbytes))
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._driver.device.type == "cuda")
        self._pinned[memory.data_ptr()] = memory
        return memory.data_ptr()

    def deallocate(self, address: int) -> None:
        if self._pinned.pop(address, None) is None:
            self._driver.deallocate(address)

    def export_allocation(self, address: int) -> bytes:
        return address.to_bytes(8, "little")

    def open_allocation(self, token: bytes, nbytes: int) -> int:
        return int.from_bytes(token, "little")

    def close_allocation(self, address: int) -> None:
        pass


class FarOwners:
    """``staging`` and ``weights`` of rank 0, over random bytes. Close it when done."""

    def __init__(
        self, device: torch.device, config: DWDPConfig, weights: Mapping[str, WeightSpec], num_layers: int
    ) -> None:
        self.driver = open_driver(device)
        self.ledger = Ledger()
        self.far: list[Assembly] = []
        near = self._assembly(_OneProcess(self.driver, far=False), config, rank=0)
        self.layers = [describe_layer(n, weights, config, 0, near.granularity) for n in range(num_layers)]
        for layer in self.layers:
            near.add(layer)
            for weight in weights:
                near.shard(layer, weight, 0).view(torch.uint8).random_()
        for owner in range(1, config.group_size):
            near.attach(owner, self._shares(config, weights, owner, num_layers))
        near.build()
        self.assembly = near
        self.weights: list[Weights] = [near.weights(layer, "staged") for layer in self.layers]
        self.staging = Staging(self.driver, self.ledger, near, self.layers, config)

    def _assembly(self, driver: Any, config: DWDPConfig, rank: int) -> Assembly:
        kinds: dict[AssemblyKind, Any] = {
            "vmm": lambda: VirtualAssembly(
                driver, self.ledger, rank, config.prefetch_depth, HandleType.POSIX_FD, DEVICE, in_place=False
            ),
            "tensor_list": lambda: TensorListAssembly(driver, self.ledger, rank, config.prefetch_depth),
        }
        made: Assembly = kinds[config.assembly]()
        return made

    def _shares(
        self, config: DWDPConfig, weights: Mapping[str, WeightSpec], owner: int, num_layers: int
    ) -> list[Share]:
        far = self._assembly(_OneProcess(self.driver, far=True), config, owner)
        self.far.append(far)
        layer = describe_layer(0, weights, config, owner, far.granularity)
        far.add(layer)
        for weight in weights:
            far.shard(layer, weight, owner).view(torch.uint8).random_()
        return [share for _ in range(num_layers) for share in far.shares(owner)]

    def close(self) -> None:
        self.weights.clear()
        self.staging.close()
        for assembly in (self.assembly, *self.far):
            assembly.close()
        assert not any(self.ledger.counts().values()), self.ledger.open()

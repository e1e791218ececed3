"""Rank 0 of a group, whose other owners are host memory of the same process: what stands in for a link between GPUs.

Several processes on one GPU copy inside that GPU, which says nothing about a link. Here every byte that is fetched
comes over PCIe, by the same calls as from a peer over NVLink: the shards of the other ranks are physical memory of the
host's NUMA node, exported, imported again and mapped to be read. All layers share the far bytes of one, to save memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import DEVICE, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.layout.layer import Layer, describe_layer
from vmm_dwdp.memory.assembly import Assembly, Share
from vmm_dwdp.memory.choice import make_assembly

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
        found = self.__dict__[name] = getattr(self._driver, name)  # as fast as the driver's own from now on
        return found

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


class FarOwners(DWDPRuntime):
    """Rank 0, over random bytes, ready for passes. Close it when done.

    Attributes:
        far: the memory of the other ranks.
    """

    def __init__(
        self, device: torch.device, config: DWDPConfig, weights: Mapping[str, WeightSpec], num_layers: int
    ) -> None:
        driver: Any = open_driver(device)
        self.far: list[Assembly] = []
        with tempfile.TemporaryDirectory() as directory:  # in which nobody looks for this rank
            super().__init__(config, 0, device, f"{directory}/rendezvous", driver=_OneProcess(driver, far=False))
        for number in range(num_layers):
            self.add_layer(number, weights)
            for weight in weights:
                self.local_shard(number, weight).view(torch.uint8).random_()
        with self._ready_afterwards("publish"):
            for owner in range(1, config.group_size):
                one: list[Layer] = []
                far = make_assembly(config, owner, _OneProcess(driver, far=True), self.ledger, one)
                one.append(describe_layer(0, weights, config, owner, far.granularity))
                self.far.append(far)
                self.assembly.attach(owner, "device", _shares(far, one[0], num_layers))
            self.assembly.build()
            driver.synchronize()  # copies begin next, on streams that do not wait for what fills the memory
            self._start()

    @property
    def driver(self) -> Driver:
        return self._driver

    @property
    def assembly(self) -> Assembly:
        return self._assembly

    @property
    def layers(self) -> list[Layer]:
        """In the order of a pass."""
        return self._layers.in_order

    def close(self) -> Ledger:
        super().close()
        for far in self.far:
            far.close()
        assert not any(self.ledger.counts().values()), self.ledger.open()
        return self.ledger


def _shares(far: Assembly, layer: Layer, num_layers: int) -> list[Share]:
    """What ``far`` has, once for every layer."""
    for weight in layer.weights:
        far.shard(layer, weight, far.rank).view(torch.uint8).random_()
    far.offer(far.rank)
    return [share for _ in range(num_layers) for share in far.hand_over(far.rank, "device")[1]]

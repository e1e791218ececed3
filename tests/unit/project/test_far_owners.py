"""The benchmarks' stand-in for a link: rank 0 has the bytes that its far owners have, by either plan and assembly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vmm_dwdp import DWDPConfig
from vmm_dwdp.config import AssemblyKind

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from far_owners import SHAPES, FarOwners


@pytest.mark.parametrize("slice_bytes", ["auto", 1 << 16])
@pytest.mark.parametrize("assembly", ["vmm", "tensor_list"])
def test_rank_0_reads_what_the_far_owners_have(assembly: AssemblyKind, slice_bytes: int | str) -> None:
    config = DWDPConfig(group_size=4, slice_bytes=slice_bytes, assembly=assembly)  # type: ignore[arg-type]
    weights = SHAPES["tiny-bf16"]
    rig = FarOwners(torch.device("cpu"), config, weights, num_layers=3)
    for layer in rig.layers * 2:
        acquired = rig.acquire(layer.number)
        for name in weights:
            found = acquired[name]
            whole = torch.cat(found) if isinstance(found, list) else found
            own = rig.assembly.shard(layer, name, 0)
            expected = [own, *(far.shard(rig.layers[0], name, far.rank) for far in rig.far)]
            assert torch.equal(whole.view(torch.uint8), torch.cat(expected).view(torch.uint8))
        rig.release(layer.number)
    del acquired, found, whole, own, expected
    rig.close()

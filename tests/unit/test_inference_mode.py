"""What is made in inference mode is no inference tensor: it may be written to, and used by autograd, outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.groups import PAGE, add_layers, fill_shards, same_bytes

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.checkpoint import Checkpoint

MODEL = {n: {"w": torch.randn(6, 40, 30)} for n in range(3)}
ALONE = DWDPConfig(group_size=1, host_experts=3, mode="in_place", resident_cache=4 * PAGE)
LISTS = DWDPConfig(group_size=1, assembly="tensor_list")


def require_ordinary(tensor: torch.Tensor) -> None:
    """Autograd keeps it, and counts what is written to it: neither is allowed of an inference tensor."""
    assert not tensor.is_inference()
    x = torch.ones_like(tensor, requires_grad=True)
    (x * tensor).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, tensor)
    assert tensor._version >= 0  # which an inference tensor refuses to tell


@pytest.mark.parametrize("config", [ALONE, LISTS], ids=["vmm", "lists"])
def test_tensors_of_a_runtime(config: DWDPConfig, tmp_path: Path) -> None:
    with torch.inference_mode():
        runtime = DWDPRuntime(config, 0, "cpu", tmp_path / "group", driver=HostDriver(PAGE))
        add_layers(runtime, MODEL)
        shards = [runtime.local_shard(0, "w", owner) for owner in runtime.held_owners]
        parts = [shard[:1] for shard in shards]
    for tensor in (*shards, *parts):
        require_ordinary(tensor)
        tensor.fill_(1.0).add_(1.0)
    fill_shards(runtime, MODEL)
    with torch.inference_mode():
        runtime.publish()
        found = []
        for mode in ("staged", "in_place") if config is ALONE else ("staged",):
            weights = runtime.acquire(1, mode=mode)["w"]  # type: ignore[arg-type]
            parts = weights if isinstance(weights, list) else [weights, weights[2:]]
            found += [*parts, *runtime.tensor_list(1, "w")]
            assert same_bytes(parts[0], MODEL[1]["w"])
            runtime.release(1)
        runtime.reset()
        runtime.update({(1, "w", 0): MODEL[2]["w"][runtime.local_experts(1)]})
    for tensor in found:
        require_ordinary(tensor)
    new = {(0, "w", owner): MODEL[2]["w"][runtime.local_experts(0, owner)] for owner in runtime.held_owners}
    runtime.update(new)  # type: ignore[arg-type]
    with runtime.layer(0) as again:
        weights = again["w"]
        assert same_bytes(weights[0] if isinstance(weights, list) else weights, MODEL[2]["w"])
    del shards, parts, found, weights, again, tensor
    assert runtime.close().open() == []


def test_tensors_of_a_checkpoint(tmp_path: Path) -> None:
    save_file({"w": MODEL[0]["w"]}, tmp_path / "model.safetensors")
    with torch.inference_mode():
        checkpoint = Checkpoint(tmp_path)
        read = [checkpoint.read("w"), checkpoint.read("w", 3)]
        checkpoint.close()
    for tensor in read:
        require_ordinary(tensor)
        tensor.zero_()

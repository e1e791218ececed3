"""Real `FusedMoE` layers loaded on several ranks: every rank sees the bytes of a process that loads all experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import engine_process
import experts
import pytest
from ports import free_port

from vmm_dwdp.testing import run_group

KINDS = {  # with which MoE runner
    "bf16": "triton",
    "fp8 block": "triton",
    "fp8 tensor": "triton",
    "mxfp4": "triton_kernel",
    "nvfp4": "flashinfer_cutlass",
}
PAGE_NBYTES = 4096  # small, so that block scales are spread too

Digests = list[dict[str, str]]  # by layer and tensor


def load_all(rank: int, *, port: int) -> dict[str, Digests]:
    """What a process without DWDP has, for each kind of weights."""
    engine_process.start(rank, 1, port)
    found = {}
    for kind, runner in KINDS.items():
        engine_process.use_runner(runner, rank, 1)
        with experts.without_a_gpu():
            model = experts.model(kind)
            experts.load(model)
        found[kind] = [experts.digests(layer, [*tensors_of(layer), *maxima_of(layer)]) for layer in model.layers]
    return found


def load_shard(rank: int, *, size: int, port: int) -> dict[str, dict[str, Any]]:
    """What a rank has with DWDP, for each kind of weights: in two passes, and after clean-up."""
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import manager

    manager.open_driver = lambda device: HostDriver(PAGE_NBYTES)
    engine_process.start(rank, size, port)
    found: dict[str, dict[str, Any]] = {}
    for kind, runner in KINDS.items():
        engine_process.use_runner(runner, rank, size)
        with experts.without_a_gpu():
            model = experts.model(kind)
            before = [routing(layer) for layer in model.layers]
            experts.load(model)
        seen: dict[str, Any] = {"outside": [outside_nbytes(layer) for layer in model.layers]}
        ours = engine_process.init_dwdp(model)
        seen["passes"] = [one_pass(model, ours), one_pass(model, ours)]
        seen["bound"] = [layer._dwdp_bound and layer.num_local_experts == layer.num_experts for layer in model.layers]
        engine_process.shut_down()
        seen["restored"] = [routing(layer) for layer in model.layers] == before
        seen["left"] = [
            tensor.numel() for layer in model.layers for tensor in experts.tensors(layer, tensors_of(layer))
        ]
        seen["ledger"] = ours.runtime.ledger.open()
        found[kind] = seen
    return found


def one_pass(model: Any, ours: Any) -> Digests:
    ours.prefetch_first_layers()
    seen = []
    for layer in model.layers:
        with ours.runtime.layer(layer.layer_id):
            seen.append(experts.digests(layer, [*tensors_of(layer), *maxima_of(layer)]))
    return seen


def tensors_of(layer: Any) -> list[str]:
    from vmm_dwdp.integrations.sglang.expert_tensor import find
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    return [name for name in scheme_of(layer).tensors if find(layer, name) is not None]


def maxima_of(layer: Any) -> list[str]:
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    return list(scheme_of(layer).maximum)


def routing(layer: Any) -> dict[str, Any]:
    state = {name: getattr(layer, name) for name in ("moe_ep_size", "moe_ep_rank", "num_local_experts", "_dwdp_bound")}
    return state | {f"dispatcher.{name}": value for name, value in vars(layer.dispatcher).items() if "expert" in name}


def outside_nbytes(layer: Any) -> int:
    """Bytes that a loaded layer keeps outside the host driver's memory, of tensors of at least a page on this rank."""
    tensors = experts.tensors(layer, tensors_of(layer))
    large = [tensor for tensor in tensors if tensor.nbytes >= PAGE_NBYTES]
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:vmm_dwdp" in line]
    mapped = [range(*(int(address, 16) for address in line.split("-"))) for line in lines]
    return sum(tensor.nbytes for tensor in large if not any(tensor.data_ptr() in region for region in mapped))


@pytest.fixture(scope="module")
def loaded_whole() -> dict[str, Digests]:
    [found] = run_group(partial(load_all, port=free_port()), 1)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return run_group(partial(load_shard, size=request.param, port=free_port()), request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sees_what_one_process_loads(
    kind: str, ranks: list[dict[str, dict[str, Any]]], loaded_whole: dict[str, Digests]
) -> None:
    for rank in ranks:
        assert rank[kind]["passes"] == [loaded_whole[kind]] * 2
        assert all(rank[kind]["bound"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_layer_is_in_its_shard(kind: str, ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        assert rank[kind]["outside"] == [0] * experts.NUM_LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_cleanup_leaves_layers_as_constructed_and_no_memory(kind: str, ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        assert rank[kind]["restored"]
        assert not any(rank[kind]["left"])
        assert not rank[kind]["ledger"]

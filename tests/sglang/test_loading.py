"""Real `FusedMoE` layers loaded on several ranks: every rank sees the bytes of a process that loads all experts."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import engine_process
import experts
import pytest
import torch
from ports import free_port
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.testing import run_group

KINDS = {  # with which MoE runner
    "bf16": "triton",
    "bf16 for triton_kernel": "triton_kernel",
    "fp8 block": "triton",
    "fp8 block for deep_gemm": "deep_gemm",
    "fp8 tensor": "triton",
    "fp8 tensor of ModelOpt": "triton",
    "fp8 tensor of compressed-tensors": "triton",
    "fp8 channel of compressed-tensors": "triton",
    "fp8 block of compressed-tensors": "triton",
    "mxfp4": "triton_kernel",
    "nvfp4": "flashinfer_cutlass",
    "wna16": "marlin",
    "wna16 for triton": "triton",
    "awq": "auto",
    "gptq": "auto",
    "gptq in order of activation": "auto",
}
PAGED = [  # what SGLang's paged experts serve, too
    *("bf16", "fp8 block", "fp8 channel of compressed-tensors", "fp8 block of compressed-tensors"),
    *("wna16", "awq", "gptq", "gptq in order of activation"),
]
PAGE_NBYTES = 4096  # small, so that block scales are spread too
GROUPS = {  # sizes, and what their configs state
    "2": (2, ""),
    "4": (4, ""),
    "4 that overlap, and host memory": (4, "num_local_experts: 3\nhost_experts: 1"),
    "2 that hold none": (2, "host_experts: 8"),
    "2 with room for 22 MB": (2, "host_experts: auto\nmemory_bytes: 22 MB"),
}
HELD = {  # of 8 experts: on each rank, in host memory; elsewhere equal shares
    "4 that overlap, and host memory": {"bf16": (3, 1), "nvfp4": (3, 1)},
    "2 that hold none": {"bf16": (0, 8), "nvfp4": (0, 8)},
    "2 with room for 22 MB": {"bf16": (2, 4), "fp8 block": (8, 0)},
}

Digests = list[dict[str, str]]  # by layer and tensor


def load_all(rank: int, *, port: int) -> tuple[dict[str, Digests], dict[str, set[str]]]:
    """What a process without DWDP has, for each kind of weights; and what SGLang's paged experts would page of it."""
    engine_process.start(rank, 1, port)
    found, paged = {}, {}
    for kind, runner in KINDS.items():
        engine_process.use_runner(runner, rank, 1)
        with experts.without_a_gpu():
            model = experts.model(kind)
            experts.load(model)
        found[kind] = [experts.digests(layer, [*tensors_of(layer), *maxima_of(layer)]) for layer in model.layers]
        paged[kind] = paged_tensors(model.layers[0])
    return found, paged


def paged_tensors(layer: Any) -> set[str]:
    """The tensors of a loaded layer of which SGLang's paged experts keep a part, by its own table; since 0.5.23."""
    if importlib.util.find_spec("sglang.srt.layers.moe.paged_experts") is None:
        return set()
    from sglang.srt.layers.moe.paged_experts import formats

    found = formats.format_for(layer, layer.quant_method)
    if found is None:
        return set()
    return set(formats.expert_params(layer, layer.num_experts)) - {*found.unpaged, *found.freed}


def load_shard(rank: int, *, size: int, port: int, config: str | None) -> dict[str, dict[str, Any]]:
    """What a rank has with DWDP, for each kind of weights: in two passes, and after clean-up."""
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.sglang import hooks, manager

    if config is not None:
        os.environ["VMM_DWDP_CONFIG"] = config
    manager.open_driver = lambda device: HostDriver(PAGE_NBYTES)
    engine_process.start(rank, size, port)
    found: dict[str, dict[str, Any]] = {}
    for kind, runner in KINDS.items():
        engine_process.use_runner(runner, rank, size)
        with experts.without_a_gpu():
            model = experts.model(kind)
            before = [routing(layer) for layer in model.layers]
            try:
                experts.load(model)
            except ConfigError as error:
                ours = hooks.manager()
                ours.cleanup()
                found[kind] = {"refused": str(error), "ledger": ours.runtime.ledger.open()}
                continue
        seen: dict[str, Any] = {
            "outside": [outside_nbytes(layer, experts.NUM_EXPERTS // size) for layer in model.layers]
        }
        ours = engine_process.init_dwdp(model)
        seen["held"] = [len(ours.runtime.local_experts(0, owner)) for owner in (rank, "host")]
        other = "in_place" if ours.runtime.config.reads_in_place else "staged"
        seen["passes"] = [one_pass(model, ours, "staged"), one_pass(model, ours, other)]
        seen["bound"] = [layer._dwdp_bound and layer.num_local_experts == layer.num_experts for layer in model.layers]
        engine_process.shut_down()
        seen["restored"] = [routing(layer) for layer in model.layers] == before
        seen["left"] = [
            tensor.numel() for layer in model.layers for tensor in experts.tensors(layer, tensors_of(layer))
        ]
        seen["ledger"] = ours.runtime.ledger.open()
        found[kind] = seen
    return found


def one_pass(model: Any, ours: Any, mode: Any) -> Digests:
    ours.prefetch_first_layers()
    seen = []
    for layer in model.layers:
        with ours.runtime.layer(layer.layer_id, mode=mode):
            seen.append(experts.digests(layer, [*tensors_of(layer), *maxima_of(layer)]))
    return seen


def tensors_of(layer: Any) -> list[str]:
    from vmm_dwdp.integrations.sglang.expert_tensor import find
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    return [name for name in scheme_of(layer).tensors if find(layer, name) is not None]


def maxima_of(layer: Any) -> list[str]:
    from vmm_dwdp.integrations.sglang.expert_tensor import find
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    return [name for name in scheme_of(layer).maximum if find(layer, name) is not None]


def routing(layer: Any) -> dict[str, Any]:
    state = {name: getattr(layer, name) for name in ("moe_ep_size", "moe_ep_rank", "num_local_experts", "_dwdp_bound")}
    return state | {f"dispatcher.{name}": value for name, value in vars(layer.dispatcher).items() if "expert" in name}


def outside_nbytes(layer: Any, share: int) -> int:
    """Bytes that a loaded layer keeps outside the host driver's memory, of tensors whose share is a page or more."""
    tensors = experts.tensors(layer, tensors_of(layer))
    large = [tensor for tensor in tensors if tensor[:1].nbytes * share >= PAGE_NBYTES]
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:vmm_dwdp" in line]
    mapped = [range(*(int(address, 16) for address in line.split("-"))) for line in lines]
    return sum(tensor.nbytes for tensor in large if not any(tensor.data_ptr() in region for region in mapped))


@pytest.fixture(scope="module")
def without_dwdp() -> tuple[dict[str, Digests], dict[str, set[str]]]:
    [found] = run_group(partial(load_all, port=free_port()), 1)
    return found


@pytest.fixture(scope="module")
def loaded_whole(without_dwdp: tuple[dict[str, Digests], dict[str, set[str]]]) -> dict[str, Digests]:
    return without_dwdp[0]


Ranks = list[dict[str, dict[str, Any]]]  # what each saw, by kind of weights


LONG = ("4",)  # what four processes have besides is in the group that overlaps


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in GROUPS]
)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Ranks]:
    size, stated = GROUPS[request.param]
    path = tmp_path_factory.mktemp("config") / "dwdp.yaml"
    path.write_text(f"group_size: {size}\n{stated}\n")
    config = str(path) if stated else None
    return request.param, run_group(partial(load_shard, size=size, port=free_port(), config=config), size)


@pytest.fixture(scope="module")
def ranks(group: tuple[str, Ranks]) -> Ranks:
    """Without what is refused: a model that cuts out equal shares of its experts cannot have others."""
    name, found = group
    for rank in found:
        refused = {kind: seen["refused"] for kind, seen in rank.items() if "refused" in seen}
        assert refused.keys() == ({"mxfp4"} if GROUPS[name][1] else set())
        assert all("there can be no host_experts and no num_local_experts" in sentence for sentence in refused.values())
        assert not any(rank[kind].pop("ledger") for kind in refused)
    return [{kind: seen for kind, seen in rank.items() if "refused" not in seen} for rank in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sees_what_one_process_loads(kind: str, ranks: Ranks, loaded_whole: dict[str, Digests]) -> None:
    for rank in ranks:
        if kind in rank:
            assert rank[kind]["passes"] == [loaded_whole[kind]] * 2
            assert all(rank[kind]["bound"])


def test_ranks_hold_what_was_stated_or_fits(group: tuple[str, Ranks]) -> None:
    name, ranks = group
    expected = HELD.get(name, dict.fromkeys(("bf16", "nvfp4"), (experts.NUM_EXPERTS // GROUPS[name][0], 0)))
    for rank in ranks:
        assert {kind: tuple(rank[kind]["held"]) for kind in expected} == expected


@pytest.mark.parametrize("kind", PAGED)
def test_paged_experts_have_the_same_tensors(
    kind: str, without_dwdp: tuple[dict[str, Digests], dict[str, set[str]]]
) -> None:
    """SGLang states apart from us what a runner reads of each expert."""
    if importlib.util.find_spec("sglang.srt.layers.moe.paged_experts") is None:
        pytest.skip("this SGLang has no paged experts")
    digests, paged = without_dwdp
    assert set(digests[kind][0]) == paged[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_layer_is_in_its_shard(kind: str, ranks: Ranks) -> None:
    for rank in (rank for rank in ranks if kind in rank):
        assert rank[kind]["outside"] == [0] * experts.NUM_LAYERS


class Operations(TorchDispatchMode):
    """The names of operations that are given one of these tensors' memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(each.untyped_storage().data_ptr() in self._memory for each in given):
            self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def post_process(rank: int, *, port: int) -> dict[str, set[str]]:
    """Of kinds that are loaded where they stay: what post-processing does with tensors of which a share is a page."""
    from vmm_dwdp.integrations.sglang.schemes import scheme_of

    engine_process.start(rank, 1, port)
    found = {}
    for kind, runner in KINDS.items():
        engine_process.use_runner(runner, rank, 1)
        with experts.without_a_gpu():
            layer = experts.model(kind).layers[0]
            if scheme_of(layer).kept:
                tensors = experts.tensors(layer, tensors_of(layer))
                with Operations([tensor for tensor in tensors if tensor.nbytes >= PAGE_NBYTES]) as operations:
                    layer.quant_method.process_weights_after_loading(layer)
                found[kind] = operations.names
    return found


def test_nothing_is_computed_with_what_may_be_loaded_into_host_memory() -> None:
    """What it would be computed with is on the GPU."""
    [found] = run_group(partial(post_process, port=free_port()), 1)
    assert {"bf16", "fp8 block"} <= found.keys()
    assert set().union(*found.values()) <= {"alias", "detach", "view"}, found


@pytest.mark.parametrize("kind", KINDS)
def test_cleanup_leaves_layers_as_constructed_and_no_memory(kind: str, ranks: Ranks) -> None:
    for rank in (rank for rank in ranks if kind in rank):
        assert rank[kind]["restored"]
        assert not any(rank[kind]["left"])
        assert not rank[kind]["ledger"]

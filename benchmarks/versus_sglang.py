"""This library against the DWDP classes of SGLang 0.5.17, imported from its installed wheel.

Both move the same bytes of the same layers to the same GPU, in turns. In `iteration` and `cost` the peers' experts are
host memory (far_owners.py), the very same pages for both, so that the link is PCIe; in `set-up` four processes share
the GPU. SGLang streams the two expert weights and no scales, so both have these two here.

iteration  milliseconds of a pass over all layers for several ratios of compute to copies: SGLang's, ours, and ours
           divided by SGLang's, the median of the ratios of pairs
cost       microseconds of the launching thread for what SGLang calls `wait_prefetch` and
           `record_compute_and_prefetch_next`, and we `acquire` and `release`, in layers after which one is fetched; and
           for all that it does for such a layer with 60 kernels; as prefetch.py measures both. For our two plans
memory     MiB that stage remote experts
set-up     seconds from weights in torch's memory until layers can be prefetched, the slowest rank's; the median of the
           ratios of pairs

SGLang's package initialisers, which import a serving engine, are left out, and a function that logs is replaced. So is
its choice of handle types, as versions of cuda-bindings refuse the number by which it asks for two at once: handles are
descriptors, which it falls back to on any machine without a fabric. It takes bf16 weights for fp16 ones on both sides
of a copy, which moves the same bytes; so the tensors that it copies from are made by its own function here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Row, parser, report, seen
from cuda.bindings import driver
from far_owners import SHAPES, FarOwners
from prefetch import PLANS, Passes, device_seconds, launched, link

from vmm_dwdp import DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.observe.timing import EVERY, FIRST
from vmm_dwdp.testing import run_group

GROUP_SIZE = 4
RATIOS = [0.2, 0.8, 1.0, 1.1, 1.5]
PAIRS = 7  # of set-ups, and of passes for every ratio
PREFETCH_DEPTH = 2  # SGLang's, and our default
Weights = dict[str, WeightSpec]
Local = dict[tuple[int, str], torch.Tensor]  # by layer and weight


class SGLang:
    """The modules of its DWDP."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("sglang")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("SGLang is not installed here")
        root = Path(next(iter(found.submodule_search_locations)))
        if not (root / "srt/layers/moe/dwdp/vmm.py").exists():
            raise SystemExit("this SGLang has other classes than 0.5.17, which this benchmark drives")
        for package in ("", "srt", "srt.distributed", "srt.distributed.device_communicators", "srt.layers"):
            self._bare(root, package)
        self._bare(root, "srt.layers.moe")
        self._bare(root, "srt.layers.moe.dwdp")
        utils = types.ModuleType("sglang.srt.utils")
        utils.log_info_on_rank0 = lambda logger, message: logger.info(message)  # type: ignore[attr-defined]
        sys.modules["sglang.srt.utils"] = utils
        self.layout, self.transport, self.buffer, self.manager = (
            importlib.import_module(f"sglang.srt.layers.moe.dwdp.{name}")
            for name in ("layout", "transport", "weight_buffer", "weight_manager")
        )
        self.vmm = importlib.import_module("sglang.srt.layers.moe.dwdp.vmm")
        descriptors = int(driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        self.vmm.shareable_handle_types = lambda device: descriptors

    @staticmethod
    def _bare(root: Path, package: str) -> None:
        """The package without what its ``__init__`` imports."""
        module = types.ModuleType(".".join(filter(None, ("sglang", package))))
        module.__path__ = [str(root.joinpath(*package.split(".")))]
        sys.modules[module.__name__] = module

    def start(self, local: Local, experts: int, rank: int, transport: Callable[[Any, Any, Any], Any]) -> Any:
        """Its manager, from local weights in torch's memory on, as its own ``setup`` makes it (without a model)."""
        layout = self.layout.DwdpExpertLayout(experts, GROUP_SIZE, rank)
        layers, names = sorted({layer for layer, _ in local}), list(dict.fromkeys(name for _, name in local))
        specs = self.layout.build_layer_weight_specs(local, experts)
        made = transport(specs, local, layout)
        buffer = self.buffer.WeightBuffer.create(
            specs, made.handle_set, layout.local_expert_start, layout.local_expert_end, GROUP_SIZE, 0
        )
        return self.manager.DWDPWeightManager(
            buffer, made.peer_views, layout.peer_ranges, layers, names, rank, GROUP_SIZE, made
        )

    def end(self, manager: Any) -> None:
        """Its ``release``, and that of the local handles, which it leaves to the end of the process."""
        handles = list(manager._transport.handle_set.handles.values())
        manager.release()
        for handle in handles:
            self.vmm.release_handle(handle)


def in_torch_memory(weights: Weights, layers: int, rank: int, device: torch.device) -> Local:
    """One rank's share of every weight."""
    return {
        (layer, name): torch.empty(spec.of(spec.num_experts // GROUP_SIZE), dtype=spec.dtype, device=device)
        .view(torch.uint8)
        .fill_(rank)
        .view(spec.dtype)
        for layer in range(layers)
        for name, spec in weights.items()
    }


def beside(sglang: SGLang, rig: FarOwners, weights: Weights, layers: int) -> Any:
    """SGLang's manager of rank 0, its peers' views over the host memory from which ``rig`` copies."""

    def transport(specs: Any, local: Any, layout: Any) -> Any:
        made = sglang.transport.DWDPTransport()
        handles, sizes = sglang.transport._copy_local_weights_to_handles(sorted(local), local, specs, layout, 0)
        made._handle_set = sglang.layout.MnnvlHandleSet(handles=handles, sizes=sizes)
        for layer in rig.layers:
            for name, spec in weights.items():
                for peer in range(1, GROUP_SIZE):
                    experts = layer.placement.experts(peer)
                    run = layer.layouts[name].shard_bytes(peer)
                    address = rig.assembly._source(layer, name, peer, run.start)
                    view = sglang.vmm.tensor_from_ptr(address, spec.of(len(experts)), spec.dtype, 0)  # as its own
                    made._peer_views[peer, layer.number, name] = view
        return made

    return sglang.start(
        in_torch_memory(weights, layers, 0, rig.driver.device), rig.layers[0].placement.num_experts, 0, transport
    )


def iteration(sglang: SGLang, shape: str, layers: int, passes: int) -> list[Row]:
    weights = _streamed(shape)
    rig = FarOwners(torch.device("cuda"), DWDPConfig(group_size=GROUP_SIZE), weights, layers)
    theirs = beside(sglang, rig, weights, layers)
    ours = Passes(rig)
    check_bytes(theirs, rig)

    def their_pass(products: int) -> None:
        theirs.prefetch_first_layers()
        for layer in range(layers):
            theirs.wait_prefetch(layer)
            ours.products(products)
            theirs.record_compute_and_prefetch_next(layer)

    copy_s = rig.layers[0].plan.fetched_bytes / link(rig)["one large copy"] / 1e9
    rows: list[Row] = []
    for ratio in RATIOS:
        products = max(1, round(ratio * copy_s / ours.product_s))
        compute = device_seconds(functools.partial(ours.compute, products), passes)
        pairs = [
            (
                device_seconds(functools.partial(their_pass, products), passes),
                device_seconds(functools.partial(ours.run, products), passes),
            )
            for _ in range(PAIRS)
        ]
        row = {
            "compute / copies": compute / copy_s / layers,
            "compute ms": compute * 1e3,
            "copies ms": copy_s * layers * 1e3,
            "sglang ms": statistics.median(theirs_s for theirs_s, _ in pairs) * 1e3,
            "ours ms": statistics.median(ours_s for _, ours_s in pairs) * 1e3,
            "ours / sglang": statistics.median(ours_s / theirs_s for theirs_s, ours_s in pairs),
        }
        rows.append(seen(row))
    sglang.end(theirs)
    rig.close()
    return rows


def check_bytes(theirs: Any, rig: FarOwners) -> None:
    """Both fetch the same bytes: rank 0 has the first experts, and those of the others lie behind."""
    theirs.prefetch_first_layers()
    theirs.wait_prefetch(0)
    for name, ours in rig.acquire(0).items():
        fetched = slice(len(rig.layers[0].placement.experts(0)), None)
        same = theirs.weight_buffer.get_full_tensor(0, name)[fetched].view(torch.uint8)
        if not torch.equal(same, ours[fetched].view(torch.uint8)):
            raise SystemExit(f"SGLang's {name} is not ours")
    rig.release(0)


def cost(sglang: SGLang, shape: str, plan: str, layers: int) -> tuple[Row, Row]:
    weights = _streamed(shape)
    config = DWDPConfig(group_size=GROUP_SIZE, prefetch_depth=PREFETCH_DEPTH, slice_bytes=PLANS[plan])
    rig = FarOwners(torch.device("cuda"), config, weights, layers)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    theirs = beside(sglang, rig, weights, layers)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    their_bytes = free - torch.cuda.mem_get_info()[0]

    def a_pass(
        first: Callable[[], object], before: Callable[[int], object], after: Callable[[int], object]
    ) -> list[tuple[float, float]]:
        """Microseconds of ``before`` and ``after`` together, and of all for a layer, where one is fetched after it."""
        first()
        costs = launched(range(layers), before, after)
        torch.cuda.synchronize()
        return [
            ((acquire + release) * 1e6, whole * 1e6) for acquire, release, whole in costs[: layers - PREFETCH_DEPTH]
        ]

    def middle(passes: list[list[tuple[float, float]]]) -> tuple[float, float]:
        both, whole = (statistics.median(figures) for figures in zip(*itertools.chain(*passes), strict=True))
        return both, whole

    sglang_pass = theirs.prefetch_first_layers, theirs.wait_prefetch, theirs.record_compute_and_prefetch_next
    our_pass = (lambda: None), rig.acquire, rig.release
    their_us, their_layer_us = middle([a_pass(*sglang_pass) for _ in range(5)][1:])
    our_us, our_layer_us = middle([a_pass(*our_pass) for _ in range(FIRST + EVERY)][FIRST:])  # one of them is timed
    about = {"shape": shape, "ours": plan}
    costs = {
        **about,
        "sglang us": their_us,
        "ours us": our_us,
        "sglang / ours": their_us / our_us,
        "sglang layer us": their_layer_us,
        "ours layer us": our_layer_us,
    }
    resident = layers * sum(len(layout.resident_bytes(0)) for layout in rig.layers[0].layouts.values())
    memory = {
        **about,
        "sglang MiB": (their_bytes - resident) / 2**20,
        "ours MiB": rig.assembly.staged_nbytes / 2**20,
    }
    sglang.end(theirs)
    rig.close()
    return seen(costs), seen(memory)


def set_up(shape: str, layers: int, directory: Path, rank: int) -> list[tuple[float, float]]:
    """One rank's seconds for each pair of set-ups: SGLang's and ours. All ranks begin each of them together."""
    torch.cuda.set_device(0)
    weights = _streamed(shape)
    sglang = SGLang()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{directory}/gloo", rank=rank, world_size=GROUP_SIZE)
    turn = itertools.count()
    group = types.SimpleNamespace(cpu_group=dist.group.WORLD, device_group=dist.group.WORLD)

    def theirs(local: Local) -> Callable[[], object]:
        made = sglang.start(
            local,
            next(iter(weights.values())).num_experts,
            rank,
            lambda specs, local, layout: sglang.transport.DWDPTransport.create(specs, local, group, layout, 0),
        )
        made.prefetch_first_layers()
        return functools.partial(sglang.end, made)

    def ours(local: Local) -> Callable[[], object]:
        runtime = DWDPRuntime(DWDPConfig(group_size=GROUP_SIZE), rank, "cuda:0", directory / str(next(turn)))
        for layer in range(layers):
            runtime.add_layer(layer, weights)
        for layer, name in list(local):
            runtime.local_shard(layer, name).copy_(local.pop((layer, name)))
        runtime.publish()
        return runtime.close

    def timed(start: Callable[[Local], Callable[[], object]]) -> float:
        local = in_torch_memory(weights, layers, rank, torch.device("cuda:0"))
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        end = start(local)
        torch.cuda.synchronize()
        took = time.perf_counter() - begin
        dist.barrier()
        end()
        torch.cuda.empty_cache()
        return took

    timed(theirs)
    timed(ours)
    found = [(timed(theirs), timed(ours)) for _ in range(PAIRS)]
    dist.destroy_process_group()
    return found


def set_up_row(shape: str, layers: int) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        ranks = run_group(functools.partial(set_up, shape, layers, Path(directory)), GROUP_SIZE, "cuda")
    slowest = [(max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)) for pairs in zip(*ranks, strict=True)]
    row = {
        "layers": layers,
        "sglang s": statistics.median(theirs for theirs, _ in slowest),
        "ours s": statistics.median(ours for _, ours in slowest),
        "ours / sglang": statistics.median(ours / theirs for theirs, ours in slowest),
    }
    return seen(row)


def _streamed(shape: str) -> Weights:
    return {name: spec for name, spec in SHAPES[shape].items() if not name.endswith("_scale")}


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--shape", choices=SHAPES, default="qwen3-30b-bf16", help="of iteration and set-up")
    arguments_of.add_argument("--cost-shape", choices=SHAPES, default="deepseek-r1-fp8", help="of cost and memory")
    arguments_of.add_argument("--layers", type=int, default=6, help="layers of a pass (default: 6)")
    arguments_of.add_argument("--passes", type=int, default=1, help="in a row that are timed together (default: 1)")
    arguments = arguments_of.parse_args()
    if arguments.device.type != "cuda":
        arguments_of.error("SGLang's classes need a GPU")
    sglang = SGLang()
    costs, memory = zip(*(cost(sglang, arguments.cost_shape, plan, layers=5) for plan in PLANS), strict=True)
    iterations = iteration(sglang, arguments.shape, arguments.layers, arguments.passes)
    prepared = set_up_row(arguments.shape, arguments.layers)
    report(arguments, {"iteration": iterations, "cost": costs, "memory": memory, "set-up": [prepared]})


if __name__ == "__main__":
    main()

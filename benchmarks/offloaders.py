"""Offloading by others, for `versus_offloaders.py`: their own classes, imported from what is installed or unpacked.

Each is given the same layers on the GPU, as its engine gives it a model's, and moves their weights to host memory:

accelerate        `cpu_offload`: hooks that copy a module's weights before its forward, from memory that is not pinned
SGLang 0.5.17     `--cpu-offload-gb` (OffloaderV1): copies to the GPU in each forward, from pinned memory
                  `--offload-group-size` (OffloaderV2): the same, layers ahead on a stream of its own
SGLang 0.5.23     `--enable-paged-experts` (EagerExecutor): experts that were used last are kept in slots on the GPU,
                  which the host plans. Executor, policy and store of pinned memory are its own; the product in the
                  slots, and the sum over a token's experts, are ours. What plans on the device instead, for graphs, is
                  left out: its kernels are compiled by that version's own build
vLLM              `--cpu-offload-gb` (UVAOffloader): kernels read pinned memory
                  `--offload-group-size` (PrefetchOffloader): copies layers ahead into buffers that stay

Both of SGLang's versions are not in one process: beside 0.5.17, the package of the paged experts is taken alone.
vLLM's classes are imported without its package initialisers, loggers, and platforms, of which this is CUDA. The view by
which kernels read pinned memory is made by a function of its compiled extension, which needs another torch; here
`tensor_at` makes it, over the same address.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from bank import each_expert, routed
from decode import Gemm, Weights
from torch import Tensor, nn

from vmm_dwdp.allocator.tensors import tensor_at

LAYERS_AHEAD = 2  # that those copy which copy ahead: as many slots as ours have
NAMES = ("w13", "w2")
KEPT = 0.25  # of the experts, that those who keep some on the GPU keep there, as our bank does
Moved = Literal["all", "used", "missed"]  # experts of which the bytes cross the link in a pass


class Experts(nn.Module):
    """A layer's experts, as parameters."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))

    def forward(self, x: Tensor, rows: Tensor, gemm: Gemm) -> Tensor:
        return routed(x, rows, {name: getattr(self, name) for name in NAMES}, gemm)


class DecoderLayer(nn.Module):
    """What stands for a decoder layer: offloaders take the experts out of it."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.experts = Experts(weights)

    def forward(self, x: Tensor, rows: Tensor, gemm: Gemm) -> Tensor:
        out: Tensor = self.experts(x, rows, gemm)
        return out


class Offloaded(NamedTuple):
    """Layers whose weights an offloader has moved.

    Attributes:
        before, after: what its engine calls around a pass that is captured.
        missed: experts that were not on the GPU when they were used, of all so far; None if it keeps none there.
    """

    layers: Sequence[nn.Module]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    missed: Callable[[], int] | None = None


class Offloader(NamedTuple):
    """One of theirs.

    Attributes:
        offload: moves the weights of layers that are on the GPU.
        moves: whose bytes cross the link in a pass.
        ahead: whether a pass leaves copies for the next one.
        on_cpu: whether it does anything without a GPU.
        prefills: whether passes of many tokens are its own.
    """

    name: str
    offload: Callable[[list[nn.Module]], Offloaded]
    moves: Moved
    ahead: bool = False
    on_cpu: bool = False
    prefills: bool = True


class _Chosen(NamedTuple):
    """What SGLang's executor reads of a router's choice."""

    topk_ids: Tensor
    topk_weights: Tensor


class _Dispatched(NamedTuple):
    """And of the tokens that were given to experts."""

    hidden_states: Tensor
    topk_output: _Chosen


class _Logger(logging.Logger):
    """What vLLM's classes log by."""

    info_once = logging.Logger.info
    debug_once = logging.Logger.debug


def _accelerate() -> list[Offloader]:
    big_modeling = importlib.import_module("accelerate.big_modeling")

    def offload(layers: list[nn.Module]) -> Offloaded:
        for layer in layers:
            big_modeling.cpu_offload(layer, execution_device=next(layer.parameters()).device)
        return Offloaded(layers)

    version = importlib.import_module("accelerate").__version__
    return [Offloader(f"accelerate {version}, cpu_offload", offload, "all", on_cpu=True)]


def _sglang() -> list[Offloader]:
    theirs = importlib.import_module("sglang.srt.utils.offloader")
    version = importlib.import_module("sglang.version").__version__
    os.environ.setdefault("SGLANG_RUN_ID", f"versus-offloaders-{os.getpid()}")  # its engine does

    def on_demand(layers: list[nn.Module]) -> Offloaded:
        return Offloaded(theirs.OffloaderV1(cpu_offload_max_bytes=1 << 60).wrap_modules(iter(layers)))

    def ahead(layers: list[nn.Module]) -> Offloaded:
        offloader = theirs.OffloaderV2(
            group_size=1, num_in_group=1, prefetch_step=LAYERS_AHEAD, mode="cpu", dp_rank=0, dp_size=1
        )
        wrapped = offloader.wrap_modules(iter(layers), lambda layer: layer.experts, lambda experts: list(NAMES))
        offloader.post_init()
        return Offloaded(wrapped)

    name = f"SGLang {version}, Offloader"
    return [Offloader(f"{name}V1", on_demand, "all"), Offloader(f"{name}V2", ahead, "all", ahead=True)]


def _paged() -> list[Offloader]:
    package = "sglang.srt.layers.moe.paged_experts"
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        importlib.import_module("sglang.srt.layers.moe.token_dispatcher")
        _bare(package, _found(package))
    executor, residency, runners, store = (
        importlib.import_module(f"{package}.{name}") for name in ("executor", "residency", "runners", "store")
    )

    class Store(store.HostExpertStore):  # type: ignore[misc, name-defined]
        loaded = 0

        def page_in(self, layer: nn.Module, loads: Sequence[tuple[int, int]]) -> None:
            self.loaded += len(loads)
            super().page_in(layer, loads)

    class Contract(runners.RunnerContract):  # type: ignore[misc, name-defined]
        def run_wave(self, base_method: Any, layer: Any, dispatch_output: Any, slots: Tensor, merged: Any) -> Tensor:
            part: Tensor = runners.run_on_slots(base_method, layer, dispatch_output, slots)
            return part if merged is None else torch.where((slots < 0).unsqueeze(-1), merged, part)

        def _sum_top_k(self, entries: Tensor, out: Tensor, routed_scaling_factor: float) -> None:
            out.copy_(entries.mean(1))

    class Paged(nn.Module):
        def __init__(self, experts: Experts) -> None:
            super().__init__()
            count = len(experts.w13)
            slots = int(count * KEPT)
            self.store = Store(experts, NAMES, count, pin=torch.cuda.is_available())
            for name in NAMES:
                self.store.host[name].copy_(getattr(experts, name))
                self.register_buffer(name, getattr(experts, name)[:slots].clone())
            self.executor = executor.EagerExecutor(
                base_method=self,
                store=self.store,
                policy=residency.LRUPolicy(slots),
                contract=Contract(),
                num_experts=count,
                routed_scaling_factor=1.0,
            )

        def apply(self, layer: nn.Module, dispatch_output: _Dispatched) -> types.SimpleNamespace:  # type: ignore[override]
            x, rows = dispatch_output.hidden_states, dispatch_output.topk_output.topk_ids
            weights = {name: getattr(layer, name) for name in NAMES}
            return types.SimpleNamespace(hidden_states=each_expert(x, rows, weights, self.gemm))

        def forward(self, x: Tensor, rows: Tensor, gemm: Gemm) -> Tensor:
            self.gemm = gemm
            out: Tensor = self.executor.run(self, _Dispatched(x, _Chosen(rows, torch.ones_like(rows)))).hidden_states
            return out

    def offload(layers: list[nn.Module]) -> Offloaded:
        paged = []
        for layer in layers:
            paged.append(Paged(layer.experts))  # type: ignore[arg-type]
            del layer.experts
        return Offloaded(paged, missed=lambda: sum(layer.store.loaded for layer in paged))

    return [Offloader("SGLang 0.5.23, paged experts, EagerExecutor", offload, "missed", on_cpu=True, prefills=False)]


def _vllm() -> list[Offloader]:
    packages = ("vllm", "vllm.model_executor", "vllm.model_executor.offloader")
    root = _found(packages[-1]).parents[1]
    for package in packages:  # without what their initialisers import
        _bare(package, root.joinpath(*package.split(".")[1:]))
    platforms: Any = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(
        is_xpu=lambda: False,
        is_cpu=lambda: False,
        is_cuda_alike=lambda: True,
        is_pin_memory_available=torch.cuda.is_available,
        dispatch_key="CUDA",
    )
    sys.modules["vllm.platforms"] = platforms
    loggers: Any = types.ModuleType("vllm.logger")  # its own ask which rank of an engine this is
    loggers.init_logger = _Logger
    sys.modules["vllm.logger"] = loggers
    base, uva, prefetch = (importlib.import_module(f"{packages[-1]}.{name}") for name in ("base", "uva", "prefetch"))
    pinned: list[Tensor] = []

    def view(memory: Tensor) -> Tensor:
        pinned.append(memory)
        there = torch.device("cuda", torch.cuda.current_device())
        return tensor_at(memory.data_ptr(), memory.shape, memory.dtype, there)

    uva.get_accelerator_view_from_cpu_tensor = view

    def in_place(layers: list[nn.Module]) -> Offloaded:
        pinned.clear()
        return Offloaded(uva.UVAOffloader(cpu_offload_max_bytes=1 << 60).wrap_modules(iter(layers)))

    def ahead(layers: list[nn.Module]) -> Offloaded:
        offloader = prefetch.PrefetchOffloader(1, 1, LAYERS_AHEAD, offload_params=set(NAMES))
        base.set_offloader(offloader)  # whom its operators ask
        wrapped = offloader.wrap_modules(iter(layers))
        offloader.post_init()
        return Offloaded(wrapped, offloader.sync_prev_onload, offloader.join_after_forward)

    about = next(root.parent.glob("vllm-*.dist-info"), None)
    name = f"vLLM {about.name.split('-')[1].removesuffix('.dist') if about else ''}".strip()
    return [
        Offloader(f"{name}, UVAOffloader", in_place, "used"),
        Offloader(f"{name}, PrefetchOffloader", ahead, "all", ahead=True),
    ]


def _bare(package: str, folder: Path) -> None:
    """The package without what its ``__init__`` imports."""
    module: Any = types.ModuleType(package)
    module.__path__ = [str(folder)]
    sys.modules[package] = module


def _found(package: str) -> Path:
    for folder in sys.path:
        if (found := Path(folder, *package.split("."))).is_dir():
            return found
    raise ModuleNotFoundError(f"No module named {package!r}")


# The paged experts are the last: what fails in a capture may leave a device on which nothing runs any more
KINDS: dict[str, Callable[[], list[Offloader]]] = {
    "sglang": _sglang,
    "vllm": _vllm,
    "accelerate": _accelerate,
    "paged": _paged,
}


def available(kinds: Sequence[str], device: torch.device) -> tuple[list[Offloader], dict[str, str]]:
    """Those that can run here, and why others cannot, by name."""
    found: list[Offloader] = []
    left_out: dict[str, str] = {}
    for kind in kinds:
        try:
            theirs = KINDS[kind]()
        except Exception as error:  # whatever another's package raises where it cannot be imported
            left_out[kind] = str(error).partition("\n")[0] or type(error).__name__
            continue
        for offloader in theirs:
            if device.type == "cpu" and not offloader.on_cpu:
                left_out[offloader.name] = "needs a GPU"
            else:
                found.append(offloader)
    return found, left_out

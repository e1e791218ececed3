"""Offloading by others, for `versus_offloaders.py`: their own classes, imported from what is installed or unpacked.

Each is given the same layers on the GPU, as its engine gives it a model's, and moves their weights to host memory:

accelerate        `cpu_offload`: hooks that copy a module's weights before its forward, from memory that is not pinned
SGLang 0.5.17     `--cpu-offload-gb` (OffloaderV1): copies to the GPU in each forward, from pinned memory
                  `--offload-group-size` (OffloaderV2): the same, layers ahead on a stream of its own
vLLM              `--cpu-offload-gb` (UVAOffloader): kernels read pinned memory
                  `--offload-group-size` (PrefetchOffloader): copies layers ahead into buffers that stay

vLLM's classes are imported without its package initialisers, loggers, and platforms, of which this is CUDA. The view by
which kernels read pinned memory is made by a function of its compiled extension, which needs another torch; here
`tensor_at` makes it, over the same address.

Left out: the paged experts of SGLang 0.5.23, whose kernels are compiled by its own build, and which cannot be in a
process with 0.5.17.
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
from bank import routed
from decode import Gemm, Weights
from torch import Tensor, nn

from vmm_dwdp.allocator.tensors import tensor_at

LAYERS_AHEAD = 2  # that those copy which copy ahead: as many slots as ours have
NAMES = ("w13", "w2")
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
    """

    layers: Sequence[nn.Module]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None


class Offloader(NamedTuple):
    """One of theirs.

    Attributes:
        offload: moves the weights of layers that are on the GPU.
        moves: whose bytes cross the link in a pass.
        ahead: whether a pass leaves copies for the next one.
        on_cpu: whether it does anything without a GPU.
    """

    name: str
    offload: Callable[[list[nn.Module]], Offloaded]
    moves: Moved
    ahead: bool = False
    on_cpu: bool = False


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


def _vllm() -> list[Offloader]:
    root = _found("vllm")
    packages = ("vllm", "vllm.model_executor", "vllm.model_executor.offloader")
    for package in packages:  # without what their initialisers import
        bare: Any = types.ModuleType(package)
        bare.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = bare
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
        return tensor_at(memory.data_ptr(), memory.shape, memory.dtype, torch.device("cuda"))

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


def _found(package: str) -> Path:
    for folder in sys.path:
        if (Path(folder) / package / "model_executor" / "offloader").is_dir():
            return Path(folder) / package
    raise ModuleNotFoundError(f"No module named {package!r}")


# accelerate is the last: what fails in a capture may leave a device on which nothing runs any more
KINDS: dict[str, Callable[[], list[Offloader]]] = {"sglang": _sglang, "vllm": _vllm, "accelerate": _accelerate}


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

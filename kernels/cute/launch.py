"""Compiling our CuTe DSL kernels, once for each kind of operands, and launching them on torch tensors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmm_dwdp.kernels.cute import MAX_EXPERTS
from vmm_dwdp.kernels.formats import FP8, Format
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, not_installed

DTYPES = (torch.bfloat16, torch.float16, FP8)
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a"}  # by compute capability: what the kernels are compiled for
UNTRIED = "sm_100a"


def _missing() -> str | None:
    absent = not_installed("cutlass", "nvidia-cutlass-dsl[cu13]") or not_installed("tvm_ffi", "apache-tvm-ffi")
    if absent is not None:
        return absent
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability not in ARCHITECTURES:
        return f"needs a Hopper GPU (sm_90), and this one is sm_{''.join(map(str, capability))}"
    return None


def _untried() -> str | None:
    if torch.cuda.is_available() and ARCHITECTURES.get(torch.cuda.get_device_capability()) == UNTRIED:
        return (
            "has never been run on a Blackwell GPU (sm_100): it is chosen only by name, and its results are unchecked"
        )
    return None


def _refuses(problem: Problem) -> str | None:
    if not problem.x.is_cuda:
        return f"takes tensors on a GPU, and x is on {problem.x.device}"
    if problem.form not in (Format.PLAIN, Format.FP8_BLOCK) or problem.x.dtype not in DTYPES:
        return f"takes bf16, fp16 and fp8 with 1x128/128x128 scales, not {problem.form.value} of {problem.x.dtype}"
    if problem.n % 8:
        return f"takes N that is a multiple of 8, not {problem.n}"
    if problem.num_experts > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, not {problem.num_experts}"
    return None


def _run(problem: Problem) -> Tensor:
    x = problem.x
    out = x.new_empty((x.shape[0], problem.n), dtype=problem.out_dtype)
    if out.numel() == 0:
        return out
    kernel = compile_kernel(x.dtype, len(problem.weights), _arch(x.device))
    weight_scales = list(problem.weight_scales) or None
    with torch.cuda.device(x.device):
        kernel(x, list(problem.weights), problem.offsets, out, problem.x_scale, weight_scales, _num_ctas(x.device))
    return out


@functools.cache
def _arch(device: torch.device) -> str:
    return ARCHITECTURES[torch.cuda.get_device_capability(device)]


@functools.cache
def _num_ctas(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_compiled: dict[tuple[torch.dtype, int, str], Callable[..., None]] = {}
_compiling = threading.Lock()  # not of a call whose kernel is there


def compile_kernel(dtype: torch.dtype, num_entries: int, arch: str) -> Callable[..., None]:
    """The kernel for activations and weights of ``dtype`` and a list of ``num_entries`` weights; needs no GPU.

    It is compiled once, whichever threads ask for it.

    Args:
        arch: ``"sm_90a"``, or ``"sm_100a"``, whose kernel has never been run.

    Returns:
        ``kernel(x, weights, offsets, out, x_scale, weight_scales, num_ctas)``; it launches on torch's current stream.
    """
    key = dtype, num_entries, arch
    if (kernel := _compiled.get(key)) is None:
        with _compiling:
            if (kernel := _compiled.get(key)) is None:  # nor by another thread, while this one waited
                kernel = _compiled[key] = _compile(*key)
    return kernel


def _compile(dtype: torch.dtype, num_entries: int, arch: str) -> Callable[..., None]:
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    from vmm_dwdp.kernels.cute.sm90 import GroupedGemmSm90
    from vmm_dwdp.kernels.cute.sm100 import GroupedGemmSm100

    names = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16, FP8: cutlass.Float8E4M3FN}
    element = names[dtype]
    scaled = dtype == FP8
    aligned = 16 // dtype.itemsize
    rows, n, k = cute.sym_int(), cute.sym_int(divisibility=8), cute.sym_int(divisibility=aligned)

    def matrix(kind: Any, *shape: Any, divisibility: int, align: int = 16) -> Any:
        strides = [cute.sym_int64(divisibility=divisibility) for _ in shape[1:]]
        return make_fake_tensor(kind, shape, (*strides, 1), assumed_align=align)

    x = matrix(element, rows, k, divisibility=aligned)
    weights = [matrix(element, cute.sym_int(), n, k, divisibility=aligned) for _ in range(num_entries)]
    out = matrix(cutlass.BFloat16 if scaled else element, rows, n, divisibility=8)
    offsets = matrix(cutlass.Int32, cute.sym_int(), divisibility=1, align=4)
    x_scale = weight_scales = None
    if scaled:
        blocks = cute.sym_int()
        x_scale = matrix(cutlass.Float32, rows, blocks, divisibility=1, align=4)
        weight_scales = [
            matrix(cutlass.Float32, cute.sym_int(), cute.sym_int(), blocks, divisibility=1, align=4)
            for _ in range(num_entries)
        ]
    compiled: Callable[..., None] = cute.compile(
        {"sm_90a": GroupedGemmSm90, "sm_100a": GroupedGemmSm100}[arch](element, num_entries),
        x,
        weights,
        offsets,
        out,
        x_scale,
        weight_scales,
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch {arch}",
    )
    return compiled


CUTE = Provider(
    "cute",
    "sm_90: bf16, fp16, and fp8 with 1x128/128x128 scales; N a multiple of 8, at most 512 experts",
    _missing,
    _refuses,
    _run,
    imports="vmm_dwdp.kernels.cute.sm90",
    untried=_untried,
)

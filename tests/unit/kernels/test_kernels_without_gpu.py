"""Our kernels without a GPU: the CuTe DSL's compile, Triton's compile for every architecture and run interpreted.

Triton decides when a kernel is defined whether it is interpreted: each part runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from support.triton_scripts import python

from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.cute.launch import DTYPES, compile_kernel
from vmm_dwdp.kernels.problem import MAX_ENTRIES
from vmm_dwdp.kernels.testing import ROUTINGS

INTERPRET = """
import itertools, json, torch
from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.testing import ROUTINGS, random_operands, relative_error
from vmm_dwdp.kernels.triton.grouped_gemm import run

for form, routing, n in itertools.product(Format, ROUTINGS, (128, 136)):
    operands = random_operands(form, num_rows=70, experts=[3, 1, 2], n=n, k=160, routing=routing, dtype=torch.float16)
    error = relative_error(run(check(*operands)), operands)
    print(json.dumps([form.value, routing, n, error]))
"""

READS = """
import json, torch
from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.testing import random_operands
from vmm_dwdp.kernels.triton import grouped_gemm

def multiply(operands, *constants):
    _, weight, _, _, _, _, start, end, column, *_ = operands
    print(json.dumps([int(number.handle.data.item()) for number in (weight, start, end, column)]))

grouped_gemm._multiply = multiply
operands = random_operands(Format.PLAIN, num_rows=256, experts=[30, 2], n=136, k=32, dtype=torch.float16)
counts = torch.tensor([64, 17, 1, 0, 63, 16, 33, *[2] * 24, 14])
operands.offsets.copy_(counts.cumsum(0))
grouped_gemm.run(check(*operands))
"""

LOADS = """
import collections, json, torch
from triton.runtime.interpreter import InterpreterBuilder
from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.testing import random_operands
from vmm_dwdp.kernels.triton.grouped_gemm import run

loaded = collections.Counter()  # by address
load = InterpreterBuilder.create_masked_load

def count_and_load(self, pointers, mask, *rest):
    loaded.update(pointers.data[mask.data].tolist())
    return load(self, pointers, mask, *rest)

InterpreterBuilder.create_masked_load = count_and_load
for form in Format:
    operands = random_operands(form, num_rows=8, experts=[3], n=136, k=160, routing="one", dtype=torch.float16)
    loaded.clear()
    run(check(*operands))
    _, (weight,), _, scales = operands
    for name, tensor in {"weight": weight, **({"scale": scales.weight[0]} if scales else {})}.items():
        size, begin = tensor.element_size(), tensor.data_ptr()
        times = [loaded[begin + size * i] for i in range(tensor.numel())]
        one = tensor[0].numel()
        print(json.dumps([form.value, name, [sorted(set(times[i * one : (i + 1) * one])) for i in range(3)]]))
"""

A_GPU = """
import json, sys, torch
from triton import knobs
from support.triton_scripts import compile_for
from vmm_dwdp.kernels import Format, Scales, tensor_list, tensor_list_grouped_gemm, warm_up
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.provider import Providers
from vmm_dwdp.kernels.testing import random_operands
from vmm_dwdp.kernels.triton import grouped_gemm
from vmm_dwdp.kernels.triton.launch import TRITON

capability = int(sys.argv[1])

class Compile:
    def __getitem__(self, grid):
        return lambda *arguments, **options: made.append(kernel.warmup(*arguments, grid=grid, **options))

made = []
kernel, grouped_gemm._kernel = grouped_gemm._kernel, Compile()
compile_for(capability)
"""

COMPILE = f"""{A_GPU}
fp8 = (Format.FP8_BLOCK, Format.FP8_ROWWISE) if capability >= 89 else ()
for form in (Format.PLAIN, Format.NVFP4, Format.MXFP4, *fp8):
    for num_rows, n in ((60, 136), (1000, 128)):
        grouped_gemm.run(check(*random_operands(form, num_rows=num_rows, experts=[3, 1, 2], n=n, k=160)))
        print(json.dumps([form.value, num_rows, len(made[-1].asm["ptx"])]))
"""

FORMS = f"""{A_GPU}
forms = set()  # which Triton has not and wants to compile; it is told not to, as this takes long

def count(*, key, **others):
    forms.add(key)
    return True

knobs.runtime.jit_cache_hook = count
provider = TRITON._replace(missing=lambda: None, refuses=lambda problem: None, run=grouped_gemm.run)
tensor_list.PROVIDERS = Providers((provider,))

def somewhere(tensor):  # at an address that a new tensor would not have
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return room.copy_(tensor)

for form in Format:
    given = random_operands(form, num_rows=1, experts=[3, 1, 2], n=136, k=160)
    forms.clear()
    warm_up(given.weights, range(1, 701), scales=given.scales)
    warm = len(forms)
    for num_rows in (*range(1, 130), 384, 385, 399, 400, 700):
        x, _, offsets, scales = random_operands(form, num_rows=num_rows, experts=[3, 1, 2], n=136, k=160)
        if scales:
            x_scale = None if scales.x is None else somewhere(scales.x)
            scales = Scales(given.scales.weight, x_scale, given.scales.weight_global)
        tensor_list_grouped_gemm(x, given.weights, somewhere(offsets), scales=scales)
    print(json.dumps([form.value, warm, len(forms)]))
"""


@pytest.fixture(scope="module")
def interpreted() -> Mapping[tuple[object, ...], float]:
    """Relative error of the interpreted Triton kernel, by format, routing and N."""
    return {tuple(key): error for *key, error in python(INTERPRET, TRITON_INTERPRET="1")}


@pytest.mark.parametrize("n", [128, 136])  # whole tiles, and one that N ends in
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", Format)
def test_triton_kernel_interpreted(
    form: Format, routing: str, n: int, interpreted: Mapping[tuple[object, ...], float]
) -> None:
    # fp8 gives bf16, which the interpreter rounds toward zero.
    tolerance = 4e-3 if form in (Format.FP8_BLOCK, Format.FP8_ROWWISE) else 5e-4
    assert interpreted[form.value, routing, n] < tolerance


def test_triton_kernel_reads_weights_of_few_rows_once() -> None:
    tiles = python(READS, TRITON_INTERPRET="1")
    assert {end - start for _, start, end, _ in tiles} == {64, 17, 1, 63, 16, 33, 2, 14}
    assert len(tiles) == 31 * 2  # experts with rows, tiles along N
    assert len({(weight, column) for weight, _, _, column in tiles}) == len(tiles)


def test_triton_kernel_loads_each_number_of_an_expert_once() -> None:
    """Also where N ends within a tile: what is loaded again over a link crosses it again."""
    loads = python(LOADS, TRITON_INTERPRET="1")
    assert len(loads) == 2 * len(Format) - 1  # plain weights have no scales
    for form, name, times in loads:
        assert times == [[0], [1], [0]], (form, name)  # of three experts the second has all rows


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernel_compiles(capability: int) -> None:
    compiled = python(COMPILE, str(capability))
    assert len(compiled) == 2 * (5 if capability >= 89 else 3)


def test_triton_kernel_needs_no_other_form_after_a_warm_up() -> None:
    forms = python(FORMS, "90")
    assert [form for form, _, _ in forms] == [form.value for form in Format]
    for form, warm, in_all in forms:
        # Widths of 16 alone, of 16 beside 32 and 64, of 32 beside 64, 64 alone, and 128.
        assert (warm, in_all) == (6, 6), form


@pytest.mark.parametrize("num_entries", [1, MAX_ENTRIES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_cute_kernel_compiles(arch: str, dtype: torch.dtype, num_entries: int) -> None:
    pytest.importorskip("cutlass")
    assert callable(compile_kernel(dtype, num_entries, arch))

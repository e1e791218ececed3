"""The product of few tokens with the experts that each chose: in torch's words; in Triton, interpreted and compiled.

Triton decides when a kernel is defined whether it is interpreted: each part runs in a process of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.chosen import FORMS, ROUTINGS, SHAPES, operands, relative_error
from support.triton_scripts import python

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels import Format, chosen_gemm
from vmm_dwdp.kernels.formats import FP8

INTERPRET = """
import collections, itertools, json, torch
from support.chosen import FORMS, ROUTINGS, SHAPES, operands, relative_error
from triton.runtime.interpreter import InterpreterBuilder
from vmm_dwdp.kernels.triton.chosen import run

loaded = collections.Counter()  # by address
load = InterpreterBuilder.create_masked_load

def count_and_load(self, pointers, mask, *rest):
    loaded.update(pointers.data[mask.data].tolist())
    return load(self, pointers, mask, *rest)

def times(tensor):  # by expert, how often each of its numbers is loaded
    addresses = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.element_size())
    numbers = [loaded[address] for address in addresses]
    one = tensor[0].numel()
    return [sorted(set(numbers[i : i + one])) for i in range(0, len(numbers), one)]

InterpreterBuilder.create_masked_load = count_and_load
for form, (number, routing), (n, k) in itertools.product(FORMS, enumerate(ROUTINGS), SHAPES):
    given, expected = operands(form, routing, n, k, own=bool(number % 2), dtype=torch.float16)
    loaded.clear()
    out = run(*given, form)
    empty = [out[token, place].abs().max().item() for token, place in (expected == 0).all(2).nonzero().tolist()]
    rows = given.rows.unique().tolist()
    print(json.dumps([form.value, relative_error(out, expected), empty, times(given.weight), rows]))
"""

COMPILE = """
import itertools, json, re, sys, torch
from support.chosen import FORMS, operands
from support.triton_scripts import compile_for
from vmm_dwdp.kernels.triton import chosen

capability = int(sys.argv[1])

class Compile:
    def __getitem__(self, grid):
        def compiled(*arguments, **options):
            ptx = kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]
            print(json.dumps([options["FORM"], re.findall(r"ld[.]global[.a-z]*[.](v?\\d?[.]?b\\d+)", ptx)]))
        return compiled

kernel, chosen._kernel = chosen._kernel, Compile()
compile_for(capability)
for form, (n, k) in itertools.product(FORMS, ((16, 2048), (16, 768), (16, 2880))):
    if form.value.startswith("fp8") and capability < 89:
        continue
    chosen.run(*operands(form, "one token", n, k, own=False, dtype=torch.bfloat16)[0], form)
"""


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_token_has_its_products(form: Format, routing: str, n: int, k: int, own: bool) -> None:
    given, expected = operands(form, routing, n, k, own=own, dtype=torch.bfloat16)
    out = chosen_gemm(*given)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 4e-3
    assert not out[(expected == 0).all(2)].any()


def test_triton_multiplies_and_reads_every_number_that_is_chosen_once() -> None:
    """However many tokens chose it: what is loaded again over a link crosses it again."""
    cases = python(INTERPRET, TRITON_INTERPRET="1")
    assert len(cases) == len(list(itertools.product(FORMS, ROUTINGS, SHAPES)))
    for form, error, empty, times, rows in cases:
        assert error < 5e-4, form
        assert set(empty) <= {0.0}
        assert times == [[int(row in rows)] for row in range(5)], (form, rows)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_loads_weights_by_16_bytes_a_thread(capability: int) -> None:
    compiled = python(COMPILE, str(capability))
    assert len(compiled) == 3 * (3 if capability >= 89 else 2)
    for form, loads in compiled:
        # Weights and x by 16 bytes; by less the scales and the numbers of experts.
        assert loads.count("v4.b32") >= 4, (form, loads)
        assert all(load in ("v4.b32", "b32", "b16", "b8") for load in loads), (form, loads)


X, ROWS = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int32)
PLAIN, EIGHT = torch.zeros(4, 8, 64, dtype=torch.bfloat16), torch.zeros(4, 8, 64).to(FP8)
FOUR = torch.zeros(4, 8, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((X.float(), PLAIN, ROWS), "x must be contiguous bf16 or fp16"),
        ((X[:, ::2], PLAIN, ROWS), "x must be contiguous"),
        ((X, PLAIN, ROWS.float()), "rows must be contiguous int32 or int64"),
        ((X, PLAIN, ROWS[:1]), "must be of the same tokens"),
        ((X[:1].expand(512, -1).contiguous(), PLAIN, torch.zeros(512, 3, dtype=torch.int32)), "at most 1024"),
        ((X, PLAIN.half(), ROWS), "with x of torch.bfloat16 it must be that"),
        ((X, PLAIN[..., :32], ROWS), r"weight must be \[R, N, 64\]"),
        ((X, PLAIN[:, ::2], ROWS), "contiguous rows"),
        ((X[:, :12].contiguous(), PLAIN[..., :12].contiguous(), ROWS), "multiple of 16 bytes, not 12"),
        ((X.view(-1)[1:65].view(1, 64), PLAIN, ROWS[:1]), "must start at a multiple of 16 bytes"),
        ((X, PLAIN, ROWS, torch.ones(4, 1, 1)), "scale must be None for plain weights"),
        ((X, EIGHT, ROWS), "scale must be contiguous torch.float32 .* not None"),
        ((X, EIGHT, ROWS, torch.ones(4, 2, 1)), r"\[4, 1, 1\] for fp8"),
        ((X, FOUR, ROWS, torch.ones(4, 8, 2)), "float8_e8m0fnu .* for mxfp4"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen_gemm(*arguments)

"""Other names for numbers, in torch's words and in Triton, interpreted and compiled, against plain lists."""

from __future__ import annotations

import random

import pytest
import torch
from support.triton_scripts import python

from vmm_dwdp.kernels.relabel import relabel

INTERPRET = """
import json, sys, torch
from vmm_dwdp.kernels.triton.relabel import run

for numbers, labels, dtype in json.loads(sys.stdin.read()):
    told = run(torch.tensor(numbers, dtype=getattr(torch, dtype)), torch.tensor(labels, dtype=torch.int32))
    print(json.dumps([told.tolist(), str(told.dtype).removeprefix("torch.")]))
"""

COMPILE = """
import json, sys, torch
from support.triton_scripts import compile_for
from vmm_dwdp.kernels.triton import relabel

class Compile:
    def __getitem__(self, grid):
        def compiled(*arguments, **options):
            print(json.dumps(len(kernel.warmup(*arguments, grid=grid, **options).asm["ptx"])))
        return compiled

kernel, relabel._relabel = relabel._relabel, Compile()
compile_for(int(sys.argv[1]))
for dtype in (torch.int32, torch.int64):
    for count in (1, 16, 5000):
        relabel.run(torch.zeros(count, dtype=dtype), torch.zeros(1, dtype=torch.int32))
"""

Case = tuple[list[int], list[int], str]


def cases() -> list[Case]:
    draw = random.Random(0)
    found = []
    for count, labels, dtype in ((0, 3, "int32"), (1, 1, "int64"), (40, 7, "int32"), (2500, 128, "int64")):
        of = [draw.randrange(1000) for _ in range(labels)]
        beyond = [-1, labels, -(1 << 31), (1 << 31) - 1]  # what nobody wrote may be any number
        found.append(([draw.choice([*range(labels), *beyond]) for _ in range(count)], of, dtype))
    return found


def expected(case: Case) -> list[int]:
    numbers, labels, _ = case
    return [labels[number] if 0 <= number < len(labels) else number for number in numbers]


@pytest.mark.parametrize("case", cases())
def test_what_has_a_label_is_told_by_it(case: Case) -> None:
    numbers, labels, dtype = case
    given = torch.tensor(numbers, dtype=getattr(torch, dtype))
    told = relabel(given, torch.tensor(labels, dtype=torch.int32))
    assert told.dtype == given.dtype
    assert told.tolist() == expected(case)
    assert given.tolist() == numbers


def test_the_shape_stays() -> None:
    assert (
        relabel(torch.zeros(2, 3, dtype=torch.int32).T, torch.tensor([5], dtype=torch.int32)).tolist() == [[5] * 2] * 3
    )


def test_triton_tells_the_same() -> None:
    for case, (told, dtype) in zip(cases(), python(INTERPRET, given=cases(), TRITON_INTERPRET="1"), strict=True):
        assert told == expected(case)
        assert dtype == case[2]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_one_form_for_each_dtype(capability: int) -> None:
    assert len(python(COMPILE, str(capability))) == 2 * 3

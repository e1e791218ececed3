"""Few tokens, the experts that each of them chose, and the product in fp64: for tests with and without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmm_dwdp.kernels import Format
from vmm_dwdp.kernels.testing import dense, random_operands

FORMS = (Format.PLAIN, Format.FP8_BLOCK, Format.MXFP4)
ROUTINGS = {  # of experts 0 to 3, in rows 1 to 4 of the weights; -1 and 9 are none
    "one token": [[2, 0, 3]],
    "all alike": [[1, 2]] * 5,
    "some alike": [[0, 1], [1, 3], [3, 0], [2, 0]],
    "padding": [[-1, 2], [9, 2], [-1, -1]],
}
SHAPES = ((24, 64), (130, 160), (5, 2880))  # N and K: rows of whole chunks, of which few are a power of two


class Chosen(NamedTuple):
    """The arguments of ``chosen_gemm``."""

    x: Tensor
    weight: Tensor
    rows: Tensor
    scale: Tensor | None


def operands(
    form: Format, routing: str, n: int, k: int, *, own: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Chosen, Tensor]:
    """Arguments, with an ``x`` of each expert's ``own`` or one for each token, and what they give in fp64."""
    rows = torch.tensor(ROUTINGS[routing], dtype=torch.int32) + (torch.tensor(ROUTINGS[routing]) >= 0).int()
    stored = random_operands(form, num_rows=1, experts=[5], n=n, k=k, dtype=dtype)
    (weight,), scales = stored.weights, stored.scales
    scale = None if scales is None else scales.weight[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((*rows.shape, k) if own else (len(rows), k), generator=generator).to(dtype)
    expected = torch.zeros(*rows.shape, n, dtype=torch.float64)
    for (token, place), row in zip(torch.cartesian_prod(*map(torch.arange, rows.shape)), rows.flatten(), strict=True):
        if 0 <= row < 5:
            expected[token, place] = (x[token, place] if own else x[token]).double() @ dense(stored, 0, int(row)).T
    arguments = Chosen(x, weight, rows, scale)
    return Chosen(*(None if t is None else t.to(device) for t in arguments)), expected.to(device)  # type: ignore[arg-type]


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Frobenius norms."""
    return float((out.double() - expected).norm() / expected.norm())

"""The tile schedule of the CuTe kernels, run on the host: every tile of every expert, each exactly once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from vmm_dwdp.kernels.testing import ROUTINGS, route

cutlass = pytest.importorskip("cutlass")

TILE_M = 128

Tile = tuple[int, int, int, int]  # expert, first row, end of the expert's rows, place along N
Walk = Callable[[torch.Tensor, int, int, int], list[Tile]]


@pytest.fixture(scope="module")
def walk() -> Walk:
    """``walk(offsets, num_rows, tiles_n, num_ctas)``: the tiles of all CTAs, one CTA after another."""
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack
    from support.tile_schedule import locate_all

    compiled: list[Any] = []

    def run(offsets: torch.Tensor, num_rows: int, tiles_n: int, num_ctas: int) -> list[Tile]:
        clamped = offsets.clamp(0, num_rows)
        rows = clamped.diff(prepend=torch.zeros(1, dtype=torch.int32)).clamp(min=0)
        tiles = (rows + TILE_M - 1) // TILE_M * tiles_n
        ends = torch.cat([torch.zeros(1), tiles.cumsum(0)]).int()
        found = torch.full((int(ends[-1]) + 1, 4), -1, dtype=torch.int32)
        tensors = [
            from_dlpack(tensor).mark_layout_dynamic(leading_dim=tensor.dim() - 1) for tensor in (ends, offsets, found)
        ]
        numbers = [cutlass.Int32(number) for number in (num_rows, tiles_n, num_ctas)]
        if not compiled:
            compiled.append(cute.compile(locate_all, *tensors, *numbers))
        compiled[0](*tensors, *numbers)
        assert (found[-1] == -1).all()
        return [tuple(tile) for tile in found[:-1].tolist()]

    return run


def expected(offsets: torch.Tensor, num_rows: int, tiles_n: int) -> list[Tile]:
    ends = [min(max(end, 0), num_rows) for end in offsets.tolist()]
    return [
        (expert, row, end, n)
        for expert, (start, end) in enumerate(pairwise([0, *ends]))
        for row in range(start, end, TILE_M)
        for n in range(tiles_n)
    ]


@pytest.mark.parametrize("tiles_n", [1, 3, 28])
@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 1), (129, 7), (4096, 2), (20_000, 37), (3000, 512)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_tile_once(walk: Walk, routing: str, num_rows: int, num_experts: int, tiles_n: int) -> None:
    offsets = route(num_rows, num_experts, routing, torch.Generator().manual_seed(0))
    for num_ctas in (1, 132):
        assert sorted(walk(offsets, num_rows, tiles_n, num_ctas)) == expected(offsets, num_rows, tiles_n)


def test_no_rows(walk: Walk) -> None:
    assert walk(torch.zeros(5, dtype=torch.int32), 100, 2, 132) == []


@pytest.mark.parametrize("ends", [[50, 5000], [-7, 300], [200, 2**31 - 1]])
def test_offsets_beyond_the_rows_are_clamped(walk: Walk, ends: list[int]) -> None:
    offsets = torch.tensor(ends, dtype=torch.int32)
    assert sorted(walk(offsets, 400, 2, 4)) == expected(offsets, 400, 2)


def test_a_band_is_walked_along_the_rows_first(walk: Walk) -> None:
    rows = [row for _, row, _, _ in walk(torch.tensor([40 * TILE_M], dtype=torch.int32), 40 * TILE_M, 3, 1)]
    band = [TILE_M * m for m in range(16)]
    assert rows[: 4 * 16] == [*band * 3, *(16 * TILE_M + row for row in band)]

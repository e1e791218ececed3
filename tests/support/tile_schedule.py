"""A host function in the CuTe DSL that walks the tile schedule as the CTAs of a kernel do; it has to live in a file."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from vmm_dwdp.kernels.cute import tiles


@cute.jit
def locate_all(
    ends: cute.Tensor, offsets: cute.Tensor, found: cute.Tensor, num_rows: Int32, tiles_n: Int32, num_ctas: Int32
) -> None:
    """Write where each tile is to its row of ``found``, int32 ``[tiles + 1, 4]``."""
    for cta in cutlass.range(num_ctas):
        expert = Int32(0)
        for tile in cutlass.range(cta, ends[offsets.shape[0]], num_ctas):
            expert, row, end, n = tiles.locate(ends, offsets, tile, expert, num_rows, tiles_n, 128)
            found[tile, 0] = expert
            found[tile, 1] = row
            found[tile, 2] = end
            found[tile, 3] = n

"""Which tile of the output a CTA works on next, computed on the device from the offsets.

[Note: Tile schedule]
    Expert ``e`` has ``ceil(rows_e / tile_m) * tiles_n`` tiles, numbered through all experts. When a kernel starts,
    every CTA sums them up in shared memory: ``ends[e]`` is the number of tiles of the experts before ``e``, so the
    host never reads the offsets. CTA ``i`` of ``c`` then takes tiles ``i, i + c, i + 2c, ...``: each of its warp groups
    finds the expert by walking ``ends`` on from where it was. Within an expert, up to ``BAND`` tiles along M times all
    tiles along N form a band, walked along M first, so that CTAs that run together share operands in L2.
    Offsets are clamped to ``[0, T]``: whatever they hold, nothing outside the tensors is touched.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

BAND = 16


@cute.jit
def rows_of(offsets: cute.Tensor, expert: Int32, num_rows: Int32) -> tuple[Int32, Int32]:
    """First row of an expert, and the row after its last."""
    start = Int32(0)
    if expert > 0:
        start = cutlass.min(cutlass.max(offsets[expert - 1], 0), num_rows)
    end = cutlass.max(cutlass.min(offsets[expert], num_rows), start)
    return start, end


@cute.jit
def sum_tiles(
    ends: cute.Tensor,
    offsets: cute.Tensor,
    num_rows: Int32,
    tile_m: cutlass.Constexpr[int],
    tiles_n: Int32,
    num_threads: cutlass.Constexpr[int],
) -> None:
    """Fill ``ends`` (int32 ``[E + 1]``, shared memory). Every thread of the CTA calls it; they may read on return."""
    thread, _, _ = cute.arch.thread_idx()
    num_experts = offsets.shape[0]
    for expert in cutlass.range(thread, num_experts, num_threads):
        start, end = rows_of(offsets, expert, num_rows)
        ends[expert + 1] = (end - start + tile_m - 1) // tile_m * tiles_n
    cute.arch.sync_threads()
    if thread < 32:
        before = Int32(0)
        if thread == 0:
            ends[0] = 0
        for base in cutlass.range(0, num_experts, 32):
            expert = base + thread
            total = Int32(0)
            if expert < num_experts:
                total = ends[expert + 1]
            for step in cutlass.range_constexpr(5):
                other = cute.arch.shuffle_sync_up(total, 1 << step)
                if thread >= 1 << step:
                    total += other
            total += before
            if expert < num_experts:
                ends[expert + 1] = total
            before = cute.arch.shuffle_sync(total, 31)
    cute.arch.sync_threads()


@cute.jit
def locate(
    ends: cute.Tensor,
    offsets: cute.Tensor,
    tile: Int32,
    expert: Int32,
    num_rows: Int32,
    tiles_n: Int32,
    tile_m: cutlass.Constexpr[int],
) -> tuple[Int32, Int32, Int32, Int32]:
    """Looking from ``expert`` on, where a tile is: its expert, first row, end of the expert's rows, place along N."""
    while tile >= ends[expert + 1]:
        expert += 1
    start, end = rows_of(offsets, expert, num_rows)
    within = tile - ends[expert]
    first = within // (BAND * tiles_n) * BAND
    width = cutlass.min(cute.ceil_div(end - start, tile_m) - first, BAND)
    within -= first * tiles_n
    return expert, start + (first + within % width) * tile_m, end, within // width

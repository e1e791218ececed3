"""What our grouped GEMMs for Hopper and Blackwell have in common: operands, launch, and the warp that loads.

[Note: Warp roles]
    Warp group 0 loads: its first warp walks the CTA's tiles and keeps a ring of shared-memory stages full with TMA.
    Warp groups 1 and 2 walk the same tiles and write the results. Nothing but barriers in shared memory connects them,
    so the loads of the next tile run while this one is being written. A tile's last rows may belong to the next expert:
    they are loaded and multiplied, and not written.

[Note: Block scales]
    The tensor core adds up 128 numbers along K; after each such block the partial sums are multiplied by the two scales
    and added to fp32 registers with ordinary instructions (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). A tile is as
    wide as two blocks of weights.
"""

from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as hopper
from cuda.bindings.driver import CUstream
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from vmm_dwdp.kernels.cute import tiles

TILE_M, TILE_N = 128, 256
ROW_BYTES = 128  # of a tile's row in a stage: the widest swizzle
STAGE_BYTES = (TILE_M + TILE_N) * ROW_BYTES
STAGES = 4
GROUP_THREADS = 128
NUM_THREADS = 3 * GROUP_THREADS
BLOCK = 128  # rows and columns of weights, and columns of activations, that share a scale


class GroupedGemm:
    """One kernel to be compiled for each element type and number of list entries.

    Args:
        dtype: of activations and weights: BFloat16, Float16 or Float8E4M3FN (with block scales).
        num_entries: tensors in the list of weights.

    Subclasses have the kernel itself, ``kernel``, a function decorated with ``cute.kernel``.
    """

    kernel: Any

    def __init__(self, dtype: type[cutlass.Numeric], num_entries: int) -> None:
        self.dtype = dtype
        self.num_entries = num_entries
        self.scaled = dtype.width == 8
        self.out_dtype = cutlass.BFloat16 if self.scaled else dtype
        self.tile_k = ROW_BYTES * 8 // dtype.width

    def make_tiled_mma(self) -> cute.TiledMma:
        """The matrix instruction and how warp groups share a tile."""
        raise NotImplementedError

    def make_storage(self, x_layout: cute.ComposedLayout, w_layout: cute.ComposedLayout) -> Any:
        """The kernel's shared memory: at least ``barriers``, ``ends``, ``x`` and ``w``."""
        raise NotImplementedError

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        weights: list[cute.Tensor],
        offsets: cute.Tensor,
        out: cute.Tensor,
        x_scale: Any,
        weight_scales: Any,
        num_ctas: Int32,
        stream: CUstream,
    ) -> None:
        """Launch on ``stream``: ``x [T, K]``, ``weights[i] [E_i, N, K]``, ``offsets [E]``, ``out [T, N]``.

        With scales: ``x_scale [T, ceil(K / 128)]`` and ``weight_scales[i] [E_i, ceil(N / 128), ceil(K / 128)]``.
        """
        rows = LayoutEnum.ROW_MAJOR
        x_layout = hopper.make_smem_layout_a(rows, (TILE_M, TILE_N, self.tile_k), self.dtype, STAGES)
        w_layout = hopper.make_smem_layout_a(rows, (TILE_N, TILE_M, self.tile_k), self.dtype, STAGES)
        load = cpasync.CopyBulkTensorTileG2SOp()
        x_atom, x_tma = cpasync.make_tiled_tma_atom(
            load, x, cute.slice_(x_layout, (None, None, 0)), (TILE_M, self.tile_k)
        )
        w_atoms, w_tmas = [], []
        for weight in weights:
            nke = cute.make_tensor(weight.iterator, cute.select(weight.layout, mode=[1, 2, 0]))
            atom, tma = cpasync.make_tiled_tma_atom(
                load, nke, cute.slice_(w_layout, (None, None, 0)), (TILE_N, self.tile_k)
            )
            w_atoms.append(atom)
            w_tmas.append(tma)
        self.storage = self.make_storage(x_layout, w_layout)
        self.kernel(
            x_atom,
            x_tma,
            w_atoms,
            w_tmas,
            offsets,
            out,
            x_scale,
            weight_scales,
            self.make_tiled_mma(),
            x_layout,
            w_layout,
        ).launch(grid=(num_ctas, 1, 1), block=(NUM_THREADS, 1, 1), min_blocks_per_mp=1, stream=stream)

    @cute.jit
    def load_tiles(
        self,
        ring: pipeline.PipelineTmaAsync,
        ends: cute.Tensor,
        offsets: cute.Tensor,
        x_atom: cute.CopyAtom,
        x: cute.Tensor,
        w_atoms: Sequence[cute.CopyAtom],
        ws: Sequence[cute.Tensor],
        s_x: cute.Tensor,
        s_w: cute.Tensor,
        tiles_n: Int32,
    ) -> None:
        """The loading warp: every stage of every tile of this CTA, in order."""
        cpasync.prefetch_descriptor(x_atom)
        for i in cutlass.range_constexpr(self.num_entries):
            cpasync.prefetch_descriptor(w_atoms[i])
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STAGES)
        k_tiles = cute.ceil_div(x.shape[1], self.tile_k)
        tile, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        num_tiles = ends[offsets.shape[0]]
        expert = Int32(0)
        while tile < num_tiles:
            expert, row, _, n = tiles.locate(ends, offsets, tile, expert, x.shape[0], tiles_n, TILE_M)
            g_x = cute.local_tile(cute.domain_offset((row, 0), x), (TILE_M, self.tile_k), (0, None))
            t_sx, t_gx = cpasync.tma_partition(
                x_atom, 0, cute.make_layout(1), cute.group_modes(s_x, 0, 2), cute.group_modes(g_x, 0, 2)
            )
            first = Int32(0)
            for i in cutlass.range_constexpr(self.num_entries):
                last = first + ws[i].shape[2]
                if first <= expert and expert < last:
                    g_w = cute.local_tile(ws[i], (TILE_N, self.tile_k), (n, None, expert - first))
                    t_sw, t_gw = cpasync.tma_partition(
                        w_atoms[i], 0, cute.make_layout(1), cute.group_modes(s_w, 0, 2), cute.group_modes(g_w, 0, 2)
                    )
                    for k in cutlass.range(k_tiles, unroll=1):
                        ring.producer_acquire(state)
                        barrier = ring.producer_get_barrier(state)
                        cute.copy(x_atom, t_gx[(None, k)], t_sx[(None, state.index)], tma_bar_ptr=barrier)
                        cute.copy(w_atoms[i], t_gw[(None, k)], t_sw[(None, state.index)], tma_bar_ptr=barrier)
                        state.advance()
                first = last
            tile += num_ctas
        ring.producer_tail(state)

    @cute.jit
    def scale_addresses(
        self, ws: Sequence[cute.Tensor], weight_scales: Sequence[cute.Tensor], expert: Int32, n: Int32
    ) -> list[Int64]:
        """Where the scales of the two weight blocks of a tile start, one for each block along K."""
        addresses = [Int64(0) for _ in range(TILE_N // BLOCK)]
        first = Int32(0)
        for i in cutlass.range_constexpr(self.num_entries):
            last = first + ws[i].shape[2]
            if first <= expert and expert < last:
                for h in cutlass.range_constexpr(len(addresses)):
                    block = cutlass.min(n * len(addresses) + h, weight_scales[i].shape[1] - 1)
                    addresses[h] = weight_scales[i][expert - first, block, None].iterator.toint()
            first = last
        return addresses

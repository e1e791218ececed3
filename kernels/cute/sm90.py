"""The grouped GEMM on Hopper: WGMMA, 64 rows of a tile for each of the two multiplying warp groups.

They take over the registers of the warp group that loads. A result goes through shared memory, so that threads write it
in pieces of 16 bytes along its rows. With block scales each half of a tile has its turn in one set of registers.
"""

from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from vmm_dwdp.kernels.cute import MAX_EXPERTS, tiles
from vmm_dwdp.kernels.cute.grouped_gemm import (
    BLOCK,
    GROUP_THREADS,
    NUM_THREADS,
    STAGE_BYTES,
    STAGES,
    TILE_M,
    TILE_N,
    GroupedGemm,
)

STORE_N = 64  # columns that go through shared memory together
SCALES = 4  # of a thread, for one block along K: of two rows, and of the two halves of the columns
TURN = 3  # the first of two named barriers; store_tile has those before it


class GroupedGemmSm90(GroupedGemm):
    """See :class:`GroupedGemm`."""

    def make_tiled_mma(self) -> cute.TiledMma:
        k_major = OperandMajorMode.K
        shape = (64, BLOCK if self.scaled else TILE_N)
        return hopper.make_trivial_tiled_mma(self.dtype, self.dtype, k_major, k_major, Float32, (2, 1, 1), shape)

    def make_storage(self, x_layout: cute.ComposedLayout, w_layout: cute.ComposedLayout) -> Any:
        out_layout = self.make_out_layout()

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 2 * STAGES]
            ends: cute.struct.MemRange[Int32, MAX_EXPERTS + 1]
            x: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(x_layout)], 1024]
            w: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(w_layout)], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.out_dtype, cute.cosize(out_layout)], 1024]

        return Storage

    def make_out_layout(self) -> cute.ComposedLayout:
        return hopper.make_smem_layout_epi(self.out_dtype, LayoutEnum.ROW_MAJOR, (TILE_M, STORE_N), 2)

    @cute.kernel
    def kernel(
        self,
        x_atom: cute.CopyAtom,
        x: cute.Tensor,
        w_atoms: list[cute.CopyAtom],
        ws: list[cute.Tensor],
        offsets: cute.Tensor,
        out: cute.Tensor,
        x_scale: Any,
        weight_scales: Any,
        tiled_mma: cute.TiledMma,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // GROUP_THREADS)
        storage = SmemAllocator().allocate(self.storage)
        ends = storage.ends.get_tensor(cute.make_layout(MAX_EXPERTS + 1))
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=STAGES,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 2 * 4),
            tx_count=STAGE_BYTES,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        tiles_n = cute.ceil_div(out.shape[1], TILE_N)
        tiles.sum_tiles(ends, offsets, x.shape[0], TILE_M, tiles_n, NUM_THREADS)
        s_x = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        s_w = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        out_layout = self.make_out_layout()
        s_out = storage.out.get_tensor(out_layout.outer, swizzle=out_layout.inner)

        if group == 0:
            cute.arch.setmaxregister_decrease(40)
            if warp == 0:
                self.load_tiles(ring, ends, offsets, x_atom, x, w_atoms, ws, s_x, s_w, tiles_n)
        else:
            cute.arch.setmaxregister_increase(232)
            self.multiply_tiles(
                ring, ends, offsets, out, x_scale, ws, weight_scales, tiled_mma, s_x, s_w, s_out, tiles_n, x.shape[1]
            )

    @cute.jit
    def multiply_tiles(
        self,
        ring: pipeline.PipelineTmaAsync,
        ends: cute.Tensor,
        offsets: cute.Tensor,
        out: cute.Tensor,
        x_scale: Any,
        ws: Sequence[cute.Tensor],
        weight_scales: Any,
        tiled_mma: cute.TiledMma,
        s_x: cute.Tensor,
        s_w: cute.Tensor,
        s_out: cute.Tensor,
        tiles_n: Int32,
        k_size: Int32,
    ) -> None:
        """A multiplying warp group: its 64 rows of every tile of this CTA, in order."""
        thread, _, _ = cute.arch.thread_idx()
        thread -= GROUP_THREADS
        mma = tiled_mma.get_slice(thread // GROUP_THREADS * GROUP_THREADS)
        r_x = tiled_mma.make_fragment_A(mma.partition_A(s_x))
        r_w = tiled_mma.make_fragment_B(mma.partition_B(s_w))
        shape = tiled_mma.partition_shape_C((TILE_M, TILE_N))
        acc = cute.make_rmem_tensor(shape, Float32)

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        release = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        k_tiles = cute.ceil_div(k_size, self.tile_k)
        tile, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        num_tiles = ends[offsets.shape[0]]
        # What the next tile needs is read before this one is written, so that nothing waits for it.
        expert = row = end = n = Int32(0)
        scale_addresses = cute.make_rmem_tensor(SCALES, Int64)
        scales = cute.make_rmem_tensor(SCALES, Float32)
        if tile < num_tiles:
            expert, row, end, n = tiles.locate(ends, offsets, tile, expert, out.shape[0], tiles_n, TILE_M)
            if cutlass.const_expr(self.scaled):
                self.find_scales(scale_addresses, x_scale, ws, weight_scales, expert, row, n)
                self.read_scales(scales, scale_addresses, 0)
        if cutlass.const_expr(self.scaled):
            self.pass_turn_to_first(thread)
        while tile < num_tiles:
            acc.fill(0.0)
            if cutlass.const_expr(self.scaled):
                state = self.multiply_scaled(ring, state, tiled_mma, r_x, r_w, acc, k_tiles, scale_addresses, scales)
            else:
                state, release = self.multiply_plain(ring, state, release, tiled_mma, r_x, r_w, acc, k_tiles)
            this_row, this_end, column = row, end, n * TILE_N
            tile += num_ctas
            if tile < num_tiles:
                expert, row, end, n = tiles.locate(ends, offsets, tile, expert, out.shape[0], tiles_n, TILE_M)
                if cutlass.const_expr(self.scaled):
                    self.find_scales(scale_addresses, x_scale, ws, weight_scales, expert, row, n)
                    self.read_scales(scales, scale_addresses, 0)
            self.store_tile(tiled_mma, acc, s_out, out, this_row, this_end, column)

    @cute.jit
    def multiply_plain(
        self,
        ring: pipeline.PipelineTmaAsync,
        state: pipeline.PipelineState,
        release: pipeline.PipelineState,
        tiled_mma: cute.TiledMma,
        r_x: cute.Tensor,
        r_w: cute.Tensor,
        acc: cute.Tensor,
        k_tiles: Int32,
    ) -> tuple[pipeline.PipelineState, pipeline.PipelineState]:
        """All stages of a tile without scales; returns the ring's states after them.

        ``state`` is where to wait next, ``release`` what to give back next: a stage is, once its products are complete,
        while those of the one after it run.
        """
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        ring.consumer_wait(state)
        self.multiply_stage(tiled_mma, r_x, r_w, acc, state.index)
        state.advance()
        for _ in cutlass.range(1, k_tiles, unroll=1):
            ring.consumer_wait(state)
            self.multiply_stage(tiled_mma, r_x, r_w, acc, state.index)
            warpgroup.wait_group(1)
            ring.consumer_release(release)
            release.advance()
            state.advance()
        warpgroup.wait_group(0)
        ring.consumer_release(release)
        release.advance()
        return state, release

    @cute.jit
    def find_scales(
        self,
        addresses: cute.Tensor,
        x_scale: cute.Tensor,
        ws: Sequence[cute.Tensor],
        weight_scales: Sequence[cute.Tensor],
        expert: Int32,
        row: Int32,
        n: Int32,
    ) -> None:
        """Where a thread's scales of a tile start: those of its two rows, eight apart, then those of the two halves."""
        thread, _, _ = cute.arch.thread_idx()
        thread -= GROUP_THREADS
        for r in cutlass.range_constexpr(2):
            scale_row = row + thread // 32 * 16 + thread % 32 // 4 + 8 * r
            addresses[r] = x_scale[cutlass.min(scale_row, x_scale.shape[0] - 1), None].iterator.toint()
        left, right = self.scale_addresses(ws, weight_scales, expert, n)
        addresses[2], addresses[3] = left, right

    @cute.jit
    def read_scales(self, scales: cute.Tensor, addresses: cute.Tensor, k: Int32) -> None:
        """Start reading the scales of the ``k``-th block."""
        for i in cutlass.range_constexpr(SCALES):
            pointer = cute.make_ptr(Float32, addresses[i] + k * 4, cute.AddressSpace.gmem, assumed_align=4)
            scales[i] = cute.make_tensor(pointer, cute.make_layout(1))[0]

    @cute.jit
    def pass_turn_to_first(self, thread: Int32) -> None:
        """The two groups take turns to issue products: while those of one run, the other adds up its last ones."""
        if thread >= GROUP_THREADS:
            cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=2 * GROUP_THREADS)

    @cute.jit
    def multiply_scaled(
        self,
        ring: pipeline.PipelineTmaAsync,
        state: pipeline.PipelineState,
        tiled_mma: cute.TiledMma,
        r_x: cute.Tensor,
        r_w: cute.Tensor,
        acc: cute.Tensor,
        k_tiles: Int32,
        scale_addresses: cute.Tensor,
        scales: cute.Tensor,
    ) -> pipeline.PipelineState:
        """All stages of a tile with block scales (see [Note: Block scales]); returns the ring's state after them.

        ``scales`` holds those of the first block. Those of the next block are read while one is multiplied.
        """
        thread, _, _ = cute.arch.thread_idx()
        group = thread // GROUP_THREADS - 1
        part = cute.make_rmem_tensor(tiled_mma.partition_shape_C((TILE_M, BLOCK)), Float32)
        factors = cute.make_rmem_tensor((2, 2), Float32)
        for k in cutlass.range(k_tiles, unroll=1):
            for r in cutlass.range_constexpr(2):
                for h in cutlass.range_constexpr(2):
                    factors[r, h] = scales[r] * scales[2 + h]
            ring.consumer_wait(state)
            for h in cutlass.range_constexpr(2):
                cute.arch.barrier(barrier_id=TURN + group, number_of_threads=2 * GROUP_THREADS)
                tiled_mma.set(warpgroup.Field.ACCUMULATE, False)
                warpgroup.fence()
                for b in cutlass.range_constexpr(cute.size(r_x, mode=[2])):
                    w_half = cute.append_ones(r_w[(None, h, b, state.index)], up_to_rank=2)
                    cute.gemm(tiled_mma, part, r_x[(None, None, b, state.index)], w_half, part)
                    tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                cute.arch.barrier_arrive(barrier_id=TURN + 1 - group, number_of_threads=2 * GROUP_THREADS)
                if cutlass.const_expr(h == 0):
                    self.read_scales(scales, scale_addresses, cutlass.min(k + 1, k_tiles - 1))
                warpgroup.wait_group(0)
                if cutlass.const_expr(h == 1):
                    ring.consumer_release(state)
                # A thread's sums lie in its two rows in turn, two at a time.
                for v in cutlass.range_constexpr(cute.size(part)):
                    total = h * cute.size(part) + v
                    acc[total] = acc[total] + part[v] * factors[v // 2 % 2, h]
            state.advance()
        return state

    @cute.jit
    def multiply_stage(
        self, tiled_mma: cute.TiledMma, r_x: cute.Tensor, r_w: cute.Tensor, acc: cute.Tensor, stage: Int32
    ) -> None:
        """Issue the products of one stage, without waiting for them."""
        for k in cutlass.range_constexpr(cute.size(r_x, mode=[2])):
            cute.gemm(tiled_mma, acc, r_x[(None, None, k, stage)], r_w[(None, None, k, stage)], acc)
        warpgroup.commit_group()

    @cute.jit
    def store_tile(
        self,
        tiled_mma: cute.TiledMma,
        acc: cute.Tensor,
        s_out: cute.Tensor,
        out: cute.Tensor,
        row: Int32,
        end: Int32,
        column: Int32,
    ) -> None:
        """Write the rows of a tile that lie before ``end``, and the columns that exist."""
        thread, _, _ = cute.arch.thread_idx()
        thread -= GROUP_THREADS
        group, lane = thread // GROUP_THREADS, thread % GROUP_THREADS
        stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.out_dtype)
        to_shared = cute.make_tiled_copy_S(stmatrix, cute.make_tiled_copy_C_atom(stmatrix, tiled_mma))
        t_so = to_shared.get_slice(thread).partition_D(s_out)
        t_acc = to_shared.retile(acc)
        piece_shape = cute.shape(to_shared.get_slice(thread).partition_S(s_out))[:3]
        piece = cute.make_rmem_tensor(piece_shape, self.out_dtype)
        per_piece = cute.size(piece)
        chunk = cute.make_rmem_tensor(cute.make_layout(8), self.out_dtype)
        num_columns = out.shape[1]
        for i in cutlass.range_constexpr(TILE_N // STORE_N):
            for v in cutlass.range_constexpr(per_piece):
                piece[v] = t_acc[i * per_piece + v].to(self.out_dtype)
            cute.copy(to_shared, piece, t_so[(None, None, None, i % 2)])
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=GROUP_THREADS)
            to_column = column + i * STORE_N + lane % 8 * 8
            for r in cutlass.range_constexpr(4):
                local_row = group * 64 + r * 16 + lane // 8
                to_row = row + local_row
                if to_row < end and to_column < num_columns:
                    source = cute.local_tile(s_out[(None, None, i % 2)], (1, 8), (local_row, lane % 8))
                    cute.autovec_copy(cute.coalesce(source), chunk)
                    address = out.iterator.toint() + (Int64(to_row) * num_columns + to_column) * 2
                    target = cute.make_ptr(self.out_dtype, address, cute.AddressSpace.gmem, assumed_align=16)
                    cute.autovec_copy(chunk, cute.make_tensor(target, cute.make_layout(8)))

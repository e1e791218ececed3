"""The grouped GEMM on Blackwell: tcgen05, sums in tensor memory. It compiles; it has never been run.

The second warp of the loading group issues the products of a whole tile, or with block scales of one block along K, and
hands the sums over; the two other warp groups read half of the columns each, scale them and write the rows, while the
next sums grow in the other half of tensor memory. A thread has one row.
"""

from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.blackwell_helpers as blackwell
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator

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

SUMS = 2  # tiles of sums in tensor memory: all of its 512 columns
PIECE_N = 16  # columns that a thread reads at once


class GroupedGemmSm100(GroupedGemm):
    """See :class:`GroupedGemm`."""

    def make_tiled_mma(self) -> cute.TiledMma:
        k_major = OperandMajorMode.K
        return blackwell.make_trivial_tiled_mma(
            self.dtype, self.dtype, k_major, k_major, Float32, tcgen05.CtaGroup.ONE, (TILE_M, TILE_N)
        )

    def make_storage(self, x_layout: cute.ComposedLayout, w_layout: cute.ComposedLayout) -> Any:
        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 2 * STAGES]
            sums_barriers: cute.struct.MemRange[Int64, 2 * SUMS]
            tensor_memory: Int32
            ends: cute.struct.MemRange[Int32, MAX_EXPERTS + 1]
            x: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(x_layout)], 1024]
            w: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(w_layout)], 1024]

        return Storage

    def make_operands(self, tiled_mma: cute.TiledMma, storage: Any) -> tuple[cute.Tensor, cute.Tensor]:
        """The same bytes as the loading warp's, seen as the matrix instruction's operands."""
        shape_mnk = (TILE_M, TILE_N, self.tile_k)
        mma_x = blackwell.make_smem_layout_a(tiled_mma, shape_mnk, self.dtype, STAGES)
        mma_w = blackwell.make_smem_layout_b(tiled_mma, shape_mnk, self.dtype, STAGES)
        r_x = tiled_mma.make_fragment_A(storage.x.get_tensor(mma_x.outer, swizzle=mma_x.inner))
        r_w = tiled_mma.make_fragment_B(storage.w.get_tensor(mma_w.outer, swizzle=mma_w.inner))
        return r_x, r_w

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
        storage = SmemAllocator().allocate(self.storage)
        ends = storage.ends.get_tensor(cute.make_layout(MAX_EXPERTS + 1))
        one = cute.make_layout((1, 1, 1, 1))
        agent = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        ring = pipeline.PipelineTmaUmma.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=STAGES,
            producer_group=agent,
            consumer_group=agent,
            tx_count=STAGE_BYTES,
            cta_layout_vmnk=one,
        )
        handover = pipeline.PipelineUmmaAsync.create(
            barrier_storage=storage.sums_barriers.data_ptr(),
            num_stages=SUMS,
            producer_group=agent,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 2 * GROUP_THREADS),
            cta_layout_vmnk=one,
        )
        memory = TmemAllocator(
            storage.tensor_memory.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=NUM_THREADS),
        )
        memory.allocate(SUMS * TILE_N)
        memory.wait_for_alloc()
        address = memory.retrieve_ptr(Float32)
        shape = cute.append(tiled_mma.partition_shape_C((TILE_M, TILE_N)), SUMS)
        sums = cute.make_tensor(address, tiled_mma.make_fragment_C(shape).layout)

        tiles_n = cute.ceil_div(out.shape[1], TILE_N)
        tiles.sum_tiles(ends, offsets, x.shape[0], TILE_M, tiles_n, NUM_THREADS)
        if warp == 0:
            s_x = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
            s_w = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
            self.load_tiles(ring, ends, offsets, x_atom, x, w_atoms, ws, s_x, s_w, tiles_n)
        if warp == 1:
            r_x, r_w = self.make_operands(tiled_mma, storage)
            self.multiply_tiles(ring, handover, ends, offsets, tiled_mma, r_x, r_w, sums, x.shape[1])
        if thread >= GROUP_THREADS:
            self.store_tiles(handover, ends, offsets, out, x_scale, ws, weight_scales, sums, tiles_n, x.shape[1])
        memory.relinquish_alloc_permit()
        cute.arch.sync_threads()
        memory.free(address)

    @cute.jit
    def multiply_tiles(
        self,
        ring: pipeline.PipelineTmaUmma,
        handover: pipeline.PipelineUmmaAsync,
        ends: cute.Tensor,
        offsets: cute.Tensor,
        tiled_mma: cute.TiledMma,
        r_x: cute.Tensor,
        r_w: cute.Tensor,
        sums: cute.Tensor,
        k_size: Int32,
    ) -> None:
        """The multiplying warp: the products of every stage, and a handover where sums are complete."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        given = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, SUMS)
        k_tiles = cute.ceil_div(k_size, self.tile_k)
        tile, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        while tile < ends[offsets.shape[0]]:
            for k in cutlass.range(k_tiles, unroll=1):
                starts, completes = k == 0, k == k_tiles - 1
                if cutlass.const_expr(self.scaled):
                    starts = completes = True
                if starts:
                    handover.producer_acquire(given)
                ring.consumer_wait(state)
                part = sums[(None, None, None, given.index)]
                for b in cutlass.range_constexpr(cute.size(r_x, mode=[2])):
                    tiled_mma.set(tcgen05.Field.ACCUMULATE, True if b else not starts)
                    cute.gemm(
                        tiled_mma, part, r_x[(None, None, b, state.index)], r_w[(None, None, b, state.index)], part
                    )
                ring.consumer_release(state)
                state.advance()
                if completes:
                    handover.producer_commit(given)
                    given.advance()
            tile += num_ctas
        handover.producer_tail(given)

    @cute.jit
    def store_tiles(
        self,
        handover: pipeline.PipelineUmmaAsync,
        ends: cute.Tensor,
        offsets: cute.Tensor,
        out: cute.Tensor,
        x_scale: Any,
        ws: Sequence[cute.Tensor],
        weight_scales: Any,
        sums: cute.Tensor,
        tiles_n: Int32,
        k_size: Int32,
    ) -> None:
        """A storing warp group: half of the columns of every tile."""
        thread, _, _ = cute.arch.thread_idx()
        half, lane = thread // GROUP_THREADS - 1, thread % GROUP_THREADS
        pieces = TILE_N // 2 // PIECE_N
        acc = cute.make_rmem_tensor(cute.make_layout((PIECE_N, pieces)), Float32)
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x16), Float32)
        by_piece = cute.flat_divide(sums[((None, None), 0, 0, None)], (TILE_M, PIECE_N))
        load = tcgen05.make_tmem_copy(atom, by_piece[(None, None, 0, 0, 0)])
        t_sums = load.get_slice(lane).partition_S(by_piece)
        like = load.get_slice(lane).partition_D(cute.make_identity_tensor((TILE_M, PIECE_N)))
        piece = cute.make_rmem_tensor(like.shape, Float32)

        taken = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, SUMS)
        k_tiles = cute.ceil_div(k_size, self.tile_k)
        tile, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        expert = Int32(0)
        while tile < ends[offsets.shape[0]]:
            expert, row, end, n = tiles.locate(ends, offsets, tile, expert, out.shape[0], tiles_n, TILE_M)
            row += lane
            acc.fill(0.0)
            parts = k_tiles if cutlass.const_expr(self.scaled) else 1
            scales = Int64(0)
            if cutlass.const_expr(self.scaled):
                left, right = self.scale_addresses(ws, weight_scales, expert, n)
                scales = left
                if half == 1:
                    scales = right
            for part in cutlass.range(parts, unroll=1):
                factor = Float32(1.0)
                if cutlass.const_expr(self.scaled):
                    pointer = cute.make_ptr(Float32, scales, cute.AddressSpace.gmem, assumed_align=4)
                    w_scale = cute.make_tensor(pointer, cute.make_layout(k_tiles))[part]
                    factor = w_scale * x_scale[cutlass.min(row, x_scale.shape[0] - 1), part]
                handover.consumer_wait(taken)
                for i in cutlass.range_constexpr(pieces):
                    cute.copy(load, t_sums[(None, None, None, 0, half * pieces + i, taken.index)], piece)
                    for v in cutlass.range_constexpr(PIECE_N):
                        acc[v, i] = acc[v, i] + piece[v] * factor
                cute.arch.fence_view_async_tmem_load()
                handover.consumer_release(taken)
                taken.advance()
            self.store_row(acc, out, row, end, n * TILE_N + half * BLOCK)
            tile += num_ctas

    @cute.jit
    def store_row(self, acc: cute.Tensor, out: cute.Tensor, row: Int32, end: Int32, column: Int32) -> None:
        """Write the columns of a row that exist, if the row is before ``end``."""
        chunk = cute.make_rmem_tensor(cute.make_layout(8), self.out_dtype)
        for i in cutlass.range_constexpr(BLOCK // 8):
            to_column = column + i * 8
            if row < end and to_column < out.shape[1]:
                for v in cutlass.range_constexpr(8):
                    chunk[v] = acc[i * 8 + v].to(self.out_dtype)
                address = out.iterator.toint() + (Int64(row) * out.shape[1] + to_column) * 2
                target = cute.make_ptr(self.out_dtype, address, cute.AddressSpace.gmem, assumed_align=16)
                cute.autovec_copy(chunk, cute.make_tensor(target, cute.make_layout(8)))

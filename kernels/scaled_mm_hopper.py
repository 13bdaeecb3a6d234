"""The product of 8-bit rows for Hopper in Gluon: wgmma, TMA and warp specialization (sm_90); see scaled_mm.py.

A producer warp feeds a ring of three stages by TMA, three consumer warpgroups hold 64 x 256 accumulators each, so that
a tile is 192 x 256 and moves a fifth fewer bytes from L2 than 128 x 256. Nothing keeps the three in step but the ring,
and so one's epilogue hides behind the others' products. Programs stay on their multiprocessor and walk over tiles in
groups of `GROUP` rows of tiles. Operands that TMA cannot address (K no multiple of 16, N none of 8), outputs in fp32
and up to 64 rows are for others.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .scaled_mm import GROUP, NOTHING, After, _tile

# Triton 3.6 and 3.7 know them by their older names.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _quarters(x):
    """Four tensors of a quarter of the columns each; a renaming of registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(x, [M, 2, N // 2]), (0, 2, 1)))
    a, b = gl.split(gl.permute(gl.reshape(left, [M, 2, N // 4]), (0, 2, 1)))
    c, d = gl.split(gl.permute(gl.reshape(right, [M, 2, N // 4]), (0, 2, 1)))
    return a, b, c, d


@gluon.jit
def _load_part(desc, smem, arrived, row, column, at: gl.constexpr):
    mbarrier.expect(arrived.index(at), desc.block_type.nbytes)
    _tma_load(desc, [row, column], arrived.index(at), smem.index(at))


@gluon.jit
def _hopper_consumer(
    WG: gl.constexpr, a_ring, b_ring, full, empty, out_desc, out_smem, arrived, scale_a_ptr, scale_b_ptr, bias_ptr,
    gate_ptr, M, N, rows_of_tiles, columns_of_tiles, k_tiles,
    STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows WG x 64 of each tile; products, then scales, then out through shared memory by TMA."""
    BN: gl.constexpr = b_ring.shape[1]
    INT8: gl.constexpr = b_ring.dtype == gl.int8
    # Each product is two of 128 columns: Triton has no int8 one of 256, and ptxas no registers for an e4m3 one.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    sums: gl.constexpr = gl.int32 if INT8 else gl.float32
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), rows_of_tiles * columns_of_tiles, gl.num_programs(0)):
        tile_row, tile_column = _tile(tile, rows_of_tiles, columns_of_tiles, GROUP)
        row = tile_row * 192 + WG * 64
        if GATED:  # half of the residual comes while the products run
            tma.store_wait(0)
            _load_part(out_desc, out_smem, arrived, row, tile_column * BN, 2 * WG)
            _load_part(out_desc, out_smem, arrived, row, tile_column * BN + BN // 4, 2 * WG + 1)
        total = gl.zeros([64, BN], sums, layout=layout)
        for k in range(0, k_tiles):
            mbarrier.wait(full.index(stage), phase)
            b = b_ring.index(stage).permute((1, 0))
            total = warpgroup_mma(a_ring.index(stage * 3 + WG), b, total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))  # the product before this one is done: its stage is free
            # By arithmetic: a copy of `stage` from the last round starts equal to it, and Triton 3.6 merges the two.
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=k > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
        parts = _quarters(total)
        part: gl.constexpr = parts[0].type.layout
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, part))
        scale_a = gl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)
        for i in gl.static_range(4):
            column = tile_column * BN + i * (BN // 4)
            columns = column + gl.arange(0, BN // 4, layout=gl.SliceLayout(0, part))
            # Volatile, or ptxas brings all four quarters' scales forward and spills.
            scale_b = gl.load(scale_b_ptr + columns, mask=columns < N, other=0.0, volatile=True)
            y = parts[i].to(gl.float32) * scale_a[:, None] * scale_b[None, :]
            if BIAS:
                y = y + gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
            buffer = out_smem.index(2 * WG + i % 2)
            if GATED:
                gate = gl.load(gate_ptr + columns, mask=columns < N, other=0.0, volatile=True).to(gl.float32)
                mbarrier.wait(arrived.index(2 * WG + i % 2), i // 2)
                y = buffer.load(part).to(gl.float32) + gate[None, :] * y
            else:
                tma.store_wait(1)  # the store before last has read its buffer
            buffer.store(y.to(out_desc.dtype))
            fence_async_shared()
            _tma_store(out_desc, [row, column], buffer)
            if GATED:
                if i == 1:  # the other half, as soon as its buffers have been read
                    tma.store_wait(1)
                    _load_part(out_desc, out_smem, arrived, row, tile_column * BN + BN // 2, 2 * WG)
                    tma.store_wait(0)
                    _load_part(out_desc, out_smem, arrived, row, tile_column * BN + 3 * (BN // 4), 2 * WG + 1)
    tma.store_wait(0)


@gluon.jit
def _hopper_producer(
    a_desc, b_desc, a_ring, b_ring, full, empty, rows_of_tiles, columns_of_tiles, k_tiles,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp that keeps the ring full; it runs ahead into the next tile while the consumers store theirs."""
    BN: gl.constexpr = b_ring.shape[1]
    BK: gl.constexpr = b_ring.shape[2]
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), rows_of_tiles * columns_of_tiles, gl.num_programs(0)):
        tile_row, tile_column = _tile(tile, rows_of_tiles, columns_of_tiles, GROUP)
        for k in range(0, k_tiles):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), (192 + BN) * BK)
            _tma_load(b_desc, [tile_column * BN, k * BK], full.index(stage), b_ring.index(stage))
            for i in gl.static_range(3):
                at = [tile_row * 192 + i * 64, k * BK]
                _tma_load(a_desc, at, full.index(stage), a_ring.index(stage * 3 + i))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _scaled_mm_hopper_kernel(
    a_desc, b_desc, out_desc, scale_a_ptr, scale_b_ptr, bias_ptr, gate_ptr, M, N, rows_of_tiles, columns_of_tiles,
    k_tiles,
    STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Three consumer warpgroups of 160 registers a thread (128 of them accumulators) and a producer warp."""
    BN: gl.constexpr = b_desc.block_type.shape[0]
    BK: gl.constexpr = b_desc.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * 3, 64, BK], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [6, 64, BN // 4], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    arrived = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(6):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    # Spelled out three times: numbers that go through a tuple of the kernel's are constants no more.
    gl.warp_specialize([
        (_hopper_consumer, (0, a_ring, b_ring, full, empty, out_desc, out_smem, arrived, scale_a_ptr, scale_b_ptr,
                            bias_ptr, gate_ptr, M, N, rows_of_tiles, columns_of_tiles, k_tiles, STAGES, GROUP, BIAS,
                            GATED)),
        (_hopper_consumer, (1, a_ring, b_ring, full, empty, out_desc, out_smem, arrived, scale_a_ptr, scale_b_ptr,
                            bias_ptr, gate_ptr, M, N, rows_of_tiles, columns_of_tiles, k_tiles, STAGES, GROUP, BIAS,
                            GATED)),
        (_hopper_consumer, (2, a_ring, b_ring, full, empty, out_desc, out_smem, arrived, scale_a_ptr, scale_b_ptr,
                            bias_ptr, gate_ptr, M, N, rows_of_tiles, columns_of_tiles, k_tiles, STAGES, GROUP, BIAS,
                            GATED)),
        (_hopper_producer, (a_desc, b_desc, a_ring, b_ring, full, empty, rows_of_tiles, columns_of_tiles, k_tiles,
                            STAGES, GROUP)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def launch_hopper(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor, processors: int,
    after: After = NOTHING,
) -> None:  # fmt: skip
    """Tiles of 192 x 256 x 128, three stages of 56 KiB; 48 KiB more take the output on its way."""
    (m, k), n, bn, bk = a.shape, len(b), 256, 128
    kind = gl.int8 if a.dtype == torch.int8 else gl.float8e4nv
    out_type = gl.bfloat16 if out.dtype == torch.bfloat16 else gl.float16

    def describe(x: Tensor, block: list[int], kind: object) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, kind)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)

    rows, columns = triton.cdiv(m, 192), triton.cdiv(n, bn)
    _scaled_mm_hopper_kernel[(min(rows * columns, processors),)](
        describe(a, [64, bk], kind), describe(b, [bn, bk], kind), describe(out, [64, bn // 4], out_type),
        scale_a, scale_b, scale_b if bias is None else bias, out if after.gate is None else after.gate, m, n, rows,
        columns, triton.cdiv(k, bk), STAGES=3, GROUP=GROUP, BIAS=bias is not None, GATED=after.gate is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

"""8-bit matrix products with a scale a row and a column, and what follows a product in a network, before it is rounded:

    y = (a @ b^T) * scale_a[:, None] * scale_b + bias;  y = residual + gate * y

`a` is the activation `[M, K]`, `b` the weight `[N, K]`, both int8 or both e4m3 as quantize_rows() makes them. All that
follows the product is fp32 and in this order, each part only if asked for. (GELU does not belong here: in the epilogue
of the FFN's first product it costs an H200 5 ms, in a pass of its own 2.)

int8: the dot product is exact (int32), then one fp32 multiplication by each scale, one addition of the bias, one
rounding; every path gives the same bits. Hopper has its own kernel (Gluon): a producer
warp feeds a ring of three stages by TMA, three consumer warpgroups hold 64 x 256 accumulators each, so that a tile is
192 x 256 and moves a fifth fewer bytes from L2 than 128 x 256. Nothing keeps the three in step but the ring, and so
one's epilogue hides behind the others' products. Programs stay on their multiprocessor and walk over tiles in groups of
`GROUP` rows of tiles. All other cards, and shapes that TMA cannot address (K no multiple of 16, N none of 8), take a
plain Triton kernel.

fp8: the same Hopper kernel; elsewhere torch._scaled_mm, on the CPU too. With fast accumulation Hopper adds in some
14 bits: 2e-3 against exact sums at K = 6,144, 4e-3 at 24,576, where e4m3 itself costs 3.7e-2. Emulated at K = 24,576
(benchmarks/fp8_sums.py), adding to a true fp32 sum every 16 k-steps of 32 would turn 3.9e-3 with N(0, 1) and 4.2e-3
after GELU into 4e-4, which the 4e-2 of the format hide; with weights of a common mean besides, whose sums all have one
sign, 5.7e-3 into 1e-4, where the format costs 5.9e-3. Cards without FP8 units multiply in bf16.

On an H200 (700 W, 75,888 rows) the int8 kernel runs at 1,450-1,520 TFLOP/s, cuBLAS at 1,300-1,340 in fp8 and 700 in
bf16: the power limit binds, and of the three int8 takes least of it.

Memory: the output, and for fp8 copies of operands whose K or N is no multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantize import _jit, warn_once

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None
try:
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

    # Triton 3.6 and 3.7 know them by their older names.
    _tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
except (ImportError, AttributeError):
    gluon = None

MAX_K = 131_071
"""The longest int8 dot product that cannot overflow int32: (2^31 - 1) / 128^2."""
GROUP = 12
"""Rows of tiles that programs walk over together: 12 x 11 tiles are one wave of an H200, and their operands fit L2."""


ROWS = 2048
"""Rows of a product in place of its residual that plain torch follows up at once: it takes 16 bytes a value."""
FEW = 128
"""Rows that are no part of their own behind others: their product may be another kernel's, which rounds otherwise."""


def _gluon_jit(function):
    return function if gluon is None else gluon.jit(function)


@dataclass(frozen=True)
class After:
    """What follows a product before it is rounded.

    residual ``[M, N]`` with gate ``[N]`` (both or none): residual + gate y, both of the output's type; the result is
    written over the residual.
    """

    residual: Tensor | None = None
    gate: Tensor | None = None


NOTHING = After()


def _scaled(
    product: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, after: After, out_dtype: torch.dtype
) -> Tensor:
    """The epilogue in plain torch; over ``after.residual`` if there is one."""
    y = product * scale_a[:, None] * scale_b
    y = y if bias is None else y + bias.float()
    if after.residual is None or after.gate is None:
        return y.to(out_dtype)
    return after.residual.copy_(after.residual.float() + after.gate.float() * y)


# ---------------------------------------------------------------- int8


def scaled_mm_int8_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING,
) -> Tensor:  # fmt: skip
    """What `scaled_mm_int8` computes, in plain torch."""
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.int8, after)
    if a.is_cuda:  # fp64 holds these sums exactly; torch._int_mm has rules about shapes there
        product = (a.double() @ b.double().t()).float()
    elif a.shape[1] == 1:  # on a CPU _int_mm reads past such operands (torch 2.13)
        product = a.float() * b.float().t()
    elif "AVX512" in torch.backends.cpu.get_cpu_capability():
        product = torch._int_mm(a, b.t()).float()
    elif a.shape[1] <= 1024:  # without such instructions _int_mm takes 50 times as long as floats that are exact, too
        product = a.float() @ b.float().t()
    else:
        product = (a.double() @ b.double().t()).float()
    return _scaled(product, scale_a, scale_b, bias, after, out_dtype)


@_jit
def _tile(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of tiles: GROUP rows at a time, down each column of the group, then on to the next column."""
    first = tile // (GROUP * columns) * GROUP
    size = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % size, inside // size


@_jit
def _scaled_mm_int8_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, gate_ptr, out_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """One tile of BM x BN a program, any shape: rows and columns past the end repeat others and are not stored."""
    row, column = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = row * BM + tl.arange(0, BM)
    columns = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(a_ptrs + start)
            b = tl.load(b_ptrs + start)
        else:
            a = tl.load(a_ptrs + start, mask=(k < K - start)[None, :], other=0)
            b = tl.load(b_ptrs + start, mask=(k < K - start)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    inside = columns < N
    y = total.to(tl.float32) * tl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)[:, None]
    y = y * tl.load(scale_b_ptr + columns, mask=inside, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    keep = (rows < M)[:, None] & inside[None, :]
    if GATED:
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(out_ptrs, mask=keep, other=0.0).to(tl.float32) + gate[None, :] * y
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=keep)


@_gluon_jit
def _quarters(x):
    """Four tensors of a quarter of the columns each; a renaming of registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(x, [M, 2, N // 2]), (0, 2, 1)))
    a, b = gl.split(gl.permute(gl.reshape(left, [M, 2, N // 4]), (0, 2, 1)))
    c, d = gl.split(gl.permute(gl.reshape(right, [M, 2, N // 4]), (0, 2, 1)))
    return a, b, c, d


@_gluon_jit
def _load_part(desc, smem, arrived, row, column, at: gl.constexpr):
    mbarrier.expect(arrived.index(at), desc.block_type.nbytes)
    _tma_load(desc, [row, column], arrived.index(at), smem.index(at))


@_gluon_jit
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


@_gluon_jit
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


@_gluon_jit
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


def _check(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    dtype: torch.dtype, after: After,
) -> None:  # fmt: skip
    for name, operand in {"a": a, "b": b}.items():
        if operand.dtype != dtype or operand.ndim != 2 or not operand.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix in {dtype}, not {operand.dtype} {list(operand.shape)}, "
                f"strides {operand.stride()}"
            )
    if b.shape[1] != a.shape[1]:
        raise ValueError(f"b must be [N, {a.shape[1]}] for a {list(a.shape)}, not {list(b.shape)}")
    if a.shape[1] < 1 or dtype == torch.int8 and a.shape[1] > MAX_K:
        raise ValueError(f"a must have 1 to {MAX_K} columns, not {a.shape[1]}: longer sums can overflow int32")
    for name, scale, count in (("scale_a", scale_a, len(a)), ("scale_b", scale_b, len(b))):
        if scale.dtype != torch.float32 or scale.shape != (count,) or not scale.is_contiguous():
            raise ValueError(f"{name} must be [{count}] in float32, not {list(scale.shape)} in {scale.dtype}")
    if bias is not None and (bias.shape != (len(b),) or not bias.is_floating_point() or not bias.is_contiguous()):
        raise ValueError(f"bias must be [{len(b)}] in a floating type, not {list(bias.shape)} in {bias.dtype}")
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, not {out_dtype}")
    residual, gate = after.residual, after.gate
    if (residual is None) != (gate is None):
        raise ValueError("residual and gate belong together: give both or none")
    for name, other, shape in (("residual", residual, (len(a), len(b))), ("gate", gate, (len(b),))):
        if other is not None and (other.shape != shape or other.dtype != out_dtype or not other.is_contiguous()):
            raise ValueError(
                f"{name} must be a contiguous {list(shape)} in {out_dtype}, not {list(other.shape)} in {other.dtype}"
            )
    others = {"b": b, "scale_a": scale_a, "scale_b": scale_b, "bias": bias, "residual": residual, "gate": gate}
    for name, other in others.items():
        if other is not None and other.device != a.device:
            raise ValueError(f"{name} must be on {a.device} as a is, not on {other.device}")


def _launch(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor, after: After = NOTHING
) -> None:
    """The Triton kernel: every card and every shape. 64 KiB of shared memory, which all cards have."""
    (m, k), n = a.shape, len(b)
    bm = 128 if m > 64 else 64
    tiles = triton.cdiv(m, bm) * triton.cdiv(n, 128)
    _scaled_mm_int8_kernel[(tiles,)](
        a, b, scale_a, scale_b, scale_b if bias is None else bias, out if after.gate is None else after.gate, out,
        m, n, k, BM=bm, BN=128, BK=64, GROUP=GROUP, EVEN=k % 64 == 0, BIAS=bias is not None,
        GATED=after.gate is not None, num_warps=8, num_stages=4, enable_fp_fusion=False,
    )  # fmt: skip


def _launch_hopper(
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


def _hopper_fits(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether the card is a Hopper and TMA can address the operands: 16-byte rows and starts."""
    if gluon is None or torch.cuda.get_device_capability(a.device) != (9, 0) or out.dtype == torch.float32:
        return False
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (a, b, out))
    return aligned and len(a) > 64


def _on_hopper(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor, after: After
) -> bool:
    """Runs the Hopper kernel if it can; false if something else has to."""
    if not _hopper_fits(a, b, out):
        return False
    try:
        processors = torch.cuda.get_device_properties(a.device).multi_processor_count
        with torch.cuda.device(a.device):
            _launch_hopper(a, b, scale_a, scale_b, bias, out, processors, after)
    except triton.CompilationError as error:  # Gluon's interface is not settled
        reason = str(error).strip().splitlines()[-1]
        warn_once(f"scaled_mm: the Hopper kernel does not compile for {a.dtype}, another instead: {reason}")
        return False
    return True


def _output(a: Tensor, b: Tensor, out_dtype: torch.dtype, after: After) -> Tensor:
    if after.residual is not None:
        return after.residual
    return torch.empty((len(a), len(b)), dtype=out_dtype, device=a.device)


def scaled_mm_int8(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING,
) -> Tensor:  # fmt: skip
    """The product `[M, N]` of int8 `a` `[M, K]` and `b` `[N, K]` with fp32 scales `[M]` and `[N]`, bias `[N]` or None.

    `out_dtype` is bfloat16, float16 or float32; `after` is what follows before the rounding (with a residual, the
    result takes its place). Raises ValueError, naming the argument, for what does not fit.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.int8, after)
    if not a.is_cuda or triton is None:
        if a.is_cuda:
            warn_once("scaled_mm_int8: Triton is missing, plain torch instead")
        return scaled_mm_int8_reference(a, b, scale_a, scale_b, bias, out_dtype, after)
    out = _output(a, b, out_dtype, after)
    if out.numel() and not _on_hopper(a, b, scale_a, scale_b, bias, out, after):
        with torch.cuda.device(a.device):
            _launch(a, b, scale_a, scale_b, bias, out, after)
    return out


# ---------------------------------------------------------------- fp8


def scaled_mm_fp8_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING,
) -> Tensor:  # fmt: skip
    """What `scaled_mm_fp8` computes, in plain torch: fp32 sums."""
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.float8_e4m3fn, after)
    return _scaled(a.float() @ b.float().t(), scale_a, scale_b, bias, after, out_dtype)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    if x.shape == (rows, columns):
        return x
    out = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def scaled_mm_fp8(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING, *, use_fast_accum: bool = True,
) -> Tensor:  # fmt: skip
    """The product `[M, N]` of e4m3 `a` `[M, K]` and `b` `[N, K]` with fp32 scales `[M]` and `[N]`, bias `[N]` or None.

    `out_dtype` is bfloat16, float16 or float32; `after` is what follows before the rounding (with a residual, the
    result takes its place). Without `use_fast_accum` CUDA adds in fp32 and takes a tenth longer. Raises ValueError,
    naming the argument, for what does not fit.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.float8_e4m3fn, after)
    if not len(a) or not len(b):
        return _output(a, b, out_dtype, after)
    if a.is_cuda and use_fast_accum and triton is not None:
        out = _output(a, b, out_dtype, after)
        if _on_hopper(a, b, scale_a, scale_b, bias, out, after):
            return out
    old = a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9)
    product = _scaled_mm_dequantized(b, scale_b) if old else _scaled_mm_torch
    if after.residual is None or after.gate is None:
        return product(a, b, scale_a, scale_b, bias, out_dtype, after, use_fast_accum)
    for start, end in _row_parts(len(a)):
        part = After(after.residual[start:end], after.gate)
        product(a[start:end], b, scale_a[start:end], scale_b, bias, out_dtype, part, use_fast_accum)
    return after.residual


def _row_parts(count: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each part."""
    start = 0
    while start < count:
        end = start + ROWS if count - start - ROWS >= FEW else count
        yield start, end
        start = end


def _scaled_mm_dequantized(b: Tensor, scale_b: Tensor) -> Callable[..., Tensor]:
    """Products with one ``b`` in bf16, for cards without FP8 units."""
    warn_once("scaled_mm_fp8: this card has no FP8 units, the product runs in bf16")
    right = (b.float() * scale_b[:, None]).bfloat16().t()
    one = torch.ones((), device=b.device)

    def product(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
        after: After, use_fast_accum: bool,
    ) -> Tensor:  # fmt: skip
        left = (a.float() * scale_a[:, None]).bfloat16()
        return _scaled((left @ right).float(), one[None], one, bias, after, out_dtype)

    return product


def _scaled_mm_torch(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    after: After, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """The e4m3 product by torch, which wants K and N in multiples of 16."""
    n = len(b)
    k, wide = (-(-size // 16) * 16 for size in (a.shape[1], n))
    a, b, scale_b = _padded(a, len(a), k), _padded(b, wide, k).t(), _padded(scale_b[None], 1, wide)
    if out_dtype == torch.bfloat16 and bias is None and after.residual is None:
        out = torch._scaled_mm(a, b, scale_a[:, None], scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)
        return out if wide == n else out[:, :n].contiguous()
    # Scales of rows and columns come with bf16 outputs only: here they follow, and so the result is rounded once.
    one = torch.ones((), device=a.device)
    out = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=use_fast_accum)
    return _scaled(out[:, :n], scale_a, scale_b[0, :n], bias, after, out_dtype)

"""Self-attention for Hopper in Gluon: wgmma, TMA and warp specialization (sm_90).

Three modes, one softmax each, fp32 accumulators:

| mode | q k^T | P V | relative L2 error, N(0,1) |
|---|---|---|---|
| bf16 | bf16 | bf16 | 2.3e-3 |
| int8 + bf16 | int8, a scale for each query and for 16 keys | bf16 | 1.1e-2 |
| int8 + fp8 | the same | e4m3 P, e4m3 V with a scale a channel | 3.6e-2 |

A program owns a tile of queries of one head: two or three consumer warpgroups of 64 queries each, and one producer warp
that brings tiles of keys and values into a ring in shared memory. Heads are the slow axis of the grid, so that all
multiprocessors walk over the keys of the same head together and find them in L2. The last, partly filled tile of keys
comes first: the loop needs no mask then.

With 16-bit V the product q k^T of one tile runs while the softmax of the tile before it and its product with V do.
Three warpgroups of 160 registers take 64 keys at a time and read K and V a third less from L2 than two of 240 with 128
keys: in int8 162.2 ms in place of 167.7, with an exact maximum 186.5 in place of 197.9. With 8-bit V a warpgroup
overlaps little itself; three of them hide one another, and P never lies beside the next scores in registers.

A scale of k is that of the 16 keys of a window of 64 which one lane of a row holds (see qk_norm_rope.group_of()): a
lane multiplies by one factor a window. Of 16 neighbouring keys each it would be four, which took 6 % longer; of 32, as
fast as now, the error on clustered keys was 3 % larger.

The running maximum may be *stale*: taken in the first 8 tiles and then in every `refresh`-th. With P in bf16 this costs
no accuracy, as P only has to stay within a range whose products with V do not overflow: a row whose sum has ever grown
beyond 2^64 keeps an infinite one, and the program's tile is computed again with an exact maximum. (Whether the sum is
finite at the end would not do: P of 2^127 is, its product with a V of 4 is not, and a later maximum makes the sum small
again.)

P in e4m3 ends at 448, and in sharp attention some row of most tiles outgrows that: of queries and keys with gains of 8
in four channels 40 % of the rows did. With 2^3 at first, and those tiles computed again, a step of the whole model took
28 s on an H200, where its blocks, on normal inputs, make 19.4. So with 8-bit V no maximum is taken after the first
tile. P is still fp32 when a lane adds up what it holds of a row; where such a sum exceeds 448, the row's P, sums and
accumulators are multiplied by what makes it 128, and its maximum counts as so much larger. That costs a tile one vote
of each warp. Only where a sum is infinite by then, beyond 2^128, is the tile computed again.

The fp8 product keeps 13 fractional bits: wgmma aligns the products of 32 keys and the accumulator to the largest among
them and cuts off what lies below. A sum that has grown to thousands of its products loses a part of each, and V whose
mean comes and goes along the sequence loses 14 % of the output at 75,888 keys (N(0,1) does not show it). So every
`fold` tiles the accumulators are added to an fp32 sum in shared memory, 32 KiB a warpgroup, and begin at zero again;
the error of such an output on an H200 is then 4e-3 with a fold of 4 tiles, 9e-3 with 8, 1.4e-2 with 12, 2e-2 with 16
(fp8_sums.py in benchmarks/ measures it, or emulates it without a card). A fold of 12 tiles costs 6 % of the kernel's
time, mostly of shared memory's, one of 8 costs 8 %.

Memory beside inputs and output: one int32 a tile of queries, unless the maximum is exact.
"""

from __future__ import annotations

import math
from typing import Any

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

from .qk_norm_rope import WINDOW, key_groups
from .values import permute_keys as permute_keys

_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the older name, up to Triton 3.7

HEAD_DIM = 128

_MAGIC_BITS = gl.constexpr(0x4B400000)
_MAGIC = gl.constexpr(12582912.0)
"""1.5 x 2^23: an int32 accumulator that starts at its bits reads as the float 12582912 + dot, exactly, for |dot| < 2^22
(128 x 127^2 = 2.06 million). It saves the conversion of every score."""


def _rescale_asm(registers: int) -> tuple[str, str]:
    """Inline assembly that multiplies accumulators by alpha, unless alpha is 1 in the whole warp.

    The branch costs one vote for 64 registers; after the first tiles a new maximum is rare. A thread holds two rows:
    registers 0, 1 of every four belong to the first, 2, 3 to the second.
    """
    n = registers
    lines = [
        "{",
        ".reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra.uni DONE;",
        *(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)),
        "DONE:",
        "}",
    ]
    constraints = ["=f"] * n + [str(i) for i in range(n)] + ["f"] * n
    return "\n".join(lines), ",".join(constraints)


def _raise_asm() -> tuple[str, str]:
    """Inline assembly for a lane's two rows: their sums over its columns of a tile, and what each is the sum under.

    Where the largest of a row's four lanes exceeds 448, the row goes down by the factor that leaves 128 of it. Returned
    are that factor, 1 elsewhere, and the row's maximum in powers of two, so much larger. A warp without such a row
    leaves after a vote.

    A key that counts for much is most of that sum, and of its row's output: at 128 it is nearly a number of e4m3. (By a
    power of two instead, the error with gains of 8 in four channels was 1.2e-2 in place of 9.6e-3, emulated.) And keys
    11 nats below it still count.
    """
    rows = (("a", 0), ("b", 1))
    lines = [
        "{",
        ".reg .pred p, q;",
        ".reg .f32 a, b, t;",
        *(f"mov.b32 ${i}, 0x3F800000;" for _, i in rows),
        "setp.gt.f32 p, $4, 0f43E00000;",
        "setp.gt.or.f32 p, $5, 0f43E00000, p;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra.uni DONE;",
    ]
    for x, i in rows:
        lines.append(f"mov.b32 {x}, ${4 + i};")
        for lanes in (1, 2):
            lines += [f"shfl.sync.bfly.b32 t, {x}, {lanes}, 0x1f, 0xffffffff;", f"max.f32 {x}, {x}, t;"]
        lines += [
            f"setp.gt.f32 p, {x}, 0f43E00000;",
            f"lg2.approx.f32 t, {x};",
            "sub.f32 t, t, 0f40E00000;",  # 7, for 2^7
            f"add.f32 {x}, ${2 + i}, t;",
            f"sub.f32 t, ${2 + i}, {x};",  # by what the maximum is larger, once it is rounded
            f"@p mov.b32 ${2 + i}, {x};",
            f"@p ex2.approx.ftz.f32 ${i}, t;",
        ]
    return "\n".join([*lines, "DONE:", "}"]), "=&f,=&f,=&f,=&f,f,f,2,3"


_ASM, _CONSTRAINTS = _rescale_asm(64)
_RESCALE_ASM = gl.constexpr(_ASM)
_RESCALE_CONSTRAINTS = gl.constexpr(_CONSTRAINTS)
_ASM, _CONSTRAINTS = _raise_asm()
_RAISE_ASM = gl.constexpr(_ASM)
_RAISE_CONSTRAINTS = gl.constexpr(_CONSTRAINTS)


_FAR = gl.constexpr(18446744073709551616.0)
"""2^64: sums of a lane, or of a row at the end, beyond it are computed again. V has to stay below 2^61."""


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rescale(o, factors):
    return gl.inline_asm_elementwise(
        _RESCALE_ASM, _RESCALE_CONSTRAINTS, [o, factors], dtype=gl.float32, is_pure=True, pack=64
    )


@gluon.jit
def _over_columns(alpha, x, N: gl.constexpr):
    """Factors of rows as each lane holds them, ``[64, 4]``, for the accumulators ``x [64, N]``."""
    y = gl.reshape(x, [x.shape[0], N // 8, 4, 2])
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, y.type.layout))
    alpha = gl.convert_layout(alpha, layout, assert_trivial=True)
    spread = gl.reshape(alpha[:, None, :, None] + gl.zeros_like(y), x.shape)
    return gl.convert_layout(spread, x.type.layout, assert_trivial=True)


@gluon.jit
def _raised(sums, m):
    """What a tile's sums ask for: the factors of rows, and what they are sums under then; all ``[64, 4]``."""
    return gl.inline_asm_elementwise(
        _RAISE_ASM, _RAISE_CONSTRAINTS, [sums, m], dtype=(gl.float32, gl.float32), is_pure=True, pack=2
    )


@gluon.jit
def _lane_sums(p, BN: gl.constexpr):
    """Row sums that each lane keeps for its own columns ``[BM, 4]``; they are added up once, after the loop."""
    M: gl.constexpr = p.shape[0]
    return gl.sum(gl.sum(gl.reshape(p, [M, BN // 8, 4, 2]), 3), 1)


@gluon.jit
def _probabilities_16(p, layout: gl.constexpr, dtype: gl.constexpr):
    return gl.convert_layout(p.to(dtype), layout, assert_trivial=True)


@gluon.jit
def _probabilities_8(p, BN: gl.constexpr, layout: gl.constexpr):
    """e4m3 P as the left operand of the second product, without moving anything between threads.

    An accumulator's thread holds columns 8 h + 2 q + i of every 16, an 8-bit operand's 4 q + 2 h + i. V is stored with
    its keys in that order, so the registers only change their names.
    """
    M: gl.constexpr = p.shape[0]
    x = gl.reshape(p.to(gl.float8e4nv), [M, BN // 16, 2, 4, 2])
    x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), [M, BN])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _start_scores(q, k, INT8: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """Begins q k^T; an int8 product begins at the magic number."""
    if INT8:
        begin = gl.full([BM, BN], _MAGIC_BITS, gl.int32, layout=layout)
        return warpgroup_mma(q, k.permute((1, 0)), begin, is_async=True)
    else:
        begin = gl.zeros([BM, BN], gl.float32, layout=layout)
        return warpgroup_mma(q, k.permute((1, 0)), begin, use_acc=False, is_async=True)


@gluon.jit
def _as_float(s, INT8: gl.constexpr):
    """Scores as floats; of int8 products they are too large by the magic number."""
    if INT8:
        return s.to(gl.float32, bitcast=True)
    else:
        return s


@gluon.jit
def _grouped(x, W: gl.constexpr):
    """Scores ``[BM, BN]`` as ``[BM, W, 8, 4, 2]``: W windows of 64 keys, in each 16 for each of a row's 4 lanes."""
    return gl.reshape(x, [x.shape[0], W, 8, 4, 2])


@gluon.jit
def _factors(q_scale, key_scales, tile, W: gl.constexpr):
    """What makes a tile's integers logits in powers of two: the query's scale times that of each group of keys,
    ``[BM, W, 4]``. A lane's keys of a window are a group, so that it has W factors for a query."""
    layout: gl.constexpr = gl.SliceLayout(0, q_scale.type.layout.parent.parent)
    window = gl.arange(0, W, layout=gl.SliceLayout(1, layout))[:, None]
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))[None, :]
    if W == 1:
        at = tile // 2 * 8 + tile % 2 + lane * 2 + window
    else:
        at = tile * 8 + lane * 2 + window
    return q_scale[:, None, None] * gl.load(key_scales + at)[None, :, :]


@gluon.jit
def _row_max(x, f, MAGIC: gl.constexpr, W: gl.constexpr):
    """The largest logit of each row; ``f [BM, W, 4]`` with integer scores, ``[BM]`` without."""
    if W:
        most = gl.max(gl.max(_grouped(x, W), 4), 2)
        f = gl.convert_layout(f, most.type.layout, assert_trivial=True)
        if MAGIC:
            most = most - _MAGIC
        return gl.max(gl.max(most * f, 1), 1)
    else:
        return gl.max(x, 1) * f


@gluon.jit
def _offsets(x, f, m, MAGIC: gl.constexpr, W: gl.constexpr):
    """What is taken from score x f, so that m, of rows ``[BM]`` or of their lanes ``[BM, 4]``, becomes zero:
    ``[BM, W, 4]``, as many as f has."""
    if W:
        layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, _grouped(x, W).type.layout))
        if len(m.shape) == 2:
            off = gl.convert_layout(m, gl.SliceLayout(1, layout), assert_trivial=True)[:, None, :]
        else:
            off = gl.convert_layout(m, gl.SliceLayout(1, gl.SliceLayout(2, layout)), assert_trivial=True)[:, None, None]
        f = gl.convert_layout(f, layout, assert_trivial=True)
        return off + _MAGIC * f if MAGIC else off + gl.zeros_like(f)
    else:
        return m


@gluon.jit
def _row_exp(x, f, offset, W: gl.constexpr):
    """2^(score f - offset)."""
    if W:
        y = _grouped(x, W)
        f = gl.convert_layout(f, offset.type.layout, assert_trivial=True)
        return gl.reshape(_exp2(y * f[:, :, None, :, None] - offset[:, :, None, :, None]), x.shape)
    else:
        return _exp2(x * f[:, None] - offset[:, None])


@gluon.jit
def _flag(flag_ptr, bad):
    """Marks the program's tile for the exact pass; every thread that sees something bad does so, with no reduction."""
    tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    gl.store(flag_ptr + tile + bad.to(gl.int32) * 0, 1, mask=bad)


@gluon.jit
def _finish(
    o, total, out_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, out_stride, row0, h,
    o_layout: gl.constexpr, BM: gl.constexpr, D: gl.constexpr,
    V8: gl.constexpr, HAS_MEAN: gl.constexpr, STALE: gl.constexpr,
):  # fmt: skip
    """Divides by the row sums, undoes V's scale and mean, stores, and flags a tile whose sums are not finite."""
    o = o * (1.0 / total)[:, None]
    rows = row0 + gl.arange(0, BM, layout=gl.SliceLayout(1, o_layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    if V8:
        o = o * gl.load(v_scale_ptr + h * D + columns)[None, :]
    if HAS_MEAN:
        o = o + gl.load(v_mean_ptr + h * D + columns)[None, :]
    offsets = rows.to(gl.int64)[:, None] * out_stride + (h * D + columns)[None, :]
    gl.store(out_ptr + offsets, o.to(out_ptr.dtype.element_ty), mask=(rows < n_q)[:, None])
    if STALE:
        _flag(flag_ptr, (total < _FAR) == 0)  # NaN is not smaller


@gluon.jit
def _own_words(x, D: gl.constexpr):
    """``[64, D]`` as ``[D / 8, 128, 4]``: four neighbours for each thread that holds them, threads side by side.

    An accumulator's thread holds rows 16 w + 8 i + a and columns 8 n + 2 b + j: registers only change their names, and
    shared memory is read and written in 128 bits a thread, without bank conflicts.
    """
    x = gl.permute(gl.reshape(x, [4, 2, 8, D // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    return gl.reshape(x, [D // 8, 128, 4])


@gluon.jit
def _own_rows(x, D: gl.constexpr, layout: gl.constexpr):
    """The way back from :func:`_own_words`."""
    x = gl.permute(gl.reshape(x, [D // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, [64, D]), layout, assert_trivial=True)


@gluon.jit
def _consumer_16(
    wg: gl.constexpr, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, turn,
    out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles, out_stride, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, INT8: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, IN_TURN: gl.constexpr, REFRESH: gl.constexpr, HAS_MEAN: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """64 queries against all keys, P and V in 16 bits; W windows of keys with scales a tile, 0 without any."""
    k_bits: gl.constexpr = 32 if INT8 else 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, k_bits])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    r_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    v_type: gl.constexpr = v_smem.dtype

    h = gl.program_id(1)
    row0 = gl.program_id(0) * (NC * BM) + wg * BM
    q = q_smem.index(wg)
    if INT8:
        grouped: gl.constexpr = _grouped(gl.zeros([BM, BN], gl.int32, layout=s_layout), W).type.layout
        f_layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, grouped))
        rows = row0 + gl.arange(0, BM, layout=gl.SliceLayout(1, gl.SliceLayout(2, f_layout)))
        q_scale = gl.load(q_scale_ptr + h * n_q + rows, mask=rows < n_q, other=1.0) * scale
        key_scales = k_scale_ptr + h * ((n_tiles * W + 1) // 2 * 8)
        f = _factors(q_scale, key_scales, n_tiles - 1, W)
    else:
        f = gl.full([BM], scale, gl.float32, layout=r_layout)

    mbarrier.wait(q_full, 0)
    if Q_IN_REGISTERS:
        q = q.load(gl.DotOperandLayout(0, s_layout, 2))
    mbarrier.wait(k_full.index(0), 0)
    s = _start_scores(q, k_smem.index(0), INT8, BM, BN, s_layout)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    keys = (n_tiles - 1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    x = gl.where((keys < n_k)[None, :], _as_float(s, INT8), float("-inf"))
    m_i = gl.convert_layout(_row_max(x, f, INT8, W), r_layout)
    p = gl.convert_layout(_row_exp(x, f, _offsets(x, f, m_i, INT8, W), W), s_layout, assert_trivial=True)
    l_i = _lane_sums(p, BN)
    pb = _probabilities_16(p, p_layout, v_type)
    o = gl.zeros([BM, D], gl.float32, layout=o_layout)
    one = gl.full([BM], 1.0, gl.float32, layout=r_layout)

    if IN_TURN:
        if wg == NC - 1:
            mbarrier.arrive(turn.index(0), count=1)
    turn_phase = 0
    ki = 1
    k_phase = 0
    vi = 0
    v_phase = 0
    mbarrier.wait(k_full.index(ki), k_phase, pred=n_tiles > 1)
    for t in range(1, n_tiles):
        if INT8:
            f = _factors(q_scale, key_scales, t - 1, W)
        offset = _offsets(x, f, m_i, INT8, W)  # now, not on the way from the scores to P
        if IN_TURN:
            mbarrier.wait(turn.index(wg), turn_phase)
            turn_phase ^= 1
        s_next = _start_scores(q, k_smem.index(ki), INT8, BM, BN, s_layout)
        mbarrier.wait(v_full.index(vi), v_phase)
        o_next = warpgroup_mma(pb, v_smem.index(vi), o, is_async=True)
        if IN_TURN:
            mbarrier.arrive(turn.index((wg + 1) % NC), count=1)
        s = warpgroup_mma_wait(1, deps=(s_next,))
        mbarrier.arrive(k_empty.index(ki), count=1)
        x = _as_float(s, INT8)
        fresh = (REFRESH == 1) | (t < 8) | (t % REFRESH == 0)
        alpha = one
        if fresh:
            m_new = gl.maximum(m_i, gl.convert_layout(_row_max(x, f, INT8, W), r_layout))
            alpha = _exp2(m_i - m_new)
            l_layout: gl.constexpr = gl.SliceLayout(1, l_i.type.layout)
            rescaled = l_i * gl.convert_layout(alpha, l_layout)[:, None]
            # Infinity stays, or becomes NaN. Only here could a sum that was too large become small again.
            l_i = gl.where(l_i < _FAR, rescaled, float("inf")) if REFRESH > 1 else rescaled
            m_i = m_new
            offset = _offsets(x, f, m_i, INT8, W)
        p = gl.convert_layout(_row_exp(x, f, offset, W), s_layout, assert_trivial=True)
        l_i = l_i + _lane_sums(p, BN)
        ki += 1
        if ki == STAGES:
            ki = 0
            k_phase ^= 1
        # Waiting for the next keys here keeps ptxas from moving the wait for P V above the exponentials.
        mbarrier.wait(k_full.index(ki), k_phase, pred=t + 1 < n_tiles)
        o, p = warpgroup_mma_wait(0, deps=(o_next, p))
        mbarrier.arrive(v_empty.index(vi), count=1)
        if fresh:
            o = _rescale(o, gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + gl.zeros_like(o))
        pb = _probabilities_16(p, p_layout, v_type)
        vi += 1
        if vi == STAGES:
            vi = 0
            v_phase ^= 1
    if IN_TURN:
        if wg == 0:
            mbarrier.wait(turn.index(0), turn_phase)
    mbarrier.wait(v_full.index(vi), v_phase)
    o = warpgroup_mma(pb, v_smem.index(vi), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    sums = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, o_layout))
    _finish(o, sums, out_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, out_stride, row0, h,
            o_layout, BM, D, False, HAS_MEAN, REFRESH > 1)  # fmt: skip


@gluon.jit
def _lane_max(x, f, W: gl.constexpr, layout: gl.constexpr):
    """The largest logit of each row, for each of its lanes: ``[BM, 4]``."""
    most = gl.convert_layout(_row_max(x, f, False, W), gl.SliceLayout(1, layout), assert_trivial=True)
    return most[:, None] + gl.zeros([x.shape[0], 4], gl.float32, layout=layout)


@gluon.jit
def _tile_8(s, o, f, m_i, l_i, BN: gl.constexpr, D: gl.constexpr, EXACT: gl.constexpr, SHIFT: gl.constexpr,
            W: gl.constexpr):  # fmt: skip
    """P of a tile's scores, and what changes where they are too large for it."""
    x = s.to(gl.float32)
    if EXACT:
        layout: gl.constexpr = m_i.type.layout
        m_new = gl.maximum(m_i, _lane_max(x, f, W, layout) - SHIFT)
        alpha = _exp2(m_i - m_new)
        m_i = m_new
        p = gl.convert_layout(_row_exp(x, f, _offsets(x, f, m_i, False, W), W), s.type.layout, assert_trivial=True)
        l_i = l_i * alpha + _lane_sums(p, BN)
    else:
        p = gl.convert_layout(_row_exp(x, f, _offsets(x, f, m_i, False, W), W), s.type.layout, assert_trivial=True)
        sums = _lane_sums(p, BN)
        alpha, m_i = _raised(sums, m_i)
        p = _rescale(p, _over_columns(alpha, p, BN))
        l_i = (l_i + sums) * alpha
    return p, _rescale(o, _over_columns(alpha, o, D)), m_i, l_i


@gluon.jit
def _fold_into(total, old, o, m_fold, m_i, D: gl.constexpr):
    """Adds the accumulators to the sum that was read, and stores it; returns it, too.

    It lies in the accumulators' registers then: they hold what the next product does not read, and are not cleared.
    """
    layout: gl.constexpr = o.type.layout
    beta = _over_columns(_exp2(m_fold - m_i), o, D)
    words = old * _own_words(beta, D) + _own_words(o, D)
    total.store(words)
    return _own_rows(words, D, layout)


@gluon.jit
def _consumer_8(
    wg: gl.constexpr, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty,
    out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles, out_stride, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
    REFRESH: gl.constexpr, HAS_MEAN: gl.constexpr, W: gl.constexpr, FOLD: gl.constexpr,
):  # fmt: skip
    """64 queries against all keys, int8 q k^T, P and V in e4m3.

    P is 2^8 too large with an exact maximum, to use e4m3's range. Else it begins 2^7 too large, under the maximum of
    the first tile. If the sum of what a lane holds of a row of P stays below 448, no value of it is above, and none
    would be clipped; where one does not, the row's P, sums and accumulators go down by a factor (_raised), before P is
    rounded. ``m_i`` is the maximum less what P is too large by.

    ``totals`` holds the sums of what was folded: those of the maximum at that time, rescaled only at the next fold,
    which is done while q k^T of the next tile runs, when neither scores nor P are in registers. The accumulators are
    not cleared: the first product after a fold does not read them.
    """
    exact: gl.constexpr = REFRESH == 1
    shift: gl.constexpr = 8.0 if exact else 7.0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)

    h = gl.program_id(1)
    row0 = gl.program_id(0) * (NC * BM) + wg * BM
    q = q_smem.index(wg)
    grouped: gl.constexpr = _grouped(gl.zeros([BM, BN], gl.int32, layout=s_layout), W).type.layout
    f_layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, grouped))
    rows = row0 + gl.arange(0, BM, layout=gl.SliceLayout(1, gl.SliceLayout(2, f_layout)))
    q_scale = gl.load(q_scale_ptr + h * n_q + rows, mask=rows < n_q, other=1.0) * scale
    key_scales = k_scale_ptr + h * ((n_tiles * W + 1) // 2 * 8)
    f = _factors(q_scale, key_scales, n_tiles - 1, W)
    zero = gl.zeros([BM, BN], gl.int32, layout=s_layout)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    x = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(0, deps=(x,))
    mbarrier.arrive(k_empty.index(0), count=1)
    # Numbers that the end does not need again: the compiler would keep them in registers all the while.
    keys = (n_tiles - 2) * BN + gl.arange(BN, 2 * BN, layout=gl.SliceLayout(0, s_layout))
    x = gl.where((keys < n_k)[None, :], x.to(gl.float32), float("-inf"))
    l_layout: gl.constexpr = _lane_sums(gl.zeros([BM, BN], gl.float32, layout=s_layout), BN).type.layout
    m_i = _lane_max(x, f, W, l_layout) - shift
    x = gl.convert_layout(_row_exp(x, f, _offsets(x, f, m_i, False, W), W), s_layout, assert_trivial=True)
    l_i = _lane_sums(x, BN)
    o = gl.zeros([BM, D], gl.float32, layout=o_layout)
    mbarrier.wait(v_full.index(0), 0)
    x = _probabilities_8(x, BN, p_layout)
    o = warpgroup_mma(x, v_smem.index(0).permute((1, 0)), o, use_acc=False, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(0), count=1)
    if FOLD:
        # No constant to LLVM: that of Triton 3.9 merges the warpgroups' ends otherwise, with 16 addresses in registers.
        own = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(wg)], gl.int32, is_pure=True, pack=1)
        total = totals.index(own)
        words = _own_words(o, D)
        total.store(words)
        # Another value, if an equal one: were it m_i itself, Triton would not see that the loop changes it.
        m_fold = m_i + 0.0
    ki = 1
    k_phase = 0
    mbarrier.wait(k_full.index(1), 0, pred=n_tiles > 1)
    s = warpgroup_mma(q, k_smem.index(1).permute((1, 0)), zero, use_acc=False, is_async=True)
    # A loop in a loop: a branch for what is seldom done would cost every tile some thirty instructions.
    STEP: gl.constexpr = FOLD if FOLD else 1 << 30
    for first in range(1, n_tiles, STEP):
        for t in range(first, gl.minimum(first + STEP, n_tiles)):
            f = _factors(q_scale, key_scales, t - 1, W)
            scores = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(ki), count=1)
            p, o, m_i, l_i = _tile_8(scores, o, f, m_i, l_i, BN, D, exact, shift, W)
            vi = ki
            v_phase = k_phase
            ki += 1
            if ki == STAGES:
                ki = 0
                k_phase ^= 1
            mbarrier.wait(v_full.index(vi), v_phase)
            mbarrier.wait(k_full.index(ki), k_phase, pred=t + 1 < n_tiles)  # here, not between the products
            pb = _probabilities_8(p, BN, p_layout)
            if FOLD:
                o = warpgroup_mma(pb, v_smem.index(vi).permute((1, 0)), o, use_acc=t != first, is_async=True)
            else:
                o = warpgroup_mma(pb, v_smem.index(vi).permute((1, 0)), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=(o,))
            # After the last tile it is a product of what lies there, which nobody reads.
            s = warpgroup_mma(q, k_smem.index(ki).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.arrive(v_empty.index(vi), count=1)
        if FOLD:
            o = _fold_into(total, total.load(words.type.layout), o, m_fold, m_i, D)
            m_fold = m_i
    s = warpgroup_mma_wait(0, deps=(s,))
    sums = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, o_layout))
    if FOLD:
        o = _own_rows(total.load(words.type.layout), D, o_layout)
    _finish(o, sums, out_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, out_stride, row0, h,
            o_layout, BM, D, True, HAS_MEAN, REFRESH != 1)  # fmt: skip


@gluon.jit
def _consumer(
    wg: gl.constexpr, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
    out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles, out_stride, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, INT8: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, IN_TURN: gl.constexpr, REFRESH: gl.constexpr, HAS_MEAN: gl.constexpr,
    W: gl.constexpr, V8: gl.constexpr, FOLD: gl.constexpr,
):  # fmt: skip
    if V8:
        _consumer_8(wg, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, out_ptr, q_scale_ptr,
                    k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles, out_stride, scale, BM, BN, D, NC,
                    STAGES, REFRESH, HAS_MEAN, W, FOLD)  # fmt: skip
    else:
        _consumer_16(wg, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, turn, out_ptr, q_scale_ptr,
                     k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles, out_stride, scale, BM, BN, D,
                     NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN, W)  # fmt: skip


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, n_tiles,
    q_head, k_head, v_head,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, V8: gl.constexpr,
):  # fmt: skip
    h = gl.program_id(1)
    row0 = gl.program_id(0) * (NC * BM)
    mbarrier.expect(q_full, NC * q_desc.block_type.nbytes)
    for i in gl.static_range(NC):
        _tma_load(q_desc, [row0 + i * BM, h * q_head], q_full, q_smem.index(i))
    stage = 0
    phase = 1
    for t in range(0, n_tiles):
        key0 = gl.where(t == 0, n_tiles - 1, t - 1) * BN
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        _tma_load(k_desc, [key0, h * k_head], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        if V8:
            _tma_load(v_desc, [h * D, key0], v_full.index(stage), v_smem.index(stage))
        else:
            _tma_load(v_desc, [key0, h * v_head], v_full.index(stage), v_smem.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


# n_k = 1 as a constant makes many registers of P one and the same. On an H200 rows of int8-fp8 then came out as no
# number, in some lanes and not always; with the length as an argument they do not.
@gluon.jit(do_not_specialize=["n_k"])
def _attention_kernel(
    q_desc, k_desc, v_desc, out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr,
    n_q, n_k, n_tiles, out_stride, q_head, k_head, v_head, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, INT8: gl.constexpr, V8: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, IN_TURN: gl.constexpr,
    REFRESH: gl.constexpr, HAS_MEAN: gl.constexpr, W: gl.constexpr, FOLD: gl.constexpr, REDO: gl.constexpr,
):  # fmt: skip
    if REDO:
        if gl.load(flag_ptr + (gl.program_id(1) * gl.num_programs(0) + gl.program_id(0))) == 0:
            return
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [NC, BM, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    if V8:
        v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BN], v_desc.layout)
    else:
        v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, D], v_desc.layout)
    if FOLD:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
        totals = gl.allocate_shared_memory(gl.float32, [NC, D // 8, 128, 4], plain)
    else:
        totals = q_smem  # unused
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [NC, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=NC)
        mbarrier.init(v_empty.index(i), count=NC)
    for i in gl.static_range(NC):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    # Written out: a tuple that is kept in a variable loses what is known at compile time.
    if NC == 2:
        gl.warp_specialize([
            (_consumer, (0, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
                         out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles,
                         out_stride, scale, BM, BN, D, NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN,
                         W, V8, FOLD)),
            (_consumer, (1, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
                         out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles,
                         out_stride, scale, BM, BN, D, NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN,
                         W, V8, FOLD)),
            (_producer, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                         n_tiles, q_head, k_head, v_head, BM, BN, D, NC, STAGES, V8)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
                         out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles,
                         out_stride, scale, BM, BN, D, NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN,
                         W, V8, FOLD)),
            (_consumer, (1, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
                         out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles,
                         out_stride, scale, BM, BN, D, NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN,
                         W, V8, FOLD)),
            (_consumer, (2, q_smem, k_smem, v_smem, totals, q_full, k_full, k_empty, v_full, v_empty, turn,
                         out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, flag_ptr, n_q, n_k, n_tiles,
                         out_stride, scale, BM, BN, D, NC, STAGES, INT8, Q_IN_REGISTERS, IN_TURN, REFRESH, HAS_MEAN,
                         W, V8, FOLD)),
            (_producer, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                         n_tiles, q_head, k_head, v_head, BM, BN, D, NC, STAGES, V8)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


class Schedule:
    """How a mode is laid out on a multiprocessor; chosen by measurement on an H200 (700 W), Triton 3.6.

    refresh: tiles between two looks for a new maximum (1: exact; 0, with 8-bit V: P tells). fold: with 8-bit V, tiles
    between two additions of the accumulators to the fp32 sum (0: never); it takes 32 KiB of shared memory a consumer.
    """

    def __init__(
        self, consumers: int, keys: int, stages: int, registers: int, in_turn: bool = False,
        q_in_registers: bool = False, refresh: int = 1, fold: int = 0,
    ) -> None:  # fmt: skip
        self.consumers, self.keys, self.stages, self.registers = consumers, keys, stages, registers
        self.in_turn, self.q_in_registers, self.refresh, self.fold = in_turn, q_in_registers, refresh, fold

    def exact(self) -> Schedule:
        """The same tiles with the maximum taken in every one."""
        return Schedule(self.consumers, self.keys, self.stages, self.registers, self.in_turn, self.q_in_registers,
                        fold=self.fold)  # fmt: skip


SCHEDULES = {
    "bf16-exact": Schedule(2, 128, 2, 240, in_turn=True, q_in_registers=True),
    "bf16": Schedule(3, 64, 4, 160, refresh=32),
    "int8-exact": Schedule(3, 64, 4, 160, in_turn=True),
    "int8": Schedule(3, 64, 4, 160, in_turn=True, refresh=64),
    "int8-fp8-exact": Schedule(3, 128, 3, 160, fold=12),
    "int8-fp8": Schedule(3, 128, 3, 160, refresh=0, fold=12),
}

_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def _descriptor(x: Tensor, rows: int) -> tuple[TensorDescriptor, int]:
    """Rows of ``[S, H, 128]`` as a matrix, and the columns from a head to the next; what lies between is not read."""
    block = [rows, HEAD_DIM]
    columns = (x.shape[1] - 1) * x.stride(1) + HEAD_DIM
    layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[x.dtype])
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], block, layout), x.stride(1)


def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    schedule: str | Schedule,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_mean: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale) v, ``q [S, H, 128]``, ``k [L, H, 128]`` -> bf16 ``[S, H, 128]``.

    Args:
        q, k: bf16; or int8 with ``q_scale`` fp32 ``[H, S]`` and ``k_scale`` fp32 ``[H, key_groups(L)]``.
            Heads and tokens may lie apart (views of a wider tensor); their strides have to be multiples of 16 bytes.
        v: 16 bits ``[L, H, 128]``; or e4m3 ``[H, 128, L16]`` with ``v_scale`` fp32 ``[H, 128]``, L16 >= L a multiple of
            16, what lies beyond L finite, and keys in the order of :func:`permute_keys`.
        v_mean: fp32 ``[H, 128]``, added to the output: what was taken out of V before it was quantized.

    Raises:
        ValueError: shapes, types or strides that no mode takes.
    """
    plan = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    if v.dtype == torch.float16:  # P is of V's type: beyond 65,504 it would be infinite, and its sum would not show it
        plan = plan.exact()
    _check(q, k, v, q_scale, k_scale, v_scale, plan)
    n_q, heads, _ = q.shape
    n_k = k.shape[0]
    if out is None:
        out = torch.empty(n_q, heads, HEAD_DIM, dtype=torch.bfloat16, device=q.device)
    int8, v8 = q.dtype == torch.int8, v.dtype == torch.float8_e4m3fn
    q_desc, q_head = _descriptor(q, 64)
    k_desc, k_head = _descriptor(k, plan.keys)
    if v8:
        block = [HEAD_DIM, plan.keys]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
        v_desc, v_head = TensorDescriptor(v, [heads * HEAD_DIM, v.shape[2]], [v.stride(1), 1], block, layout), 0
    else:
        v_desc, v_head = _descriptor(v, plan.keys)
    grid = (triton.cdiv(n_q, 64 * plan.consumers), heads)
    stale = plan.refresh != 1
    flags = torch.zeros(grid[0] * heads if stale else 1, dtype=torch.int32, device=q.device)
    factor = (HEAD_DIM**-0.5 if scale is None else scale) * math.log2(math.e)

    def run(chosen: Schedule, redo: bool) -> None:
        _attention_kernel[grid](*arguments(chosen, redo), num_warps=4)

    def arguments(chosen: Schedule, redo: bool) -> tuple[Any, ...]:
        unused = out
        return (
            q_desc, k_desc, v_desc, out, _or(q_scale, unused), _or(k_scale, unused), _or(v_scale, unused),
            _or(v_mean, unused), flags, n_q, n_k, triton.cdiv(n_k, chosen.keys), out.stride(0), q_head, k_head, v_head,
            factor, 64, chosen.keys, HEAD_DIM, chosen.consumers, chosen.stages, chosen.registers, int8, v8,
            chosen.q_in_registers, chosen.in_turn, chosen.refresh, v_mean is not None,
            chosen.keys // WINDOW if int8 else 0, chosen.fold if v8 else 0, redo,
        )  # fmt: skip

    run(plan, False)
    if stale:  # programs whose flag is not set end at once: 30 microseconds at 75,888 tokens
        run(plan.exact(), True)
    return out


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    plan: Schedule,
) -> None:  # fmt: skip
    """What a kernel would read or write wrongly."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != HEAD_DIM or k.shape[1:] != q.shape[1:] or not len(k) or not len(q):
        raise ValueError(f"q and k have to be [S, H, 128] and [L, H, 128], not {list(q.shape)} and {list(k.shape)}")
    n_q, heads, _ = q.shape
    n_k = k.shape[0]
    if q.dtype != k.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(f"q and k have to be both bf16, fp16 or int8, not {q.dtype} and {k.dtype}")
    if v.dtype == torch.float8_e4m3fn:
        good = v.ndim == 3 and v.shape[:2] == (heads, HEAD_DIM) and v.shape[2] >= n_k and v.shape[2] % 16 == 0
        if not good or not v.is_contiguous() or q.dtype != torch.int8 or plan.keys != 128:
            raise ValueError(f"8-bit v has to be [{heads}, 128, {-(-n_k // 16) * 16} or more], with int8 q and k")
        _check_scale("v_scale", v_scale, (heads, HEAD_DIM))
    elif v.dtype not in (torch.bfloat16, torch.float16) or v.shape != k.shape:
        raise ValueError(f"v has to be 16 bits {list(k.shape)}, or e4m3, not {v.dtype} {list(v.shape)}")
    elif plan.refresh < 1:
        raise ValueError("P in 16 bits does not tell when a new maximum is due: refresh has to be 1 or more")
    if q.dtype == torch.int8:
        if plan.keys not in (64, 128):
            raise ValueError(f"int8 keys go 64 or 128 at a time, and the schedule takes {plan.keys}")
        _check_scale("q_scale", q_scale, (heads, n_q))
        _check_scale("k_scale", k_scale, (heads, key_groups(n_k)))
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [s * x.element_size() for s in x.stride()[:2]]
        if x.stride(2) != 1 or any(s % 16 for s in strides) or x.data_ptr() % 16:
            raise ValueError(f"{name}: its strides and its start have to be multiples of 16 bytes; make it contiguous")


def _check_scale(name: str, scale: Tensor | None, shape: tuple[int, ...]) -> None:
    if scale is None or scale.shape != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} has to be contiguous fp32 {list(shape)}")

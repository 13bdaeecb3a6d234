"""LayerNorm with modulation, or tanh-GELU, to int8 rows with groups of 256 rotated, for Hopper in Gluon (sm_90).

What packed.py says of fp16 holds here. Beyond it, the tensor cores do what would be additions and exchanges: a warp's
thread holds 8 neighbours of 256 channels, two a register, and those are the operands of mma.sync as they stand. With
H256 = H16 x H16 over the bits {0, 1, 3, 4} and {2, 5, 6, 7} of a channel's number, two products of 16 x 16 matrices end
in the layout they began with: four instructions for 256 values, nothing through shared memory, two roundings to fp16
in place of eight. The sum and the sum of squares of a row are one product for 128 values, whose left operand is the
right one and rows of ones: column sums, and the squares on the diagonal. Its fp32 accumulators cut off rather than
round, a dozen times at 6,144 channels: some 1e-6 of the mean square, less than the rounding of x to bf16 adds to it.

Programs stay on their multiprocessor and walk over the rows. (1 + scale) and shift stay in registers, as fp16, with the
signs of the rotation; the next row is read while this one is worked on. A row that does not fit fp16 is taken again, in
fp32, multiplied by a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WORDS = 128
"""Pairs of channels in a group of 256: what a warp holds, 4 to a thread."""

_MMA = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
# H16 is four times H8, $8, the last of them negative. Bit 1 of a channel is a thread's next word, bit 2 the one after.
_ROTATE = gl.constexpr(f"""{{
.reg .b32 n, z, a0, a1, b0, b1, c0, c1, c2, c3;
xor.b32 n, $8, 0x80008000;
mov.b32 z, 0;
{_MMA} {{a0, a1}}, {{$8, $8, $8, n}}, {{$4, $5}}, {{z, z}};
{_MMA} {{b0, b1}}, {{$8, $8, $8, n}}, {{$6, $7}}, {{z, z}};
{_MMA} {{c0, c2}}, {{$8, $8, $8, n}}, {{a0, b0}}, {{z, z}};
{_MMA} {{c1, c3}}, {{$8, $8, $8, n}}, {{a1, b1}}, {{z, z}};
mov.b32 $0, c0; mov.b32 $1, c1; mov.b32 $2, c2; mov.b32 $3, c3;
}}""")
# Rows 0 to 7 of the left operand are the columns of the right one, rows 8 to 15 are ones.
_SQUARE = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_SUMS = gl.constexpr(f"""{{
.reg .b32 one;
.reg .f32 d0, d1, d2, d3;
mov.b32 one, 0x3F803F80;
{_SQUARE} {{d0, d1, d2, d3}}, {{$8, one, $9, one}}, {{$8, $9}}, {{$4, $5, $6, $7}};
{_SQUARE} {{d0, d1, d2, d3}}, {{$10, one, $11, one}}, {{$10, $11}}, {{d0, d1, d2, d3}};
mov.f32 $0, d0; mov.f32 $1, d1; mov.f32 $2, d2; mov.f32 $3, d3;
}}""")
_UNPACK = "{ .reg .b32 i, j; .reg .f32 l, h; shl.b32 i, $1, 16; and.b32 j, $1, 0xFFFF0000; mov.b32 l, i; mov.b32 h, j; "
_NORM = gl.constexpr(
    _UNPACK + "fma.rn.f32 l, l, $2, $3; fma.rn.f32 h, h, $2, $3; cvt.rn.f16x2.f32 i, h, l; "
    "fma.rn.f16x2 $0, i, $4, $5; }"
)
# 0.03567 and 0.7979, x is infinite where fp16 does not hold it; $2 is a half with the sign of the rotation.
_GELU = gl.constexpr(
    _UNPACK + ".reg .b32 s, c, d; cvt.rn.f16x2.f32 i, h, l; mul.rn.f16x2 s, i, i; mov.b32 c, 0x28912891; "
    "mov.b32 d, 0x3A623A62; fma.rn.f16x2 s, s, c, d; mul.rn.f16x2 s, s, i; tanh.approx.f16x2 s, s; "
    "mul.rn.f16x2 i, i, $2; fma.rn.f16x2 $0, i, s, i; }"
)
# The same with fp32 up to tanh.
_GELU_FP32 = gl.constexpr(
    _UNPACK + ".reg .f32 a, b; mul.rn.f32 a, l, l; mul.rn.f32 b, h, h; fma.rn.f32 a, a, 0f3D122279, 0f3F4C422A; "
    "fma.rn.f32 b, b, 0f3D122279, 0f3F4C422A; mul.rn.f32 a, a, l; mul.rn.f32 b, b, h; tanh.approx.f32 a, a; "
    "tanh.approx.f32 b, b; cvt.rn.f16x2.f32 j, b, a; cvt.rn.f16x2.f32 i, h, l; mul.rn.f16x2 i, i, $2; "
    "fma.rn.f16x2 $0, i, j, i; }"
)
# 1536 = 1.5 x 2^10: the low bits of the sum are the integer, rounded half to even. 127 is not passed: the largest size
# x factor <= 127 (1 + 2^-11).
_ROUND = gl.constexpr("""{
.reg .b32 c, d, e;
mov.b32 c, 0x66006600;
fma.rn.f16x2 d, $2, $6, c;
fma.rn.f16x2 e, $3, $6, c;
prmt.b32 d, d, e, 0x6420;
fma.rn.f16x2 e, $4, $6, c;
fma.rn.f16x2 c, $5, $6, c;
prmt.b32 e, e, c, 0x6420;
mov.b32 $0, d; mov.b32 $1, e;
}""")


@gluon.jit
def _zeros(at):
    layout: gl.constexpr = at.type.layout
    return gl.full([at.shape[0]], 0.0, gl.float32, layout)


@gluon.jit
def _odd_ones(v):
    """1 where an odd number of the low four bits is set."""
    v = v ^ (v >> 2)
    return (v ^ (v >> 1)) & 1


@gluon.jit
def _sign_bits(at):
    """The signs of quantize.rotate() as the sign bits of words."""
    low = at * 2
    return (_odd_ones(low & (low >> 4) & 15) << 15) | (_odd_ones((low + 1) & (low >> 4) & 15) << 31)


@gluon.jit
def _hadamard(at):
    """H8 as a thread's part of an operand: row lane / 4, columns 2 (lane % 4) and the next."""
    row, column = (at >> 4) & 7, ((at >> 2) & 3) * 2
    return ((_odd_ones(row & column) << 15) | (_odd_ones(row & (column + 1)) << 31)) ^ 0x3C003C00


@gluon.jit
def _rotate(words, h8):
    return gl.inline_asm_elementwise(
        _ROTATE, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [words, h8], dtype=gl.int32, is_pure=True, pack=4
    )


@gluon.jit
def _by_warp(x):
    return gl.reshape(x, [gl.num_warps(), x.shape[0] // gl.num_warps()])


@gluon.jit
def _sums(a, b):
    """The sums of two tensors: one exchange between warps and one barrier, where gl.sum() has two for each."""
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([WARPS, 2], [32, 1], [WARPS, 1], [1, 0])
    pairs = gl.join(gl.sum(_by_warp(a), 1), gl.sum(_by_warp(b), 1))
    a, b = gl.split(gl.convert_layout(pairs, layout))
    return gl.sum(a, 0), gl.sum(b, 0)


@gluon.jit
def _max(x):
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])
    return gl.max(gl.convert_layout(gl.max(_by_warp(x), 1), layout), 0)


@gluon.jit
def _add_sums(words, sums):
    return gl.inline_asm_elementwise(
        _SUMS, "=f,=f,=f,=f,f,f,f,f,r,r,r,r", [sums, words], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def _statistics(tiles, at, CHANNELS: gl.constexpr, TILES: gl.constexpr):
    """Mean and variance of a row."""
    sums, more = _zeros(at), _zeros(at)  # two chains: a product waits for the one before
    for i in gl.static_range(TILES):
        if i % 2 == 0:
            sums = _add_sums(tiles[i], sums)
        else:
            more = _add_sums(tiles[i], more)
    sums = sums + more
    register, row, column = at & 3, (at >> 4) & 7, ((at >> 2) & 3) * 2
    total = gl.where(register >= 2, sums, 0.0)  # of all 8 rows of ones
    squares = gl.where((register < 2) & (column + register == row), sums, 0.0)
    total, squares = _sums(total, squares)
    mean = total * (0.125 / CHANNELS)
    return mean, gl.maximum(squares * (1.0 / CHANNELS) - mean * mean, 0.0)


@gluon.jit
def _larger(words, more):
    """The larger of two sizes, each half of a word; the signs mean nothing."""
    return gl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [words, more], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _largest(most):
    """The bits of the largest size among fp16 pairs; infinity and NaN are above all."""
    return _max(gl.maximum(most & 0x7FFF, (most >> 16) & 0x7FFF))


@gluon.jit
def _load(x_ptr, row, stride, at, exists, TILES: gl.constexpr):
    """A row as it lies in memory, bf16 pairs; nothing where it does not exist."""
    keep = exists & (at >= 0)
    tiles = ()
    for i in gl.static_range(TILES):
        tiles += (gl.load(x_ptr + row.to(gl.int64) * stride + i * at.shape[0] + at, mask=keep),)
    return tiles


@gluon.jit
def _halves(word):
    return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _vector(ptr, at, PAIRS: gl.constexpr):
    """Even and odd channels of a vector in fp32."""
    if PAIRS:
        low, high = _halves(gl.load(ptr + at))
    else:
        low, high = gl.load(ptr + at * 2).to(gl.float32), gl.load(ptr + at * 2 + 1).to(gl.float32)
    return low, high


@gluon.jit
def _pack(low, high):
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _gelu(x):
    half = 0.5 * x
    tanh = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x * (0.7978845608028654 + 0.035677408136300125 * (x * x))],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return half + half * tanh


@gluon.jit
def _values(x_ptr, shift_ptr, scale_ptr, at, mean, inverse, GELU: gl.constexpr, PAIRS: gl.constexpr):
    """What is to be rotated, in fp32 and without signs, of words `at` from the pointers on."""
    low, high = _halves(gl.load(x_ptr + at))
    if GELU:
        low, high = _gelu(low), _gelu(high)
    else:
        gain_low, gain_high = _vector(scale_ptr, at, PAIRS)
        shift_low, shift_high = _vector(shift_ptr, at, PAIRS)
        low = (low - mean) * (inverse + inverse * gain_low) + shift_low
        high = (high - mean) * (inverse + inverse * gain_high) + shift_high
    return low, high


@gluon.jit
def _vectors(shift_ptr, scale_ptr, at, signs, TILES: gl.constexpr, PAIRS: gl.constexpr):
    """(1 + scale) and shift as fp16 pairs with the signs of the rotation."""
    gains, shifts = (), ()
    for i in gl.static_range(TILES):
        low, high = _vector(scale_ptr, at + i * at.shape[0], PAIRS)
        gains += (_pack(1.0 + low, 1.0 + high) ^ signs,)
        low, high = _vector(shift_ptr, at + i * at.shape[0], PAIRS)
        shifts += (_pack(low, high) ^ signs,)
    return gains, shifts


@gluon.jit
def _scales(bits, factor, row, out_scale_ptr, at):
    """Stores a row's scale; its inverse in both halves of a word. As packed._store_packed()."""
    amax = gl.maximum(bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32), 0.0625)
    inverse = (127.0 / amax).to(gl.float16)
    scale = 1.0 / (inverse.to(gl.float32) * 16.0) / factor
    gl.store(out_scale_ptr + row, gl.where(bits < 0x7C00, scale, float("nan")))
    pair = inverse.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return (pair | (pair << 16)) + gl.zeros_like(at)


@gluon.jit
def _round(words, pair):
    return gl.inline_asm_elementwise(
        _ROUND, "=r,=r,r,r,r,r,r,r,r,r", [words, pair], dtype=gl.int16, is_pure=True, pack=4
    )


@gluon.jit
def _again(
    row, x_ptr, q_ptr, out_scale_ptr, shift_ptr, scale_ptr, at, mean, inverse, signs, h8,
    TILES: gl.constexpr, GELU: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """A row that fp16 does not hold, multiplied by a power of two, see packed._shift(); from memory three times."""
    STEP: gl.constexpr = at.shape[0]
    largest = gl.zeros_like(at)  # bits of fp32 sizes are in their order, and NaN and infinity above all
    for i in range(TILES):
        low, high = _values(x_ptr, shift_ptr, scale_ptr, at + i * STEP, mean, inverse, GELU, PAIRS)
        largest = gl.maximum(largest, low.to(gl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = gl.maximum(largest, high.to(gl.int32, bitcast=True) & 0x7FFFFFFF)
    factor = gl.minimum(gl.maximum(260 - (_max(largest) >> 23), 1), 227) << 23
    factor = factor.to(gl.float32, bitcast=True)
    most = gl.zeros_like(at)
    for i in range(TILES):
        low, high = _values(x_ptr, shift_ptr, scale_ptr, at + i * STEP, mean, inverse, GELU, PAIRS)
        most = _larger(most, _rotate(_pack(low * factor, high * factor) ^ signs, h8))
    pair = _scales(_largest(most), factor, row, out_scale_ptr, at)
    for i in range(TILES):
        low, high = _values(x_ptr, shift_ptr, scale_ptr, at + i * STEP, mean, inverse, GELU, PAIRS)
        words = _rotate(_pack(low * factor, high * factor) ^ signs, h8)
        gl.store(q_ptr + i * STEP + at, _round(words, pair))


@gluon.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x_ptr, q_ptr, out_scale_ptr, shift_ptr, scale_ptr, rows, stride, eps,
    TILES: gl.constexpr, GELU: gl.constexpr, PAIRS: gl.constexpr, AHEAD: gl.constexpr, FP32: gl.constexpr,
):  # fmt: skip
    """Rows of TILES x num_warps groups, read as words of two channels; `stride` is in words, q is of int16."""
    STEP: gl.constexpr = 128 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    at = gl.arange(0, STEP, layout)
    signs, h8 = _sign_bits(at), _hadamard(at)
    if not GELU:
        gains, shifts = _vectors(shift_ptr, scale_ptr, at, signs, TILES, PAIRS)
    first = gl.program_id(0)
    if AHEAD:
        coming = _load(x_ptr, first, stride, at, first < rows, TILES)
    for row in range(first, rows, gl.num_programs(0)):
        if AHEAD:
            tiles = coming
            after = row + gl.num_programs(0)
            coming = _load(x_ptr, after, stride, at, after < rows, TILES)
        else:
            tiles = _load(x_ptr, row, stride, at, row < rows, TILES)
        words = ()
        mean, inverse = 0.0, 1.0
        if GELU:
            halves = signs ^ 0x38003800
            for i in gl.static_range(TILES):
                y = gl.inline_asm_elementwise(
                    _GELU_FP32 if FP32 else _GELU, "=r,r,r", [tiles[i], halves], dtype=gl.int32, is_pure=True, pack=1
                )
                words += (_rotate(y, h8),)
        else:
            mean, variance = _statistics(tiles, at, TILES * STEP * 2, TILES)
            inverse = gl.rsqrt(variance + eps)
            a = gl.full([STEP], inverse, gl.float32, layout)
            b = gl.full([STEP], -mean * inverse, gl.float32, layout)
            for i in gl.static_range(TILES):
                y = gl.inline_asm_elementwise(
                    _NORM, "=r,r,f,f,r,r", [tiles[i], a, b, gains[i], shifts[i]], dtype=gl.int32, is_pure=True, pack=1
                )
                words += (_rotate(y, h8),)
        most = words[0]
        for i in gl.static_range(1, TILES):
            most = _larger(most, words[i])
        bits = _largest(most)
        q_row = q_ptr + row.to(gl.int64) * (TILES * STEP)
        if (bits < 0x7C00) & (bits >= 0x2C00):  # as packed._fits()
            pair = _scales(bits, 1.0, row, out_scale_ptr, at)
            for i in gl.static_range(TILES):
                gl.store(q_row + i * STEP + at, _round(words[i], pair))
        else:  # hardly ever
            _again(row, x_ptr + row.to(gl.int64) * stride, q_row, out_scale_ptr, shift_ptr, scale_ptr, at, mean,
                   inverse, signs, h8, TILES, GELU, PAIRS)  # fmt: skip


PLANS = {
    # groups of 256 in a row, GELU: warps a row, programs on a multiprocessor (0: one a row), whether the next row is
    # read ahead, a limit on registers.
    (24, False): {"num_warps": 4, "programs": 3, "AHEAD": True, "maxnreg": 168},
    (96, True): {"num_warps": 16, "programs": 1, "AHEAD": True, "maxnreg": 128},
}


def plan_for(x: Tensor, gelu: bool) -> dict[str, int] | None:
    """How rows are shared out, or None where they are not what the kernel reads: bf16 in whole groups, aligned."""
    if x.dtype != torch.bfloat16 or x.stride(0) % 32 or x.data_ptr() % 16 or x.shape[1] % 256:
        return None
    return PLANS.get((x.shape[1] // 256, gelu))


def launch(
    x: Tensor, q: Tensor, out_scale: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float,
    plan: dict[str, int], processors: int,
) -> None:  # fmt: skip
    """Rows ``x [S, d]`` to int8 ``q [S, d]`` and their scales; GELU without ``shift``."""
    rows, gelu = len(x), shift is None
    options = dict(plan)
    programs = options.pop("programs") * processors
    pairs = shift is not None and scale is not None
    for v in (shift, scale):
        pairs = pairs and v is not None and v.dtype == torch.bfloat16 and v.data_ptr() % 4 == 0
    _rows_kernel[(min(rows, programs) if programs else rows,)](
        x.view(torch.int32), q.view(torch.int16), out_scale, shift.view(torch.int32) if pairs else shift,
        scale.view(torch.int32) if pairs else scale, rows, x.stride(0) // 2, eps,
        TILES=x.shape[1] // 256 // options["num_warps"], GELU=gelu, PAIRS=pairs, FP32=options.pop("FP32", False),
        **options,
    )  # fmt: skip

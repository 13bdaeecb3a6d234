"""The end of a row's pass to int8 with groups of 256 rotated, two fp16 values a register; the maths is in quantize.py.

The rotation is eight additions a value, and in fp32 they, not memory, set the pace of a pass on an H200. Here pairs of
channels share a register and an instruction. fp16 has 11 bits, and what eight stages round away is far below the steps
of int8 (relative error after LayerNorm 9.50e-3 in place of 9.47e-3). Its range is enough for rows with rotated values
between 2^-4 and 2^16, before they are normalized by a sixteenth. Any other row is seen by its largest one and taken
again, multiplied by the power of two that puts its largest value between 64 and 128.

Inline assembly: of fp16 tensors, the compiler would spend as much on taking pairs apart as the halved additions save.
No interpreter runs that; the CPU has the fp32 form in quantize.py.
"""

from __future__ import annotations

from .quantize import _jit

try:
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    pass


@_jit
def _one(x, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@_jit
def _two(x, y, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@_jit
def _pair_butterflies(x, STRIDE: tl.constexpr):
    """One stage over words `STRIDE` apart in the order of the tensor's elements."""
    a, b = tl.split(tl.permute(tl.reshape(x, [x.numel // (2 * STRIDE), 2, STRIDE]), (0, 2, 1)))
    plus = _two(a, b, "add.rn.f16x2 $0, $1, $2;")
    minus = _two(a, b, "sub.rn.f16x2 $0, $1, $2;")
    return tl.reshape(tl.permute(tl.join(plus, minus), (0, 2, 1)), x.shape)


@_jit
def _rotate_pairs(x):
    """All eight stages on [16, BLOCKS, 8] words, in the order of quantize.hadamard(); not normalized."""
    x = _one(  # within a word: (a, b) -> (a + b, a - b), as (b, b) (1, -1) + (a, a)
        x,
        "{ .reg .b32 a, b, c; prmt.b32 a, $1, $1, 0x1010; prmt.b32 b, $1, $1, 0x3232; mov.b32 c, 0xBC003C00; "
        "fma.rn.f16x2 $0, b, c, a; }",
    )
    for bit in tl.static_range(3):
        x = _pair_butterflies(x, 1 << bit)
    for bit in tl.static_range(4):
        x = _pair_butterflies(x, (x.numel // 16) << bit)
    return x


@_jit
def _sign_bits():
    """The signs of quantize.rotate() as the sign bits of words, [16, 1, 8]."""
    high = tl.arange(0, 16)[:, None, None]
    low = tl.arange(0, 8)[None, None, :] * 2
    even, odd = high & low, high & (low + 1)
    even, odd = even ^ (even >> 2), odd ^ (odd >> 2)
    return (((even ^ (even >> 1)) & 1) << 15) | (((odd ^ (odd >> 1)) & 1) << 31)


@_jit
def _rotated(lows, highs, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """Pairs of fp32 tiles as rotated words, and the bits of the largest size among them."""
    signs = _sign_bits()
    words = ()
    for i in tl.static_range(TILES):
        word = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [lows[i], highs[i]], dtype=tl.int32, is_pure=True, pack=1
        )
        word = _rotate_pairs(word ^ signs)
        words += (word,)
        size = word & 0x7FFF7FFF
        most = size if i == 0 else _two(most, size, "max.NaN.f16x2 $0, $1, $2;")  # noqa: F821
    # Sizes of fp16 numbers are in the order of their bits, and infinity and NaN lie above all.
    return words, tl.max(tl.reshape(tl.maximum(most & 0xFFFF, most >> 16), [most.numel]), 0)


@_jit
def _fits(bits):
    """Whether fp16 was wide enough: nothing overflowed, and steps of int8 are far above what is below its range."""
    return (bits < 0x7C00) & (bits >= 0x2C00)  # 2^-4


@_jit
def _shift(lows, highs, TILES: tl.constexpr):
    """The power of two that puts the largest value of a row between 64 and 128.

    At most 2^100: the scale of a row of zeros, and of all below quantize.FLOOR, is a number.
    """
    for i in tl.static_range(TILES):
        a = tl.maximum(tl.abs(lows[i]), tl.abs(highs[i]), propagate_nan=tl.PropagateNan.ALL)
        largest = a if i == 0 else tl.maximum(largest, a, propagate_nan=tl.PropagateNan.ALL)  # noqa: F821
    exponent = (tl.max(tl.reshape(largest, [largest.numel]), 0).to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.minimum(tl.maximum(260 - exponent, 1), 227) << 23).to(tl.float32, bitcast=True)


@_jit
def _store_packed(words, bits, shift, row, q_ptr, scale_ptr, K, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales, rounds and stores one row of rotated words, whole tiles each; `q_ptr` is of int32.

    A NaN or an infinity anywhere makes the row's scale NaN.
    """
    amax = tl.maximum(bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), 0.0625)
    inverse = (127.0 / amax).to(tl.float16)
    # Of the rounded inverse, so that q x scale is right whatever it lost; 16 is the rotation's norm.
    scale = 1.0 / (inverse.to(tl.float32) * 16.0) / shift
    tl.store(scale_ptr + row, tl.where(bits < 0x7C00, scale, float("nan")))
    factor = inverse.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    factor = factor | (factor << 16)
    at = tl.arange(0, BLOCKS)[None, :, None] * 64 + tl.arange(0, 16)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    for i in tl.static_range(TILES):
        # 1536 = 1.5 x 2^10: the low bits of the sum are the integer, rounded half to even. 127 is not passed: amax x
        # inverse <= 127 (1 + 2^-11).
        y = _two(
            words[i], tl.full(words[i].shape, 0, tl.int32) + factor,
            "{ .reg .b32 c; mov.b32 c, 0x66006600; fma.rn.f16x2 $0, $1, $2, c; }",
        )  # fmt: skip
        first, second = tl.split(tl.reshape(y, [16, BLOCKS, 4, 2]))
        tl.store(q_ptr + row * (K // 4) + i * (BLOCKS * 64) + at, _two(first, second, "prmt.b32 $0, $1, $2, 0x6420;"))

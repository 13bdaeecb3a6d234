"""V for attention with 8-bit P V: e4m3, transposed, its keys in the order that the tensor cores take P in.

    v8[h, c, place(s)] = e4m3((v[s, h, c] - mean[h, c]) / scale[h, c]),   scale = max over s of |v - mean| / 448

Softmax weights sum to one, so a mean may be taken out of V before it is rounded and added to the output. What is added
is not the mean itself but mean(v - scale x v8): what rounding leaves of the mean does not count twice, and a uniform
attention gives V's mean exactly.

It has to be the mean of all tokens. With that of 256 sampled ones (and one pass less), a mean of 0.06 deviations stays
in V, and the relative error of normal values was 4.7e-2 with 8,192 keys and above 1 with 75,888, in place of 3.5e-2 and
3.7e-2: most likely the sums of e4m3 products, which wgmma keeps to about 14 bits, shrink as they grow.

Two passes over V where the qkv product left it, the first for sums and ranges: 2 x 2 bytes a value in, 1 out, and a
few numbers for every 1,024 tokens. Sums are in a fixed order: the same bits every time. Both in one launch, the second
pass of a head finding V in the L2 cache, was tried on an H200: 0.74 ms in place of 0.80 at 75,888 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import FLOOR, QMAX, _has_kernel, _on_card

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
E4M3 = torch.float8_e4m3fn
TOKENS = 128
"""Tokens of one turn of a program of the second pass."""
CHUNK = 2048
"""Tokens of one of its programs."""
RANGE = 1024
"""Tokens of one program of the first pass."""


def permute_keys(v: Tensor) -> Tensor:
    """Puts keys (the last axis, a multiple of 16) into the order of 8-bit V: place 4 q + 2 h + i of each 16 gets key
    8 h + 2 q + i."""
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def quantize_v_reference(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_v` computes, in plain torch."""
    x = v.float()
    mean = x.mean(0)
    amax = torch.maximum(x.amax(0) - mean, mean - x.amin(0))
    scale = amax.clamp_min(FLOOR) / QMAX[E4M3]
    q = ((x - mean) * scale.reciprocal()).clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3)
    add = mean - scale * q.float().mean(0)
    padded = torch.zeros(-(-len(v) // 16) * 16, *v.shape[1:], device=v.device)
    padded[: len(v)] = q.float()
    return permute_keys(padded.permute(1, 2, 0)).contiguous().to(E4M3), scale, add


if triton is not None:

    @triton.jit
    def _ranges_kernel(v_ptr, stats_ptr, S, row_stride, head_stride, CHUNK: tl.constexpr, ROWS: tl.constexpr):
        """Sum, least and largest value of each channel of a head over CHUNK tokens."""
        head, chunk = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, 128)
        total = tl.zeros([ROWS, 128], tl.float32)
        least = tl.full([ROWS, 128], float("inf"), tl.float32)
        most = tl.full([ROWS, 128], float("-inf"), tl.float32)
        for start in range(0, CHUNK, ROWS):
            rows = chunk * CHUNK + start + tl.arange(0, ROWS)
            keep = (rows < S)[:, None]
            at = v_ptr + rows.to(tl.int64)[:, None] * row_stride + head * head_stride + c[None, :]
            x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
            total += x
            least = tl.minimum(least, tl.where(keep, x, float("inf")))
            most = tl.maximum(most, tl.where(keep, x, float("-inf")))
        to = stats_ptr + ((head * tl.num_programs(1) + chunk) * 3) * 128 + c
        tl.store(to, tl.sum(total, 0))
        tl.store(to + 128, tl.min(least, 0))
        tl.store(to + 256, tl.max(most, 0))

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _scales_kernel(stats_ptr, mean_ptr, scale_ptr, S, chunks, least_amax):
        """Mean and scale of each channel of a head, from the ranges of its chunks."""
        head = tl.program_id(0)
        c = tl.arange(0, 128)
        row = tl.arange(0, 16)
        total = tl.zeros([16, 128], tl.float32)
        least = tl.full([16, 128], float("inf"), tl.float32)
        most = tl.full([16, 128], float("-inf"), tl.float32)
        for first in range(0, chunks, 16):
            keep = (first + row < chunks)[:, None]
            at = stats_ptr + ((head * chunks + first + row) * 3)[:, None] * 128 + c[None, :]
            total += tl.load(at, mask=keep, other=0.0)
            least = tl.minimum(least, tl.load(at + 128, mask=keep, other=float("inf")))
            most = tl.maximum(most, tl.load(at + 256, mask=keep, other=float("-inf")))
        mean = tl.div_rn(tl.sum(total, 0), tl.zeros([128], tl.float32) + S)
        amax = tl.maximum(tl.maximum(tl.max(most, 0) - mean, mean - tl.min(least, 0)), least_amax)
        tl.store(mean_ptr + head * 128 + c, mean)
        tl.store(scale_ptr + head * 128 + c, tl.div_rn(amax, tl.full([128], 448.0, tl.float32)))

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _added_kernel(sums_ptr, mean_ptr, scale_ptr, add_ptr, S, chunks):
        """What attention adds to its output: the mean, less what rounding kept of it."""
        head = tl.program_id(0)
        c = tl.arange(0, 128)
        row = tl.arange(0, 16)
        total = tl.zeros([16, 128], tl.float32)
        for first in range(0, chunks, 16):
            at = sums_ptr + (head * chunks + first + row)[:, None] * 128 + c[None, :]
            total += tl.load(at, mask=(first + row < chunks)[:, None], other=0.0)
        at = head * 128 + c
        left = tl.load(scale_ptr + at) * tl.sum(total, 0)
        tl.store(add_ptr + at, tl.load(mean_ptr + at) + tl.div_rn(left, tl.zeros([128], tl.float32) + S))

    @triton.jit
    def _e4m3(a, b, c, d, ON_CARD: tl.constexpr):
        """Four values as the bytes of a word, clipped at 448."""
        if ON_CARD:
            return tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
                "mov.b32 $0, {l, h}; }",
                "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            word = tl.zeros(a.shape, tl.int32)
            for i in tl.static_range(4):
                y = tl.minimum(tl.maximum((a, b, c, d)[i], -448.0), 448.0).to(tl.float8e4nv)
                word |= y.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)
            return word

    @triton.jit
    def _halves(word, HIGH: tl.constexpr, ON_CARD: tl.constexpr):
        """The first or the last two e4m3 bytes of a word in fp32."""
        if ON_CARD:
            pair = tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, h; }" if HIGH else
                "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }",
                "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            a = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return a + (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            word = word >> (16 * HIGH)
            a = (word & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
            return a + ((word >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    @triton.jit
    def _scaled(at, row, S, inverse, shift):
        """Tokens `row`, of which those beyond S give zeros."""
        x = tl.load(at, mask=(row < S)[:, None], other=0.0).to(tl.float32)
        return x * inverse - tl.where(row < S, 1.0, 0.0)[:, None] * shift

    @triton.jit(do_not_specialize=["S"])
    def _quantize_v_kernel(
        v_ptr, q_ptr, sums_ptr, mean_ptr, scale_ptr, S, S16, row_stride, head_stride,
        CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ON_CARD: tl.constexpr,
    ):  # fmt: skip
        """CHUNK tokens of a head, BLOCK at a time; the sum of what rounding took from each channel of them."""
        head, chunk = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, 128)
        w = tl.arange(0, BLOCK // 4)
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + head * 128 + c))[None, :]
        shift = tl.load(mean_ptr + head * 128 + c)[None, :] * inverse
        at = v_ptr + head * head_stride + c[None, :]
        to = q_ptr + (head * 128 + c).to(tl.int64)[:, None] * (S16 // 4)
        left = tl.zeros([BLOCK // 4, 128], tl.float32)
        for start in tl.range(0, tl.minimum(S - chunk * CHUNK, CHUNK), BLOCK, num_stages=STAGES):
            # Word 4 b + q of places holds keys 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of the b-th sixteen.
            first = chunk * CHUNK + start + (w >> 2) * 16 + (w & 3) * 2
            row = first.to(tl.int64)[:, None] * row_stride
            a = _scaled(at + row, first, S, inverse, shift)
            b = _scaled(at + row + row_stride, first + 1, S, inverse, shift)
            d = _scaled(at + row + 8 * row_stride, first + 8, S, inverse, shift)
            e = _scaled(at + row + 9 * row_stride, first + 9, S, inverse, shift)
            word = _e4m3(a, b, d, e, ON_CARD)
            left += ((a + b) - _halves(word, 0, ON_CARD)) + ((d + e) - _halves(word, 1, ON_CARD))
            places = (chunk * CHUNK + start) // 4 + w
            tl.store(to + places[None, :], tl.trans(word), mask=(places < S16 // 4)[None, :])
        tl.store(sums_ptr + (head * tl.num_programs(1) + chunk) * 128 + c, tl.sum(left, 0))


def quantize_v(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit V of ``[S, H, 128]`` (a view with other strides is welcome).

    Returns:
        e4m3 ``[H, 128, S16]``, S16 the next multiple of 16, keys in the order of :func:`permute_keys`, zeros beyond S;
        its scales, fp32 ``[H, 128]``; and what to add to the output of attention, fp32 ``[H, 128]``.

    Raises:
        ValueError: another shape, or channels that do not lie side by side.
    """
    if v.ndim != 3 or v.shape[2] != HEAD_DIM or v.stride(2) != 1 or not len(v) or not v.is_floating_point():
        raise ValueError(f"v has to be a floating-point [S, H, 128] with channels side by side, not {list(v.shape)}")
    if not _has_kernel("quantize_v", v) or torch.cuda.get_device_capability(v.device) < (8, 9):
        return quantize_v_reference(v)
    return launch(v)


def launch(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, on a checked argument (also under Triton's interpreter)."""
    tokens, heads, _ = v.shape
    stats = torch.empty(heads, -(-tokens // RANGE), 3, HEAD_DIM, device=v.device)
    _ranges_kernel[(heads, stats.shape[1])](
        v, stats, tokens, v.stride(0), v.stride(1), CHUNK=RANGE, ROWS=32, num_warps=4
    )
    mean, scale, add = (torch.empty(heads, HEAD_DIM, device=v.device) for _ in range(3))
    _scales_kernel[(heads,)](stats, mean, scale, tokens, stats.shape[1], FLOOR, num_warps=4)
    padded, chunks = -(-tokens // 16) * 16, -(-tokens // CHUNK)
    q = torch.empty(heads, HEAD_DIM, padded, dtype=E4M3, device=v.device)
    sums = torch.empty(heads, chunks, HEAD_DIM, device=v.device)
    _quantize_v_kernel[(heads, chunks)](
        v, q.view(torch.int32), sums, mean, scale, tokens, padded, v.stride(0), v.stride(1), CHUNK=CHUNK, BLOCK=TOKENS,
        STAGES=3, ON_CARD=_on_card(v), num_warps=8,
    )  # fmt: skip
    _added_kernel[(heads,)](sums, mean, scale, add, tokens, chunks, num_warps=4)
    return q, scale, add

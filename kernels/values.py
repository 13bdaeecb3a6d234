"""V for attention with 8-bit P V: e4m3, transposed, its keys in the order that the tensor cores take P in.

    v8[h, c, place(s)] = e4m3((v[s, h, c] - mean[h, c]) / scale[h, c]),   scale = max over s of |v - mean| / 448

Softmax weights sum to one, so a mean may be taken out of V before it is rounded and added to the output. What is added
is not the mean itself but mean(v - scale x v8): what rounding leaves of the mean does not count twice, and a uniform
attention gives V's mean exactly.

From SAMPLED_FROM tokens on, mean and range are those of a sample, the first 64 tokens of every 1,024, and

    scale = 8 x max over the sample of |v - mean| / 448:

steps of e4m3 are relative to the value, and headroom for values beyond the sample takes 3 of its 15 binades of normal
numbers, those of the smallest values, and nothing from the others. The sampled mean leaves a part of the mean in V.
With that of 256 sampled tokens a mean of 0.06 deviations stayed, and the relative error of normal values was 4.7e-2
with 8,192 keys and above 1 with 75,888, in place of 3.5e-2 and 3.7e-2: most likely the sums of e4m3 products, which
wgmma keeps to about 14 bits, shrank as they grew. That was measured when attention did not fold its sums; today it adds
them to fp32 every 12 tiles, so that they do not grow with the keys, and a sixteenth of the tokens gives a closer mean.
What is added to the output is of all tokens either way: the second pass sums what rounding left.

A value beyond the headroom is never clipped: where one rounds to 448 or more, or is no number, its head is noted, and
gone over again with mean and range of all tokens, by kernels that every other head's programs leave at once. The host
is not asked: a CUDA graph can hold it all. A channel of one value other than zero, whose range is nil, may ask for that
always.

One pass over V where the qkv product left it and a sixteenth of one: 2 x 17/16 bytes a value in, 1 out, and a few
numbers for every 1,024 tokens; below SAMPLED_FROM, and where a head is gone over again, one pass more. Sums are in a
fixed order: the same bits every time.
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
SAMPLED_FROM = 16_384
"""Tokens from which on the first pass reads a sample of them."""
FIRST, EVERY = 64, 1024
"""The sample: the first 64 tokens of every 1,024."""
HEADROOM = 8
"""What the range of a sample is multiplied by."""
RANGE, SAMPLE = 1024, 256
"""Tokens of one program of the first pass: where it reads all of them, and of the sample."""
RANGES = {"ROWS": 32, "num_warps": 2}
"""The first pass: tokens that are read at once; and Triton's options."""
SHARES = 16
"""Programs that go over a head again: those not needed cost a little too."""
PLAN = {"CHANNELS": 64, "CHUNK": 1024, "BLOCK": 128, "STAGES": 5, "num_warps": 4}
"""The second pass: channels and tokens of a program, tokens of one of its turns, turns whose loads are under way; and
Triton's options."""


def permute_keys(v: Tensor) -> Tensor:
    """Puts keys (the last axis, a multiple of 16) into the order of 8-bit V: place 4 q + 2 h + i of each 16 gets key
    8 h + 2 q + i."""
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def _sample(x: Tensor) -> Tensor:
    whole = len(x) // EVERY * EVERY
    return torch.cat([x[:whole].unflatten(0, (-1, EVERY))[:, :FIRST].flatten(0, 1), x[whole : whole + FIRST]])


def _scales(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Mean of each channel, and the scale that takes its largest deviation to ``limit``."""
    mean = x.mean(0)
    amax = torch.maximum(x.amax(0) - mean, mean - x.amin(0))
    return mean, amax.clamp_min(FLOOR) / limit


def _rounded(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return ((x - mean) * scale.reciprocal()).clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3).float()


def quantize_v_reference(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_v` computes, in plain torch."""
    x = v.float()
    if len(x) < SAMPLED_FROM:
        mean, scale = _scales(x, QMAX[E4M3])
    else:
        sampled, exact = _scales(_sample(x), QMAX[E4M3] / HEADROOM), _scales(x, QMAX[E4M3])
        beyond = ~(_rounded(x, *sampled).abs() < QMAX[E4M3]).all(0).all(-1, keepdim=True)  # [H, 1]; what is NaN too
        mean, scale = (torch.where(beyond, b, a) for a, b in zip(sampled, exact, strict=True))
    q = _rounded(x, mean, scale)
    add = x.mean(0) - scale * q.mean(0)
    padded = torch.zeros(-(-len(v) // 16) * 16, *v.shape[1:], device=v.device)
    padded[: len(v)] = q
    return permute_keys(padded.permute(1, 2, 0)).contiguous().to(E4M3), scale, add


if triton is not None:

    @triton.jit
    def _ranges_of(v_ptr, to, chunk, S, row_stride, CHUNK: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
                   EVERY: tl.constexpr):  # fmt: skip
        """Sum, least and largest value of each channel over the CHUNK tokens `chunk` of the sample."""
        c = tl.arange(0, 128)
        total = tl.zeros([ROWS, 128], tl.float32)
        least = tl.full([ROWS, 128], float("inf"), tl.float32)
        most = tl.full([ROWS, 128], float("-inf"), tl.float32)
        for start in range(0, CHUNK, ROWS):
            place = chunk * CHUNK + start
            rows = place // FIRST * EVERY + place % FIRST + tl.arange(0, ROWS)
            keep = (rows < S)[:, None]
            at = v_ptr + rows.to(tl.int64)[:, None] * row_stride + c[None, :]
            x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
            total += x
            least = tl.minimum(least, tl.where(keep, x, float("inf")))
            most = tl.maximum(most, tl.where(keep, x, float("-inf")))
        tl.store(to + c, tl.sum(total, 0))
        tl.store(to + 128 + c, tl.min(least, 0))
        tl.store(to + 256 + c, tl.max(most, 0))

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _ranges_kernel(
        v_ptr, stats_ptr, beyond_ptr, S, chunks, row_stride, head_stride, CHUNK: tl.constexpr, ROWS: tl.constexpr,
        FIRST: tl.constexpr, EVERY: tl.constexpr, AGAIN: tl.constexpr,
    ):  # fmt: skip
        """Ranges of the chunks of a head. EVERY = FIRST: of all tokens. AGAIN: of heads with values beyond 448 only."""
        head = tl.program_id(0)
        if AGAIN:
            if tl.load(beyond_ptr + head) == 0:
                return
        v_ptr += head * head_stride
        stats_ptr += head * chunks * 3 * 128
        if AGAIN:
            for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
                _ranges_of(v_ptr, stats_ptr + chunk * 3 * 128, chunk, S, row_stride, CHUNK, ROWS, FIRST, EVERY)
        else:
            chunk = tl.program_id(1)
            _ranges_of(v_ptr, stats_ptr + chunk * 3 * 128, chunk, S, row_stride, CHUNK, ROWS, FIRST, EVERY)

    @triton.jit(do_not_specialize=["count", "chunks"])
    def _scales_kernel(
        stats_ptr, mean_ptr, scale_ptr, beyond_ptr, count, chunks, least_amax, LIMIT: tl.constexpr, AGAIN: tl.constexpr
    ):
        """Mean and scale of each channel of a head, from the ranges of its chunks, of `count` tokens in all."""
        head = tl.program_id(0)
        if AGAIN:
            if tl.load(beyond_ptr + head) == 0:
                return
        else:
            tl.store(beyond_ptr + head, 0)
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
        mean = tl.div_rn(tl.sum(total, 0), tl.zeros([128], tl.float32) + count)
        amax = tl.maximum(tl.maximum(tl.max(most, 0) - mean, mean - tl.min(least, 0)), least_amax)
        tl.store(mean_ptr + head * 128 + c, mean)
        tl.store(scale_ptr + head * 128 + c, tl.div_rn(amax, tl.full([128], LIMIT, tl.float32)))

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
        """Four values as the bytes of a word, clipped at 448.

        Of two halves: of one piece of assembly, Triton 3.6 computes them twice, once from tokens in the order of the
        store, which threads read from shared memory two bytes at a time.
        """
        if ON_CARD:
            low = tl.inline_asm_elementwise(
                "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [a, b], dtype=tl.uint16, is_pure=True, pack=1
            )
            high = tl.inline_asm_elementwise(
                "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [c, d], dtype=tl.uint16, is_pure=True, pack=1
            )
            return (low.to(tl.uint32) | (high.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
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
    def _scaled(at, row, S, inverse, shift, LAST: tl.constexpr):
        """Tokens `row`; in the last turn of a head, those beyond S give zeros."""
        if LAST:
            x = tl.load(at, mask=(row < S)[:, None], other=0.0).to(tl.float32)
            return x * inverse - tl.where(row < S, 1.0, 0.0)[:, None] * shift
        else:
            return tl.load(at).to(tl.float32) * inverse - shift

    @triton.jit
    def _turn(at, to, key, S, row_stride, inverse, shift, left, LAST: tl.constexpr, ON_CARD: tl.constexpr):
        """Stores the words of keys `key`, key + 1, key + 8, key + 9. Returns them, and what rounding took, summed."""
        a = _scaled(at, key, S, inverse, shift, LAST)
        b = _scaled(at + row_stride, key + 1, S, inverse, shift, LAST)
        d = _scaled(at + 8 * row_stride, key + 8, S, inverse, shift, LAST)
        e = _scaled(at + 9 * row_stride, key + 9, S, inverse, shift, LAST)
        word = _e4m3(a, b, d, e, ON_CARD)
        left += ((a + b) - _halves(word, 0, ON_CARD)) + ((d + e) - _halves(word, 1, ON_CARD))
        if LAST:
            w = tl.arange(0, word.shape[0])
            tl.store(to, tl.trans(word), mask=((w >> 2) * 16 < S)[None, :])  # S16 ends with the last key's sixteen
        else:
            tl.store(to, tl.trans(word))
        return word, left

    @triton.jit
    def _any_of_eight(word):
        """The bits that any of eight channels has, those of one thread: fewer registers to keep them in."""
        a, b = tl.split(word.reshape([word.shape[0], word.shape[1] // 8, 4, 2]))
        a, b = tl.split((a | b).reshape([word.shape[0], word.shape[1] // 8, 2, 2]))
        a, b = tl.split(a | b)
        return a | b

    @triton.jit
    def _chunk(
        v_ptr, q_ptr, sums_ptr, beyond_ptr, S, S16, row_stride, inverse, shift, chunk,
        CHANNELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CHECK: tl.constexpr,
        ON_CARD: tl.constexpr,
    ):  # fmt: skip
        """CHUNK tokens of CHANNELS of a head, BLOCK at a time; the sum of what rounding took from each channel."""
        c = tl.arange(0, CHANNELS)
        w = tl.arange(0, BLOCK // 4)
        key = (w >> 2) * 16 + (w & 3) * 2  # word 4 b + q of places: keys 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of sixteen b
        row_stride = tl.cast(row_stride, tl.int64)
        v_ptr += chunk * CHUNK * row_stride
        q_ptr += chunk * (CHUNK // 4)
        row = key[:, None] * row_stride + c[None, :]
        place = c.to(tl.int64)[:, None] * (S16 // 4) + w[None, :]
        left = tl.zeros([BLOCK // 4, CHANNELS], tl.float32)
        seen = tl.zeros([BLOCK // 4, CHANNELS // 8], tl.int32)
        end = tl.minimum(S - chunk * CHUNK, CHUNK)
        whole = end // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            at, to = v_ptr + start * row_stride + row, q_ptr + start // 4 + place
            word, left = _turn(at, to, key, S, row_stride, inverse, shift, left, False, ON_CARD)
            if CHECK:
                seen |= _any_of_eight((word & 0x7F7F7F7F) + 0x02020202)
        for start in tl.range(whole, end, BLOCK, num_stages=1):
            at, to = v_ptr + start * row_stride + row, q_ptr + start // 4 + place
            word, left = _turn(at, to, key, end - start, row_stride, inverse, shift, left, True, ON_CARD)
            if CHECK:
                seen |= _any_of_eight((word & 0x7F7F7F7F) + 0x02020202)
        tl.store(sums_ptr + chunk * 128 + c, tl.sum(left, 0))
        if CHECK:
            # Magnitude 7E is 448, to which what is beyond was clipped, and 7F is no number: they reach the sign's bit.
            found = tl.max(tl.max(((seen & -0x7F7F7F80) != 0).to(tl.int32), 1), 0)
            tl.store(beyond_ptr, 1, mask=found != 0)  # by every program that finds any: the same value

    @triton.jit(do_not_specialize=["S", "chunks"])
    def _quantize_v_kernel(
        v_ptr, q_ptr, sums_ptr, mean_ptr, scale_ptr, beyond_ptr, S, S16, chunks, row_stride, head_stride,
        CHANNELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CHECK: tl.constexpr,
        AGAIN: tl.constexpr, ON_CARD: tl.constexpr,
    ):  # fmt: skip
        """The chunks of a part of a head. CHECK: notes whether any value is beyond 448. AGAIN: only such heads."""
        head = tl.program_id(0) // (128 // CHANNELS)
        if AGAIN:
            if tl.load(beyond_ptr + head) == 0:
                return
        channel = tl.program_id(0) % (128 // CHANNELS) * CHANNELS
        c = channel + tl.arange(0, CHANNELS)
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + head * 128 + c))[None, :]
        shift = tl.load(mean_ptr + head * 128 + c)[None, :] * inverse
        v_ptr += head * head_stride + channel
        q_ptr += (head * 128 + channel).to(tl.int64) * (S16 // 4)
        sums_ptr += head * chunks * 128 + channel
        beyond_ptr += head
        if AGAIN:
            for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
                _chunk(v_ptr, q_ptr, sums_ptr, beyond_ptr, S, S16, row_stride, inverse, shift, chunk,
                       CHANNELS, CHUNK, BLOCK, STAGES, CHECK, ON_CARD)  # fmt: skip
        else:
            _chunk(v_ptr, q_ptr, sums_ptr, beyond_ptr, S, S16, row_stride, inverse, shift, tl.program_id(1),
                   CHANNELS, CHUNK, BLOCK, STAGES, CHECK, ON_CARD)  # fmt: skip


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


def launch(v: Tensor, plan: dict[str, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, on a checked argument (also under Triton's interpreter)."""
    tokens, heads, _ = v.shape
    plan = PLAN if plan is None else plan
    sampled, padded, chunks = tokens >= SAMPLED_FROM, -(-tokens // 16) * 16, -(-tokens // plan["CHUNK"])
    q = torch.empty(heads, HEAD_DIM, padded, dtype=E4M3, device=v.device)
    sums = torch.empty(heads, chunks, HEAD_DIM, device=v.device)
    mean, scale, add = (torch.empty(heads, HEAD_DIM, device=v.device) for _ in range(3))
    beyond = torch.empty(heads, dtype=torch.int32, device=v.device)

    def both(sample: bool, again: bool) -> None:
        count = tokens // EVERY * FIRST + min(tokens % EVERY, FIRST) if sample else tokens
        size = SAMPLE if sample else RANGE
        ranges = -(-count // size)
        stats = torch.empty(heads, ranges, 3, HEAD_DIM, device=v.device)
        _ranges_kernel[(heads, min(ranges, SHARES) if again else ranges)](
            v, stats, beyond, tokens, ranges, v.stride(0), v.stride(1), CHUNK=size, FIRST=FIRST,
            EVERY=EVERY if sample else FIRST, AGAIN=again, **RANGES,
        )  # fmt: skip
        limit = QMAX[E4M3] / (HEADROOM if sample else 1)
        _scales_kernel[(heads,)](
            stats, mean, scale, beyond, count, ranges, FLOOR, LIMIT=limit, AGAIN=again, num_warps=4
        )
        _quantize_v_kernel[(heads * (HEAD_DIM // plan["CHANNELS"]), min(chunks, SHARES) if again else chunks)](
            v, q.view(torch.int32), sums, mean, scale, beyond, tokens, padded, chunks, v.stride(0), v.stride(1),
            CHECK=sample, AGAIN=again, ON_CARD=_on_card(v), **plan,
        )  # fmt: skip

    both(sampled, False)
    if sampled:
        both(False, True)
    _added_kernel[(heads,)](sums, mean, scale, add, tokens, chunks, num_warps=4)
    return q, scale, add

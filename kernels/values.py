"""V for attention with 8-bit P V: e4m3, transposed, its keys in the order that the tensor cores take P in.

    v8[h, c, place(s)] = e4m3((v[s, h, c] - centre[h, c]) / scale[h, c])

Softmax weights sum to one, so a constant may be taken out of each channel of V before it is rounded and added to the
output: the mean of some sampled tokens. What is added is not the centre itself but mean(v - scale x v8): what rounding
leaves of the mean does not count twice, and a uniform attention gives V's mean exactly.

One pass over V where the qkv product left it: 2 bytes a value in, 1 out, and a number for every 512 tokens. The range,
too, comes from the sampled tokens, sixteen times theirs: e4m3 steps with the value, so that room above costs nothing
(relative error of normal values 2.57e-2, with the exact range likewise). A head with a value beyond it is
flagged, and taken again with its exact range. Sums are in a fixed order: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .qk_norm_rope import sampled_tokens
from .quantize import FLOOR, QMAX, _on_card

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
E4M3 = torch.float8_e4m3fn
TOKENS = 128
"""Tokens of one turn of a program."""
CHUNK = 512
"""Tokens of one program."""
HEADROOM = 16.0
"""How much larger than the sampled ones a value may be."""


def permute_keys(v: Tensor) -> Tensor:
    """Puts keys (the last axis, a multiple of 16) into the order of 8-bit V: place 4 q + 2 h + i of each 16 gets key
    8 h + 2 q + i."""
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def quantize_v_reference(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_v` computes, in plain torch."""
    x = v.float()
    sampled = x[:: sampled_tokens(len(x))[0]]
    centre = sampled.mean(0)
    amax = torch.maximum(sampled.amax(0) - centre, centre - sampled.amin(0)) * HEADROOM
    scale = amax.clamp_min(FLOOR) / QMAX[E4M3]
    beyond = (x - centre).abs().amax(0) / QMAX[E4M3]
    clipped = ~(beyond <= scale).all(-1, keepdim=True)  # of a head; also NaN
    scale = torch.where(clipped, torch.maximum(scale, beyond), scale)
    y = (x - centre) * scale.reciprocal()
    q = y.clamp(-QMAX[E4M3], QMAX[E4M3]).to(E4M3)
    add = centre + scale * (y - q.float()).mean(0)
    padded = torch.zeros(-(-len(v) // 16) * 16, *v.shape[1:], device=v.device)
    padded[: len(v)] = q.float()
    return permute_keys(padded.permute(1, 2, 0)).contiguous().to(E4M3), scale, add


if triton is not None:

    @triton.jit
    def _sample_kernel(
        v_ptr, centre_ptr, scale_ptr, flag_ptr, step, count, row_stride, head_stride, HEADROOM: tl.constexpr,
        FLOOR: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Centre and scale of 32 channels of a head from sampled tokens."""
        head = tl.program_id(0)
        c = tl.program_id(1) * 32 + tl.arange(0, 32)
        total = tl.zeros([ROWS, 32], tl.float32)
        least = tl.full([ROWS, 32], float("inf"), tl.float32)
        most = tl.full([ROWS, 32], float("-inf"), tl.float32)
        for start in range(0, count, ROWS):
            index = start + tl.arange(0, ROWS)
            keep = (index < count)[:, None]
            at = v_ptr + (index * step).to(tl.int64)[:, None] * row_stride + head * head_stride + c[None, :]
            x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
            total += x
            least = tl.minimum(least, tl.where(keep, x, float("inf")))
            most = tl.maximum(most, tl.where(keep, x, float("-inf")))
        centre = tl.sum(total, 0) / count
        amax = tl.maximum(tl.max(most, 0) - centre, centre - tl.min(least, 0)) * HEADROOM
        tl.store(centre_ptr + head * 128 + c, centre)
        tl.store(scale_ptr + head * 128 + c, tl.div_rn(tl.maximum(amax, FLOOR), 448.0))
        tl.store(flag_ptr + head, 0)

    @triton.jit
    def _range_kernel(
        v_ptr, centre_ptr, scale_ptr, flag_ptr, S, row_stride, head_stride, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Raises the scales of a head that is flagged to its exact range."""
        head, chunk = tl.program_id(0), tl.program_id(1)
        if tl.load(flag_ptr + head) == 0:
            return
        c = tl.arange(0, 128)
        centre = tl.load(centre_ptr + head * 128 + c)[None, :]
        most = tl.zeros([ROWS, 128], tl.float32)
        for start in range(0, CHUNK, ROWS):
            rows = chunk * CHUNK + start + tl.arange(0, ROWS)
            keep = (rows < S)[:, None]
            at = v_ptr + rows.to(tl.int64)[:, None] * row_stride + head * head_stride + c[None, :]
            x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.where(keep, tl.abs(x - centre), 0.0))
        tl.atomic_max(scale_ptr + head * 128 + c, tl.div_rn(tl.max(most, 0), 448.0))

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
        v_ptr, q_ptr, sums_ptr, centre_ptr, scale_ptr, flag_ptr, S, S16, row_stride, head_stride,
        CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, REDO: tl.constexpr, ON_CARD: tl.constexpr,
    ):  # fmt: skip
        """CHUNK tokens of a head, BLOCK at a time; the sum of what rounding took from each channel of them."""
        head, chunk = tl.program_id(0), tl.program_id(1)
        if REDO:
            if tl.load(flag_ptr + head) == 0:
                return
        c = tl.arange(0, 128)
        w = tl.arange(0, BLOCK // 4)
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + head * 128 + c))[None, :]
        shift = tl.load(centre_ptr + head * 128 + c)[None, :] * inverse
        at = v_ptr + head * head_stride + c[None, :]
        to = q_ptr + (head * 128 + c).to(tl.int64)[:, None] * (S16 // 4)
        left = tl.zeros([BLOCK // 4, 128], tl.float32)
        most = tl.zeros([BLOCK // 4, 128], tl.float32)
        for start in tl.range(0, CHUNK, BLOCK, num_stages=STAGES):
            # Word 4 b + q of places holds keys 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of the b-th sixteen.
            first = chunk * CHUNK + start + (w >> 2) * 16 + (w & 3) * 2
            row = first.to(tl.int64)[:, None] * row_stride
            a = _scaled(at + row, first, S, inverse, shift)
            b = _scaled(at + row + row_stride, first + 1, S, inverse, shift)
            d = _scaled(at + row + 8 * row_stride, first + 8, S, inverse, shift)
            e = _scaled(at + row + 9 * row_stride, first + 9, S, inverse, shift)
            word = _e4m3(a, b, d, e, ON_CARD)
            left += ((a + b) - _halves(word, 0, ON_CARD)) + ((d + e) - _halves(word, 1, ON_CARD))
            most = tl.maximum(most, tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(d), tl.abs(e))))
            places = (chunk * CHUNK + start) // 4 + w
            tl.store(to + places[None, :], tl.trans(word), mask=(places < S16 // 4)[None, :])
        tl.store(sums_ptr + (head * tl.num_programs(1) + chunk) * 128 + c, tl.sum(left, 0))
        if not REDO:
            tl.store(flag_ptr + head, 1, mask=tl.max(tl.max(most, 0), 0) > 448.0)


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
    if not v.is_cuda or triton is None or torch.cuda.get_device_capability(v.device) < (8, 9):
        return quantize_v_reference(v)
    return launch(v)


def launch(v: Tensor, plan: dict[str, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, on a checked argument (also under Triton's interpreter)."""
    tokens, heads, _ = v.shape
    plan = plan or {"CHUNK": CHUNK, "BLOCK": TOKENS, "STAGES": 1, "num_warps": 8}
    centre, scale = (torch.empty(heads, HEAD_DIM, device=v.device) for _ in range(2))
    flag = torch.empty(heads, dtype=torch.int32, device=v.device)
    strides = v.stride(0), v.stride(1)
    _sample_kernel[(heads, 4)](
        v, centre, scale, flag, *sampled_tokens(tokens), *strides, HEADROOM=HEADROOM, FLOOR=FLOOR, ROWS=256, num_warps=8
    )
    padded, chunks = -(-tokens // 16) * 16, -(-tokens // plan["CHUNK"])
    q = torch.empty(heads, HEAD_DIM, padded, dtype=E4M3, device=v.device)
    sums = torch.empty(heads, chunks, HEAD_DIM, device=v.device)

    def quantize(redo: bool) -> None:
        _quantize_v_kernel[(heads, chunks)](
            v, q.view(torch.int32), sums, centre, scale, flag, tokens, padded, *strides, REDO=redo, ON_CARD=_on_card(v),
            **plan,
        )  # fmt: skip

    quantize(redo=False)
    _range_kernel[(heads, chunks)](v, centre, scale, flag, tokens, *strides, CHUNK=plan["CHUNK"], ROWS=32, num_warps=4)
    quantize(redo=True)
    return q, scale, torch.addcmul(centre, scale, sums.sum(1), value=1 / tokens)

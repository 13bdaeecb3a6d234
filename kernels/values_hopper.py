"""quantize_v for Hopper in Gluon: both passes over V in one launch, a head's second while it is in L2 (sm_90).

Items of some hundred tokens of a head are handed out by a counter: ranges of head h + 1 (and `lead` items more) in turn
with what is to be quantized of head h, of which then 20 MB lie in L2 at 75,888 tokens. Who finishes the last range of a
head makes its mean and scales; who quantizes waits for them. What is waited for was always handed out before: programs
that hold it run already and wait for nothing, so that the launch ends however programs are scheduled.

Sums are taken by sixteens of items, and then those of the head, by whoever comes last: in a fixed order, so the same
bits every time. Nothing passes through shared memory on the way from V to its bytes: a thread reads 8 channels of 16
tokens and writes 16 tokens of 8 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # the older name, up to Triton 3.6

STEP = gl.constexpr(128)
"""Tokens of one step."""
GROUP = gl.constexpr(16)
"""Items whose sums are taken together."""

_READ = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [8, 0]], [[0, 8], [0, 16], [16, 0], [32, 0], [64, 0]],
        [[0, 32], [0, 64]], [], [128, 128],
    )
)  # fmt: skip
"""Tokens and channels: 16 tokens of 8 channels a thread; a load of a warp takes 64 bytes of 8 tokens."""
_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0], [0, 4], [0, 8], [0, 16]], [[32, 0], [64, 0]], [],
        [128, 32],
    )
)  # fmt: skip
"""Channels and words of 4 tokens: a thread's values of _READ; a store of a warp takes 128 bytes of 4 channels."""
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""Tokens and channels where only ranges are wanted: a warp takes whole rows."""
_SMALL = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
"""Sums, least and largest values of several items, 128 channels each."""


@gluon.jit
def _wide(x):
    """bf16 values, which lie two a register, in fp32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
        "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _least(x, y):
    return gl.inline_asm_elementwise(
        "min.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _most(x, y):
    return gl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _halves(x, N: gl.constexpr):
    """``[2 N, 8, 128]`` as two ``[N, 8, 128]``."""
    return gl.split(gl.permute(gl.reshape(x, [2, N, 8, 128]), (1, 2, 3, 0)))


@gluon.jit
def _step_ranges(at, S, row0, row_stride, MASKED: gl.constexpr):
    """Sum, least and largest values of 128 tokens, ``[8, 128]`` each: what a thread has of them."""
    row = row0 + gl.arange(0, STEP, layout=gl.SliceLayout(1, _ROWS))
    # Beyond the end the last token comes again: it changes no range.
    safe = gl.minimum(row, S - 1).to(gl.int64) if MASKED else row.to(gl.int64)
    x = gl.load(at + safe[:, None] * row_stride, eviction_policy="evict_last")
    wide = _wide(x)
    if MASKED:
        wide = gl.where((row < S)[:, None], wide, 0.0)
    total = gl.sum(gl.reshape(wide, [16, 8, 128]), 0)
    a, b = _halves(gl.reshape(x, [16, 8, 128]), 8)
    least, most = _least(a, b), _most(a, b)
    a, b = _halves(least, 4)
    c, d = _halves(most, 4)
    least, most = _least(a, b), _most(c, d)
    a, b = _halves(least, 2)
    c, d = _halves(most, 2)
    least, most = _least(a, b), _most(c, d)
    return total, gl.min(least.to(gl.float32), 0), gl.max(most.to(gl.float32), 0)


@gluon.jit
def _ranges(at, S, first, row_stride, STEPS: gl.constexpr, MASKED: gl.constexpr):
    """Sum, least and largest values of each channel over the tokens of an item."""
    total, least, most = _step_ranges(at, S, first, row_stride, MASKED)
    for i in gl.static_range(1, STEPS):
        if MASKED:
            if first + i * STEP < S:
                a, b, c = _step_ranges(at, S, first + i * STEP, row_stride, MASKED)
                total, least, most = total + a, gl.minimum(least, b), gl.maximum(most, c)
        else:
            a, b, c = _step_ranges(at, S, first + i * STEP, row_stride, MASKED)
            total, least, most = total + a, gl.minimum(least, b), gl.maximum(most, c)
    layout: gl.constexpr = gl.SliceLayout(0, _ROWS)
    total = gl.convert_layout(gl.sum(total, 0), layout, assert_trivial=True)
    least = gl.convert_layout(gl.min(least, 0), layout, assert_trivial=True)
    return total, least, gl.convert_layout(gl.max(most, 0), layout, assert_trivial=True)


@gluon.jit
def _last(counter, count):
    """Whether this program is the last of `count`; what it and all others stored before is there for the last one."""
    _barrier()
    return gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1


@gluon.jit
def _member(at, first, count, N: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr, other):
    """One part, such as the least values, of up to N items from `first` on, ``[N, 128]``."""
    row = gl.arange(0, N, layout=gl.SliceLayout(1, _SMALL))[:, None]
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, _SMALL))[None, :]
    to = at + (first + row) * (PARTS * 128) + PART * 128 + c
    return gl.load(to, mask=row < count, other=other, cache_modifier=".cg")


@gluon.jit
def _head_ranges(groups_at, groups):
    """Sum, least and largest values of a head, of those of its groups of items."""
    total = gl.sum(_member(groups_at, 0, groups, 32, 3, 0, 0.0), 0)
    least = gl.min(_member(groups_at, 0, groups, 32, 3, 1, float("inf")), 0)
    most = gl.max(_member(groups_at, 0, groups, 32, 3, 2, float("-inf")), 0)
    for first in range(32, groups, 32):
        total += gl.sum(_member(groups_at, first, groups - first, 32, 3, 0, 0.0), 0)
        least = gl.minimum(least, gl.min(_member(groups_at, first, groups - first, 32, 3, 1, float("inf")), 0))
        most = gl.maximum(most, gl.max(_member(groups_at, first, groups - first, 32, 3, 2, float("-inf")), 0))
    return total, least, most


@gluon.jit
def _range_item(
    v_ptr, stats_ptr, group_stats_ptr, counters_ptr, mean_ptr, scale_ptr, head, item, items, groups, S,
    row_stride, head_stride, STEPS: gl.constexpr,
):  # fmt: skip
    at = v_ptr + head * head_stride + gl.arange(0, 128, layout=gl.SliceLayout(0, _ROWS))[None, :]
    first = item * (STEPS * STEP)
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, _ROWS))
    to = stats_ptr + (head * items + item) * 384 + c
    if first + STEPS * STEP <= S:
        total, least, most = _ranges(at, S, first, row_stride, STEPS, False)
        gl.store(to, total)
        gl.store(to + 128, least)
        gl.store(to + 256, most)
    else:
        total, least, most = _ranges(at, S, first, row_stride, STEPS, True)
        gl.store(to, total)
        gl.store(to + 128, least)
        gl.store(to + 256, most)
    group = item // GROUP
    members = gl.minimum(items - group * GROUP, GROUP)
    counters = counters_ptr + 1 + head * (2 * groups + 3)
    if _last(counters + 3 + group, members):
        stats = stats_ptr + head * items * 384
        small = gl.arange(0, 128, layout=gl.SliceLayout(0, _SMALL))
        to_group = group_stats_ptr + (head * groups + group) * 384 + small
        a = gl.sum(_member(stats, group * GROUP, members, GROUP, 3, 0, 0.0), 0)
        b = gl.min(_member(stats, group * GROUP, members, GROUP, 3, 1, float("inf")), 0)
        d = gl.max(_member(stats, group * GROUP, members, GROUP, 3, 2, float("-inf")), 0)
        gl.store(to_group, a)
        gl.store(to_group + 128, b)
        gl.store(to_group + 256, d)
        if _last(counters, groups):
            a, b, d = _head_ranges(group_stats_ptr + head * groups * 384, groups)
            mean = gl.div_rn(a, S.to(gl.float32) + gl.zeros_like(a))
            amax = gl.maximum(gl.maximum(d - mean, mean - b), 7.888609052210118e-31)
            gl.store(mean_ptr + head * 128 + small, mean)
            gl.store(scale_ptr + head * 128 + small, gl.div_rn(amax, gl.full_like(amax, 448.0)))
            _barrier()
            gl.atomic_xchg(counters + 1, 1, sem="release", scope="gpu")


@gluon.jit
def _words_of(x, inverse, shift, row, S, MASKED: gl.constexpr):
    """Tokens ``[128, 128]`` as e4m3, four tokens a word, ``[128, 32]``."""
    y = _wide(x) * inverse[None, :] - shift[None, :]
    if MASKED:
        y = gl.where((row < S)[:, None], y, 0.0)
    # Word 4 b + q of places holds keys 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of the b-th sixteen.
    y = gl.permute(gl.reshape(y, [8, 2, 4, 2, 128]), (4, 0, 2, 1, 3))
    even, odd = gl.split(y)
    a, d = gl.split(even)
    b, e = gl.split(odd)
    word = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        "mov.b32 $0, {l, h}; }",
        "=r,f,f,f,f", [a, b, d, e], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(word, [128, 32]), _WORDS)


@gluon.jit
def _sum_of_word(word):
    """Its four e4m3 values added in fp32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 l, h, a, b, c, d; .reg .b32 p, q; .reg .f32 w, x, y, z; mov.b32 {l, h}, $1; "
        "cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h; mov.b32 {a, b}, p; mov.b32 {c, d}, q; "
        "cvt.f32.f16 w, a; cvt.f32.f16 x, b; cvt.f32.f16 y, c; cvt.f32.f16 z, d; "
        "add.f32 w, w, x; add.f32 y, y, z; add.f32 $0, w, y; }",
        "=f,r", [word], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _step(at, S, row0, row_stride, MASKED: gl.constexpr):
    """128 tokens; beyond the end the last one."""
    row = row0 + gl.arange(0, STEP, layout=gl.SliceLayout(1, _READ))
    row = gl.minimum(row, S - 1).to(gl.int64) if MASKED else row.to(gl.int64)
    return gl.load(at + row[:, None] * row_stride, eviction_policy="evict_first")


@gluon.jit
def _step_words(x, to, S, quads, row0, inverse, shift, MASKED: gl.constexpr):
    """Quantizes and stores 128 tokens; what their values sum to, ``[128, 32]``."""
    row = row0 + gl.arange(0, STEP, layout=gl.SliceLayout(1, _READ))
    word = _words_of(x, inverse, shift, row, S, MASKED)
    place = row0 // 4 + gl.arange(0, STEP // 4, layout=gl.SliceLayout(0, _WORDS))
    if MASKED:
        gl.store(to + place[None, :], word, mask=(place < quads * 4)[None, :], eviction_policy="evict_first")
    else:
        gl.store(to + place[None, :], word, eviction_policy="evict_first")
    return _sum_of_word(word)


@gluon.jit
def _value_item(
    v_ptr, q_ptr, sums_ptr, group_sums_ptr, counters_ptr, mean_ptr, scale_ptr, add_ptr, head, item, items, groups, S,
    quads, row_stride, head_stride, STEPS: gl.constexpr,
):  # fmt: skip
    columns: gl.constexpr = gl.SliceLayout(0, _READ)
    c = gl.arange(0, 128, layout=columns)
    at = v_ptr + head * head_stride + c[None, :]
    first = item * (STEPS * STEP)
    x = _step(at, S, first, row_stride, True)  # under way while the head's ranges are waited for
    counters = counters_ptr + 1 + head * (2 * groups + 3)
    ready = gl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu")
    while ready == 0:
        ready = gl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu")
    scale = gl.load(scale_ptr + head * 128 + c, cache_modifier=".cg")
    inverse = gl.div_rn(gl.full_like(scale, 1.0), scale)
    shift = gl.load(mean_ptr + head * 128 + c, cache_modifier=".cg") * inverse
    channel = gl.arange(0, 128, layout=gl.SliceLayout(1, _WORDS))
    to = q_ptr + (head * 128 + channel).to(gl.int64)[:, None] * (quads * 4)
    if first + STEPS * STEP <= S:
        total = _step_words(x, to, S, quads, first, inverse, shift, False)
        for i in gl.static_range(1, STEPS):
            x = _step(at, S, first + i * STEP, row_stride, False)
            total += _step_words(x, to, S, quads, first + i * STEP, inverse, shift, False)
    else:
        total = _step_words(x, to, S, quads, first, inverse, shift, True)
        for i in range(1, STEPS):
            if first + i * STEP < S:
                x = _step(at, S, first + i * STEP, row_stride, True)
                total += _step_words(x, to, S, quads, first + i * STEP, inverse, shift, True)
    sums = sums_ptr + head * items * 128
    gl.store(sums + item * 128 + channel, gl.sum(total, 1))
    group = item // GROUP
    members = gl.minimum(items - group * GROUP, GROUP)
    if _last(counters + 3 + groups + group, members):
        small = gl.arange(0, 128, layout=gl.SliceLayout(0, _SMALL))
        a = gl.sum(_member(sums, group * GROUP, members, GROUP, 1, 0, 0.0), 0)
        gl.store(group_sums_ptr + (head * groups + group) * 128 + small, a)
        if _last(counters + 2, groups):
            group_sums = group_sums_ptr + head * groups * 128
            a = gl.zeros_like(a)
            for begin in range(0, groups, 32):
                a += gl.sum(_member(group_sums, begin, groups - begin, 32, 1, 0, 0.0), 0)
            a = a * gl.load(scale_ptr + head * 128 + small, cache_modifier=".cg")
            a = gl.load(mean_ptr + head * 128 + small, cache_modifier=".cg") - a / S.to(gl.float32)
            gl.store(add_ptr + head * 128 + small, a)


@gluon.jit(do_not_specialize=["heads", "items", "groups", "lead", "S", "quads"])
def _values_kernel(
    v_ptr, q_ptr, stats_ptr, group_stats_ptr, sums_ptr, group_sums_ptr, counters_ptr, mean_ptr, scale_ptr, add_ptr,
    heads, items, groups, lead, S, quads, row_stride, head_stride,
    STEPS: gl.constexpr, IN_ORDER: gl.constexpr,
):  # fmt: skip
    if IN_ORDER:
        ticket = gl.program_id(0)
    else:
        ticket = gl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    # Ranges alone come first, then both kinds in turn, and what is left to quantize last.
    turn = ticket - lead
    ranges = (turn < 0) | ((turn & 1) == 0)
    index = gl.where(turn < 0, ticket, gl.where(ranges, lead + turn // 2, turn // 2))
    if ranges:
        if index < heads * items:
            _range_item(
                v_ptr, stats_ptr, group_stats_ptr, counters_ptr, mean_ptr, scale_ptr, index // items, index % items,
                items, groups, S, row_stride, head_stride, STEPS,
            )  # fmt: skip
    else:
        _value_item(
            v_ptr, q_ptr, sums_ptr, group_sums_ptr, counters_ptr, mean_ptr, scale_ptr, add_ptr, index // items,
            index % items, items, groups, S, quads, row_stride, head_stride, STEPS,
        )  # fmt: skip


def quantize_v_hopper(v: Tensor, plan: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_v() of a bf16 ``v``: ``plan`` has the steps of 128 tokens of an item, how many items more than a head's
    the ranges are ahead, and how many registers a thread may have (0: what the compiler takes). With ``in_order``, the
    number of a program is taken for its item: right only where programs start in the order of their numbers, which CUDA
    does not promise."""
    tokens, heads, width = v.shape
    items = -(-tokens // (plan["steps"] * 128))
    groups = -(-items // 16)
    padded = -(-tokens // 16) * 16
    q = torch.empty(heads, width, padded, dtype=torch.float8_e4m3fn, device=v.device)
    rest = torch.empty(heads * (4 * (items + groups) + 3) * width, device=v.device)
    sizes = [heads * n * width for n in (3 * items, 3 * groups, items, groups, 1, 1, 1)]
    stats, group_stats, sums, group_sums, mean, scale, add = rest.split(sizes)
    counters = torch.zeros(heads * (2 * groups + 3) + 1, dtype=torch.int32, device=v.device)
    lead = min(heads, 1) * items + plan["lead"]
    # The number of programs: each of `lead` and, from then on, twice as many as there are items to quantize.
    grid = (lead + 2 * heads * items,)
    limits = {"maxnreg": plan["registers"]} if plan["registers"] else {}
    _values_kernel[grid](
        v, q.view(torch.int32), stats, group_stats, sums, group_sums, counters, mean, scale, add, heads, items,
        groups, lead, tokens, padded // 16, v.stride(0), v.stride(1), STEPS=plan["steps"],
        IN_ORDER=bool(plan.get("in_order")), num_warps=4, **limits,
    )  # fmt: skip
    return q, scale.view(heads, width), add.view(heads, width)

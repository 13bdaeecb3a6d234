"""The 8-bit form of qk_norm_rope for Hopper in Gluon: values go from memory to the tensor cores, and from there to
memory, in the registers of one thread (sm_90).

Triton's own form moves every value through shared memory three times, as loads, wgmma and stores want other threads to
hold them, and waits at as many barriers. Here a thread loads 16 bytes of channels at a time, eight first ones of pairs
and the eight second ones, which are then its part of wgmma's left operand: the rows of the Hadamard matrix are put into
that order, and its columns so that the thread holds 16 neighbouring bytes of the result twice. Shared memory keeps the
matrix alone, and the largest keys of a group, of which each warp has some.

Loads of k are written before the work on q, those of the next q before that on k; ptxas moves them down to behind the
products all the same. Copying them to shared memory in time (cp.async, one or two tiles ahead) was no faster on an H200
than waiting for both products at once: 0.84 to 0.87 ms in place of 0.91 at 75,888 tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .quantize import hadamard

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # the older name, up to Triton 3.6

BLOCK = 64
"""Tokens of one program: a warp's 16 rows of wgmma, four times."""
_NORM = gl.constexpr(0.08838834764831845)
"""128^-0.5"""

_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, 64],
    )
)  # fmt: skip
"""Tokens and rotated pairs: eight pairs a load, two loads and two tokens a thread; four threads have a token."""
_OUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 64], [8, 0]], [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, 128],
    )
)  # fmt: skip
"""Tokens and channels as they are stored: 16 bytes at a time."""
_ROUND = gl.constexpr(
    "{ .reg .f32 f<4>; .reg .b32 r<4>;"
    + " ".join(f"fma.rn.f32 f{i}, ${1 + i}, $5, 0f4B400000; mov.b32 r{i}, f{i};" for i in range(4))
    + " prmt.b32 r0, r0, r1, 0x0040; prmt.b32 r2, r2, r3, 0x0040; prmt.b32 $0, r0, r2, 0x5410; }"
)
"""Four values times a factor to int8: 1.5 x 2^23 is added, and the sum's low bits are the integer, half to even."""


@gluon.jit
def _first_channels(layout: gl.constexpr):
    """The first channels of the 64 rotated pairs; see qk_norm_rope._pairs()."""
    p = gl.arange(0, 64, layout=layout)
    first = p + gl.where(p >= 32, 32, 0) + gl.where(p >= 48, 16, 0)
    return gl.max_contiguous(gl.multiple_of(first, 8), 8), gl.where(p < 32, 32, 16)


@gluon.jit
def _loaded(at, first, second):
    """Both channels of pairs ``[64, 64]``, as they lie in memory."""
    return gl.load(at + first), gl.load(at + second)


@gluon.jit
def _wide(x):
    """bf16 values, which lie two a register, in fp32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
        "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _normed(x, y, weight_first, weight_second, eps):
    """Rows over their root mean square, times the gains, in fp16."""
    x, y = _wide(x), _wide(y)
    inverse = gl.rsqrt(gl.sum(gl.reshape(gl.join(x * x, y * y), [64, 128]), 1) / 128 + eps)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, _PAIRS), assert_trivial=True)[:, None]
    return _times(x, inverse, weight_first), _times(y, inverse, weight_second)


@gluon.jit
def _times(x, inverse, weight):
    x, inverse = gl.broadcast(x, inverse)
    x, weight = gl.broadcast(x, weight[None, :])
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a, b; mul.f32 a, $1, $3; mul.f32 b, $2, $4; .reg .b32 t; cvt.rn.f16x2.f32 t, b, a; "
        "mul.rn.f16x2 $0, t, $5; }",
        "=r,f,f,f,f,r",
        [x, inverse, weight], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _product(x, y):
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _fma(x, y, z):
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _less(x, y, z):
    """x y - z, which ptxas makes one instruction."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.f16x2 t, $1, $2; sub.f16x2 $0, t, $3; }", "=r,r,r,r", [x, y, z], dtype=gl.float16,
        is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _kept(weight_ptr, at):
    """64 gains in fp16 in shared memory."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float16, [64], layout, gl.load(weight_ptr + at).to(gl.float16))


@gluon.jit
def _operand(x, mma: gl.constexpr):
    """Values ``[64, 64]`` of pairs as wgmma's left operand: registers only change their names.

    A thread holds pairs 32 r + 8 q + 2 m + i, and the operand's columns 16 s + 8 h + 2 q + i: r and m become s and h.
    """
    x = gl.permute(gl.reshape(x, [64, 2, 4, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(x, [64, 64]), gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def _turned(x, y, h_first, h_second, mma: gl.constexpr):
    """[x, y] H, 128^0.5 too large, in the order of stores."""
    out = gl.zeros([64, 128], gl.float32, layout=mma)
    # Without a wait between the products: two tenths of the pass would be spent there.
    out = warpgroup_mma(_operand(x, mma), h_first, out, use_acc=False, is_async=True)
    out = warpgroup_mma(_operand(y, mma), h_second, out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    # A thread holds columns 64 u + 8 v + 2 q + i of the product, which are made channels 64 u + 16 q + 2 v + i.
    out = gl.permute(gl.reshape(out, [64, 2, 8, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(out, [64, 128]), _OUT)


@gluon.jit
def _amax(x):
    """The largest size in each row of ``[64, 128]``, infinity where there is a NaN, see qk_norm_rope._largest(). Of
    gl.abs() the compiler makes an instruction of its own."""
    a, b = gl.split(gl.permute(gl.reshape(x, [64, 2, 64]), (0, 2, 1)))
    most = gl.inline_asm_elementwise(
        "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b; }", "=f,f,f", [a, b], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip
    most = gl.max(most, 1)
    most = gl.where(most >= 0.0, most, float("inf"))
    return gl.convert_layout(most, gl.SliceLayout(1, _OUT), assert_trivial=True)


@gluon.jit
def _scale(amax):
    return gl.maximum(amax * _NORM, 8.881784197001252e-16) * (1 / 127)


@gluon.jit
def _round_int8(x, factor):
    x, factor = gl.broadcast(x, factor[:, None])
    return gl.inline_asm_elementwise(
        _ROUND, "=r,f,f,f,f,f,f,f,f", [x, factor], dtype=gl.int8, is_pure=True, pack=4
    )  # fmt: skip


@gluon.jit(do_not_specialize=["S"])
def _qk_hopper_kernel(
    qkv_ptr, q_ptr, k_ptr, q_scale_ptr, k_scale_ptr, k_mean_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    h_ptr, S, row_stride, head_stride, out_row, out_head, eps,
    HEADS: gl.constexpr,
):  # fmt: skip
    """64 tokens of HEADS heads, one after the other; the tables and H are loaded once."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    columns: gl.constexpr = gl.SliceLayout(0, _PAIRS)
    block = gl.program_id(1)
    # Rows past the end are the last one again, and not stored.
    row = gl.minimum(block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, _PAIRS)), S - 1).to(gl.int64)[:, None]
    first, apart = _first_channels(columns)
    second = gl.max_contiguous(gl.multiple_of(first + apart, 8), 8)
    table = row * 128 + first[None, :]
    c = gl.load(cos_ptr + table).to(gl.float16)
    s = gl.load(sin_ptr + table).to(gl.float16)
    q_first, q_second = _kept(q_weight_ptr, first), _kept(q_weight_ptr, second)
    k_first, k_second = _kept(k_weight_ptr, first), _kept(k_weight_ptr, second)
    at = qkv_ptr + row * row_stride
    to_row = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, _OUT))
    to_mask = to_row < S
    to = to_row.to(gl.int64)[:, None] * out_row + gl.arange(0, 128, layout=gl.SliceLayout(0, _OUT))[None, :]

    tile: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.float16)
    h_at = h_ptr + gl.arange(0, 64, layout=gl.SliceLayout(1, tile))[:, None] * 128
    h_at = h_at + gl.arange(0, 128, layout=gl.SliceLayout(0, tile))[None, :]
    h_first = gl.allocate_shared_memory(gl.float16, [64, 128], shared, gl.load(h_at))
    h_second = gl.allocate_shared_memory(gl.float16, [64, 128], shared, gl.load(h_at + 64 * 128))
    fence_async_shared()
    _barrier()

    head0 = gl.program_id(0) * HEADS
    x, y = _loaded(at + head0 * head_stride, first[None, :], second[None, :])
    for i in range(HEADS):
        head = head0 + i
        here = at + head * head_stride
        u, v = _loaded(here + 128, first[None, :], second[None, :])
        x, y = _normed(x, y, q_first.load(columns), q_second.load(columns), eps)
        q = _turned(_less(x, c, _product(y, s)), _fma(y, c, _product(x, s)), h_first, h_second, mma)
        scale = _scale(_amax(q))
        gl.store(q_scale_ptr + head * S + to_row, scale, mask=to_mask)
        gl.store(q_ptr + (to + head * out_head), _round_int8(q, (_NORM / scale)), mask=to_mask[:, None])

        # The last turn loads its own q again.
        after = at + (head0 + gl.minimum(i + 1, HEADS - 1)) * head_stride
        x, y = _loaded(after, first[None, :], second[None, :])
        mean_first, mean_second = gl.load(k_mean_ptr + head * 128 + first), gl.load(k_mean_ptr + head * 128 + second)
        u, v = _normed(u, v, k_first.load(columns), k_second.load(columns), eps)
        u, mean_first = gl.broadcast(u, mean_first[None, :])
        v, mean_second = gl.broadcast(v, mean_second[None, :])
        u, v = _less(u, c, _fma(v, s, mean_first)), _fma(v, c, _less(u, s, mean_second))
        k = _turned(u, v, h_first, h_second, mma)
        amax = gl.reshape(gl.where(to_mask, _amax(k), 0.0), [8, 4, 2])
        scale = _scale(gl.max(gl.max(amax, 2), 0))
        # See qk_norm_rope.group_of(); a block is a window.
        at_scale = head * (gl.num_programs(1) * 4) + block // 2 * 8 + block % 2
        gl.store(k_scale_ptr + at_scale + 2 * gl.arange(0, 4, layout=scale.type.layout), scale)
        factor = (_NORM / scale)[None, :, None] + gl.zeros_like(amax)
        factor = gl.convert_layout(gl.reshape(factor, [64]), gl.SliceLayout(1, _OUT))
        gl.store(k_ptr + (to + head * out_head), _round_int8(k, factor), mask=to_mask[:, None])


@functools.cache
def walsh(device: torch.device) -> Tensor:
    """H of 128 in fp16, +1 and -1: its rows in the order of the left operand, first channels of pairs and then second
    ones, its columns in that of the product."""
    place = torch.arange(64)
    pair = (place >> 5) * 32 + ((place >> 1) & 3) * 8 + ((place >> 3) & 3) * 2 + (place & 1)
    first = pair + 32 * (pair >= 32) + 16 * (pair >= 48)
    rows = torch.cat([first, first + torch.where(pair < 32, 32, 16)])
    n = torch.arange(128)
    columns = (n >> 6) * 64 + ((n >> 1) & 3) * 16 + ((n >> 3) & 7) * 2 + (n & 1)
    h = (hadamard(torch.eye(128), 128) * 128**0.5).round()
    return h[rows][:, columns].half().to(device).contiguous()


def launch_hopper(
    qkv: Tensor, q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, mean: Tensor, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, heads: int, plan: dict[str, int],
) -> None:  # fmt: skip
    """Fills int8 q and k and their scales, for bf16 ``qkv``. ``plan`` says how many registers a thread may have, 0 for
    what the compiler takes."""
    blocks = k_scale.shape[1] // 4
    limits = {"maxnreg": plan["registers"]} if plan["registers"] else {}
    _qk_hopper_kernel[(qkv.shape[1] // heads, blocks)](
        qkv, q, k, q_scale, k_scale, mean, q_weight, k_weight, cos, sin, walsh(qkv.device), len(qkv), qkv.stride(0),
        qkv.stride(1), q.stride(0), q.stride(1), eps, HEADS=heads, num_warps=4,
        **limits,
    )  # fmt: skip

"""Rows to 8 bits: one scale a row, int8 or e4m3, optionally after a Hadamard rotation of groups of channels.

    y = rotate(x, group);  scale = max(max |y|, 2^-100) / QMAX;  q = round(y / scale)        (QMAX: 127 or 448)

The rotation R, signs and then a Hadamard transform, is orthonormal, so (x R)(w R)^T = x w^T: rotate the rows of the
activation and those of the weight alike and nothing but the rounding changes. It spreads a channel that sticks out
over its whole group, and so it does with what all channels have in common. e4m3,
whose steps grow with the value, gains nothing from it. Relative L2 error of x q^T at K = 6,144, both sides quantized:

| data | int8 | int8, groups of 256 rotated | e4m3 |
|---|---|---|---|
| normal | 1.3e-2 | 1.3e-2 | 3.7e-2 |
| 1 % of the channels x 50 | 5.9e-2 | 1.3e-2 | 3.7e-2 |
| heavy tails | 4.9e-2 | 1.3e-2 | 3.7e-2 |
| after GELU | 1.5e-2 | 1.2e-2 | 3.8e-2 |

Memory: a byte a value and 4 bytes a row beside the input, which the kernel reads once. It gives the same bits as the
reference, rotated or not: the butterflies run in the same order, in fp32. On an H200, 75,888 x 6,144 bf16 values take
0.32 ms (4.3 TB/s, what a copy reaches), and 0.42 ms rotated in groups of 256.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .refused import by_rows, form, is_refused

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
FLOOR = 2.0**-100
"""The least amax a scale is made of: its inverse stays finite, and rows of zeros give zeros."""
BLOCK = 256
"""Channels the kernel lays out as 16 x 16, four stages of the rotation along each side."""


def _jit(function):
    return function if triton is None else triton.jit(function)


@functools.cache
def warn_once(message: str) -> None:
    logging.getLogger("solostep").warning(message)


def hadamard(x: Tensor, group: int) -> Tensor:
    """The orthonormal Walsh-Hadamard transform (Sylvester's order) of each `group` of contiguous channels, in fp32.

    `x` is `[..., K]`, K a multiple of `group`, which is a power of two; 1 is the identity. Raises ValueError otherwise.
    The stages run from neighbours to the widest stride: the kernels keep this order, and so these bits.
    """
    if group < 1 or group & (group - 1) or x.shape[-1] % group:
        raise ValueError(f"group must be a power of two that divides the {x.shape[-1]} channels of x, not {group}")
    y, stride = x.float(), 1
    while stride < group:
        a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return y if group == 1 else y * group**-0.5


def _signs(channels: int, device: torch.device) -> Tensor:
    """-1 where the low and the high four bits of a channel's number share an odd count of ones, else 1.

    A bent function of the eight bits (Maiorana-McFarland): its own transform is flat. So, then, is that of a constant,
    all of which would come out of one channel in 256 otherwise: inputs with a mean, such as GELU's, need it.
    """
    v = torch.arange(channels, device=device)
    v = v & (v >> 4) & 15
    v = v ^ (v >> 2)
    return 1.0 - 2.0 * ((v ^ (v >> 1)) & 1)


def rotate(x: Tensor, group: int) -> Tensor:
    """What `quantize_rows` does to `x` `[..., K]` before it rounds, in fp32: signs, then :func:`hadamard`."""
    return hadamard(x if group == 1 else x.float() * _signs(x.shape[-1], x.device), group)


def unrotate(y: Tensor, group: int) -> Tensor:
    """The `x` of which `y` is :func:`rotate`."""
    return hadamard(y, group) if group == 1 else hadamard(y, group) * _signs(y.shape[-1], y.device)


def quantize_rows_reference(x: Tensor, dtype: torch.dtype, group: int = 1) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` computes, in plain torch."""
    _check(x, dtype, group)
    y = rotate(x, group)
    amax = y.abs().amax(-1)
    scale = amax.clamp_min(FLOOR) / torch.full_like(amax, QMAX[dtype])  # by a number, CUDA multiplies by its inverse
    y = (y * scale.reciprocal()[..., None]).nan_to_num()
    q = (y.round() if dtype == torch.int8 else y).clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)
    return q, torch.where(amax < torch.inf, scale, torch.nan)


@_jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _butterflies(x, STRIDE: tl.constexpr):
    """One stage over elements `STRIDE` apart in the order of the tensor's elements."""
    y = tl.reshape(x, [x.numel // (2 * STRIDE), 2, STRIDE])
    a, b = tl.split(tl.permute(y, (0, 2, 1)))
    y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    return tl.reshape(y, x.shape)


@_jit
def _rotate(x, BITS: tl.constexpr):
    """`x` is [16, BLOCKS, 16]: bits 0 to 3 of the channel's number last, 4 to 7 first, the block's in the middle.

    The compiler keeps each thread's 16 values of one side together for four stages and transposes once, through shared
    memory, for the four of the other side.
    """
    if BITS > 0:  # the signs of rotate()
        v = tl.arange(0, 16)[:, None, None] & tl.arange(0, 16)[None, None, :]
        v = v ^ (v >> 2)
        # Not -x, which Triton makes 0 - x: a zero would lose its sign, and e4m3 its last bit of agreement.
        x = tl.where(((v ^ (v >> 1)) & 1) == 1, x * -1.0, x)
    for bit in tl.static_range(BITS):
        if bit < 4:
            x = _butterflies(x, 1 << bit)
        elif bit < 8:
            x = _butterflies(x, (x.numel // 16) << (bit - 4))
        else:
            x = _butterflies(x, 16 << (bit - 8))
    return x


@_jit
def _columns(BLOCKS: tl.constexpr):
    """The channels of a tile, in the layout that _rotate() takes."""
    high = tl.arange(0, 16)[:, None, None] * 16
    return tl.arange(0, BLOCKS)[None, :, None] * 256 + high + tl.arange(0, 16)[None, None, :]


@_jit
def _low_byte(y):
    """int8 of fp32 values of |y| <= 127 (1 + 2^-22), rounded half to even: no clamp.

    The low bits of 1.5 x 2^23 + 128 + y are the integer plus 128. The 128 is there to be taken out by an integer
    instruction: where a float's register is stored as a byte as it is, ptxas (12.8 to 13.0) may convert the float to
    u8 in place of taking its low bits, and all values come out as 255.
    """
    return ((y + 12583040.0).to(tl.int32, bitcast=True) ^ 128).to(tl.int8)


@_jit
def _store_quantized(
    values, row, q_ptr, scale_ptr, K,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rotates, scales, rounds and stores one row, which `values` holds in fp32, a tile each; beyond K they are zero."""
    rotated = ()
    for i in tl.static_range(TILES):
        y = _rotate(values[i], BITS)
        if BITS % 2:  # NORM is no power of two: its rounding belongs here
            y = y * NORM
        largest = tl.abs(y) if i == 0 else _nan_max(largest, tl.abs(y))  # noqa: F821
        rotated += (y,)
    amax = tl.reduce(tl.reshape(largest, [largest.numel]), 0, _nan_max)
    if BITS % 2 == 0:
        amax = amax * NORM
    scale = tl.div_rn(tl.maximum(amax, FLOOR), QMAX)
    inverse = tl.div_rn(1.0, scale)
    if BITS % 2 == 0:
        inverse = inverse * NORM
    tl.store(scale_ptr + row, tl.where(amax < float("inf"), scale, float("nan")))
    column = _columns(BLOCKS)
    for i in tl.static_range(TILES):
        columns = i * (BLOCKS * 256) + column
        y = rotated[i] * inverse
        if QMAX == 127.0:
            q = _low_byte(y)
        else:
            q = y.to(tl.float8e4nv)  # |y| <= 448 (1 + 2^-22) rounds to 448 at most
        if EVEN:
            tl.store(q_ptr + row * K + columns, q)
        else:
            tl.store(q_ptr + row * K + columns, q, mask=columns < K)


@_jit
def _quantize_row(
    row, x_ptr, q_ptr, scale_ptr, K, stride,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A row in registers: TILES tiles of BLOCKS x 256 channels."""
    column = _columns(BLOCKS)
    values = ()
    for i in tl.static_range(TILES):
        columns = i * (BLOCKS * 256) + column
        if EVEN:
            values += (tl.load(x_ptr + row * stride + columns).to(tl.float32),)
        else:
            values += (tl.load(x_ptr + row * stride + columns, mask=columns < K, other=0.0).to(tl.float32),)
    _store_quantized(values, row, q_ptr, scale_ptr, K, TILES, BLOCKS, BITS, NORM, QMAX, FLOOR, EVEN)


@_jit
def _quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, K, stride,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """One row a program, or many, one after the other (LOOP)."""
    if not LOOP:
        _quantize_row(tl.program_id(0).to(tl.int64), x_ptr, q_ptr, scale_ptr, K, stride, TILES, BLOCKS, BITS, NORM,
                      QMAX, FLOOR, EVEN)  # fmt: skip
    else:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            _quantize_row(tl.cast(index, tl.int64), x_ptr, q_ptr, scale_ptr, K, stride, TILES, BLOCKS, BITS, NORM,
                          QMAX, FLOOR, EVEN)  # fmt: skip


def _on_card(x: Tensor) -> bool:
    return x.is_cuda and triton is not None


def _has_kernel(name: str, x: Tensor) -> bool:
    """Whether an operator takes its kernel: on a card, where that was not found wrong."""
    return _on_card(x) and not is_refused(name, x.device)


def e4m3_missing(x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether an output is to be of a type that kernels on this card cannot write."""
    return dtype == torch.float8_e4m3fn and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9)


def _check(x: Tensor, dtype: torch.dtype, group: int) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., K] with K > 0, not {list(x.shape)}")
    if dtype not in QMAX:
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, not {dtype}")
    if group < 1 or group & (group - 1) or x.shape[-1] % group:
        raise ValueError(f"group must be a power of two that divides the {x.shape[-1]} channels of x, not {group}")


@functools.cache
def _plan(channels: int, group: int) -> dict[str, int]:
    """How a row is laid out: tiles, 256-channel blocks in each, warps; not to be changed.

    Extents are powers of two, so three quarters of one are three tiles (6,144 and 24,576 are).
    """
    blocks = 1 << (-(-channels // BLOCK) - 1).bit_length()
    tiles = 1
    if blocks >= 4 and channels <= 3 * blocks // 4 * BLOCK and group <= blocks // 4 * BLOCK:
        tiles, blocks = 3, blocks // 4
    per_warp = 64 * 32
    warps = min(16, 1 << max(0, -(-tiles * blocks * BLOCK // per_warp) - 1).bit_length())
    # Rows so wide that only two programs fit a multiprocessor: those stay there (a fifth faster on an H200).
    return {"TILES": tiles, "BLOCKS": blocks, "num_warps": warps, "LOOP": int(warps == 16)}


def _programs(rows: int, loop: int, x: Tensor) -> int:
    """Programs to start: one a row, or those that stay."""
    if not loop or not x.is_cuda:
        return rows
    return min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)


def _launch(x: Tensor, q: Tensor, scale: Tensor, group: int) -> None:
    """`x` and `q` [M, K] with contiguous channels, q without gaps between rows; `scale` [M]."""
    rows, channels = x.shape
    plan = _plan(channels, group)
    _quantize_rows_kernel[(_programs(rows, plan["LOOP"], x),)](
        x, q, scale, rows, channels, x.stride(0), BITS=group.bit_length() - 1, NORM=group**-0.5, QMAX=QMAX[q.dtype],
        FLOOR=FLOOR, EVEN=plan["TILES"] * plan["BLOCKS"] * BLOCK == channels, enable_fp_fusion=False, **plan,
    )  # fmt: skip


def quantize_rows(x: Tensor, dtype: torch.dtype, group: int = 1) -> tuple[Tensor, Tensor]:
    """Quantizes each row of `x` `[..., K]`: q `[..., K]` in `dtype`, and the scale `[...]` in fp32, y = q x scale.

    `dtype` is torch.int8 or torch.float8_e4m3fn. `group` channels at a time are rotated first (1: not at all); the
    caller rotates the other operand alike. A row that holds a NaN or an infinity, or that overflows in the rotation,
    gets NaN for a scale, and its q means nothing: the product's row is NaN, never finite and wrong. Raises ValueError
    on other types and on a group that is no power of two or does not divide K.
    """
    _check(x, dtype, group)
    missing = e4m3_missing(x, dtype)
    if missing or (x.is_cuda and triton is None):
        warn_once(f"quantize_rows: no kernel for {dtype} on this card, plain torch instead")
    if missing or not _has_kernel(f"quantize_rows {form(dtype)}", x):
        # Contiguous, as the kernel's results are.
        return by_rows(lambda rows: quantize_rows_reference(rows, dtype, group), x.contiguous())
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    q = torch.empty(rows.shape, dtype=dtype, device=x.device)
    scale = torch.empty(rows.shape[:1], dtype=torch.float32, device=x.device)
    if len(rows):
        with torch.cuda.device(x.device):
            _launch(rows, q, scale, group)
    return q.view(x.shape), scale.view(x.shape[:-1])

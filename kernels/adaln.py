"""What stands between the products of a block, in one pass over memory each: LayerNorm with modulation, the gated
residual, and tanh-GELU; the first and the last also straight to 8 bits, rotated where the next product wants it.

    layer_norm_modulate   y = norm(x) (1 + scale) + shift
    gate_residual         x = x + gate y, in place
    gelu                  y = gelu(x), in place, or to 8 bits

All of it is fp32 between the load and the store: one rounding where eager PyTorch has one for each operation. A row is
held in registers; 8-bit rows are those of quantize.py, but for the last bit of a tie, and rotated ones on a card for
the rounding of packed.py and of the card's tanh. On Hopper, those are of rows_hopper.py. Memory: the output.

On an H200, 75,888 x 6,144 bf16 values take 0.45 ms through the norm (98 % of a copy's rate), 0.36 to e4m3 (91 %), 0.35
to rotated int8 (94 %; 0.46 by the kernel here, 20 instructions a value), and as many through GELU 0.34 to rotated int8.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .cards import hopper_missing
from .packed import _fits, _rotated, _shift, _store_packed
from .quantize import (
    BLOCK,
    FLOOR,
    QMAX,
    _columns,
    _has_kernel,
    _jit,
    _on_card,
    _plan,
    _store_quantized,
    e4m3_missing,
    quantize_rows_reference,
)
from .refused import ROWS, by_rows, form

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

Quantized = tuple[Tensor, Tensor]
"""8-bit rows ``[S, d]`` and their fp32 scales ``[S]``."""


def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift in fp32, ``x [S, d]``, ``shift`` and ``scale [d]``."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()


def gelu_reference(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh")


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y in fp32, ``x`` and ``y [S, d]``, ``gate [d]``."""
    return x.float() + gate.float() * y.float()


@_jit
def _gelu(x, APPROXIMATE: tl.constexpr, COARSE: tl.constexpr):
    if COARSE:  # the card's tanh, right to 2^-11: far below a step of int8
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * (0.7978845608028654 + 0.035677408136300125 * (x * x))],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return half + half * tanh
    # tanh(u) = 1 - 2 / (1 + e^2u); where the exponential overflows, the quotient is zero, as it should be.
    u = x * (2.302208198144325 + 0.1029432397 * (x * x))  # in powers of two
    if APPROXIMATE:  # a reciprocal to one bit less than a division's, in a fifth of its instructions; no subnormals
        reciprocal = tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return x - x * reciprocal
    else:
        return x - x / (1.0 + tl.exp2(u))


@_jit
def _load_row(
    row, x_ptr, K, stride, TILES: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr
):
    """A row as it lies in memory, in the layout of the quantization kernel; WORDS: bf16 pairs, `x_ptr` of int32."""
    tiles = ()
    for i in tl.static_range(TILES):
        if WORDS:
            tiles += (tl.load(x_ptr + row * (stride // 2) + i * (BLOCKS * 128) + _word_columns(BLOCKS)),)
        elif EVEN:
            tiles += (tl.load(x_ptr + row * stride + i * (BLOCKS * 256) + _columns(BLOCKS)),)
        else:
            columns = i * (BLOCKS * 256) + _columns(BLOCKS)
            tiles += (tl.load(x_ptr + row * stride + columns, mask=columns < K, other=0.0),)
    return tiles


@_jit
def _word_columns(BLOCKS: tl.constexpr):
    high = tl.arange(0, 16)[:, None, None] * 8
    return tl.arange(0, BLOCKS)[None, :, None] * 128 + high + tl.arange(0, 8)[None, None, :]


@_jit
def _pair(x, WORDS: tl.constexpr):
    """The even and the odd channels of a loaded tile, in fp32."""
    if WORDS:
        return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], x.shape[1], 8, 2]))
        return low, high


@_jit
def _load_vector(ptr, i, K, BLOCKS: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr):
    if WORDS:
        return _pair(tl.load(ptr + i * (BLOCKS * 128) + _word_columns(BLOCKS)), True)
    elif EVEN:
        return _pair(tl.load(ptr + i * (BLOCKS * 256) + _columns(BLOCKS)), False)
    else:
        columns = i * (BLOCKS * 256) + _columns(BLOCKS)
        return _pair(tl.load(ptr + columns, mask=columns < K, other=0.0), False)


@_jit
def _add_both(a, b, c, d):
    return a + c, b + d


@_jit
def _statistics(lows, highs, K, TILES: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, ONE_PASS: tl.constexpr):
    """Mean and variance of a row.

    In one pass (one exchange between warps) where x has 16 bits: the cancellation in fp32, 2^-24 (mean / deviation)^2,
    is below what 16 bits lose in x itself, 2^-9 mean / deviation, until the mean is thousands of deviations.
    """
    for i in tl.static_range(TILES):
        both = lows[i] + highs[i]
        total = both if i == 0 else total + both  # noqa: F821
        if ONE_PASS:
            square = lows[i] * lows[i] + highs[i] * highs[i]
            squares = square if i == 0 else squares + square  # noqa: F821
    if ONE_PASS:
        total, squares = tl.reduce(
            (tl.reshape(total, [total.numel]), tl.reshape(squares, [total.numel])), 0, _add_both
        )  # fmt: skip
        mean = total / K
        return mean, tl.maximum(squares / K - mean * mean, 0.0)
    else:
        mean = tl.sum(tl.reshape(total, [total.numel]), 0) / K
        for i in tl.static_range(TILES):
            low, high = lows[i] - mean, highs[i] - mean
            square = low * low + high * high
            if not EVEN:
                columns = i * (BLOCKS * 256) + _word_columns(BLOCKS) * 2
                square = tl.where(columns < K, low * low, 0.0) + tl.where(columns + 1 < K, high * high, 0.0)
            squares = square if i == 0 else squares + square
        return mean, tl.sum(tl.reshape(squares, [squares.numel]), 0) / K


@_jit
def _values(
    tiles, shift_ptr, scale_ptr, K, eps, TILES: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    WORDS: tl.constexpr, VECTOR_WORDS: tl.constexpr, ONE_PASS: tl.constexpr, GELU: tl.constexpr,
    APPROXIMATE: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """What is to be stored, as even and odd channels in fp32; beyond K they are zero."""
    lows, highs = (), ()
    for i in tl.static_range(TILES):
        low, high = _pair(tiles[i], WORDS)
        lows += (low,)
        highs += (high,)
    evens, odds = (), ()
    if GELU:
        for i in tl.static_range(TILES):
            evens += (_gelu(lows[i], APPROXIMATE, COARSE),)
            odds += (_gelu(highs[i], APPROXIMATE, COARSE),)
    else:
        mean, variance = _statistics(lows, highs, K, TILES, BLOCKS, EVEN, ONE_PASS)
        inverse = tl.rsqrt(variance + eps)
        for i in tl.static_range(TILES):
            gain_low, gain_high = _load_vector(scale_ptr, i, K, BLOCKS, EVEN, VECTOR_WORDS)
            shift_low, shift_high = _load_vector(shift_ptr, i, K, BLOCKS, EVEN, VECTOR_WORDS)
            low = (lows[i] - mean) * (inverse + inverse * gain_low) + shift_low
            high = (highs[i] - mean) * (inverse + inverse * gain_high) + shift_high
            if not EVEN:
                columns = i * (BLOCKS * 256) + _word_columns(BLOCKS) * 2
                low, high = tl.where(columns < K, low, 0.0), tl.where(columns + 1 < K, high, 0.0)
            evens += (low,)
            odds += (high,)
    return evens, odds


@_jit
def _row(
    tiles, row, x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, VECTOR_WORDS: tl.constexpr, ONE_PASS: tl.constexpr,
    GELU: tl.constexpr, APPROXIMATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A loaded row to its end; QMAX 0 is an output that is not quantized, and PACKED one of int8, four to a word."""
    low, high = _values(tiles, shift_ptr, scale_ptr, K, eps, TILES, BLOCKS, EVEN, WORDS, VECTOR_WORDS, ONE_PASS, GELU,
                        APPROXIMATE, PACKED)  # fmt: skip
    if PACKED:
        words, bits = _rotated(low, high, TILES, BLOCKS)
        shift = 1.0
        if not _fits(bits):  # hardly ever: once more, from memory
            tiles = _load_row(row, x_ptr, K, stride, TILES, BLOCKS, EVEN, WORDS)
            low, high = _values(tiles, shift_ptr, scale_ptr, K, eps, TILES, BLOCKS, EVEN, WORDS, VECTOR_WORDS,
                                ONE_PASS, GELU, APPROXIMATE, PACKED)  # fmt: skip
            shift = _shift(low, high, TILES)
            lows, highs = (), ()
            for i in tl.static_range(TILES):
                lows += (low[i] * shift,)
                highs += (high[i] * shift,)
            words, bits = _rotated(lows, highs, TILES, BLOCKS)
        _store_packed(words, bits, shift, row, out_ptr, out_scale_ptr, K, TILES, BLOCKS)
    else:
        done = ()
        for i in tl.static_range(TILES):
            done += (tl.reshape(tl.join(low[i], high[i]), [16, BLOCKS, 16]),)
        if QMAX == 0.0:
            for i in tl.static_range(TILES):
                columns = i * (BLOCKS * 256) + _columns(BLOCKS)
                y = done[i].to(out_ptr.dtype.element_ty)
                if EVEN:
                    tl.store(out_ptr + row * K + columns, y)
                else:
                    tl.store(out_ptr + row * K + columns, y, mask=columns < K)
        else:
            _store_quantized(done, row, out_ptr, out_scale_ptr, K, TILES, BLOCKS, BITS, NORM, QMAX, FLOOR, EVEN)


@_jit
def _row_kernel(
    x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, VECTOR_WORDS: tl.constexpr, ONE_PASS: tl.constexpr,
    GELU: tl.constexpr, APPROXIMATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles = _load_row(row, x_ptr, K, stride, TILES, BLOCKS, EVEN, WORDS)
    _row(tiles, row, x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps, TILES, BLOCKS, BITS, NORM,
         QMAX, FLOOR, EVEN, WORDS, VECTOR_WORDS, ONE_PASS, GELU, APPROXIMATE, PACKED)  # fmt: skip


@_jit
def _gate_residual_kernel(x_ptr, y_ptr, gate_ptr, count, K, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    x = tl.load(x_ptr + at, mask=keep).to(tl.float32)
    y = tl.load(y_ptr + at, mask=keep).to(tl.float32)
    gate = tl.load(gate_ptr + at % K, mask=keep).to(tl.float32)
    tl.store(x_ptr + at, (x + gate * y).to(x_ptr.dtype.element_ty), mask=keep)


def _rows(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.stride(1) != 1 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point [S, d] with channels side by side, not {list(x.shape)}")


def _vector(name: str, v: Tensor, d: int) -> None:
    if v.shape != (d,) or not v.is_contiguous():
        raise ValueError(f"{name} must be a contiguous [{d}], not {list(v.shape)}")


def _words(x: Tensor | None) -> bool:
    """Whether a tensor of bf16 can be read two values at a time."""
    if x is None or x.dtype != torch.bfloat16 or x.data_ptr() % 4:
        return False
    return x.ndim == 1 or x.stride(0) % 2 == 0


def _registers_are_known(x: Tensor) -> bool:
    """Whether the card is of the kind that limits on registers were measured on; others may have to spill."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


@functools.cache
def _row_plan(
    channels: int, group: int, gelu: bool, packed: bool, quantized: bool, limited: bool = True
) -> dict[str, int]:
    """The layout of quantize._plan(), one row a program; warps, and with ``limited`` registers, as measured at 6,144
    and 24,576 on an H200. Not to be changed."""
    plan = {key: n for key, n in _plan(channels, group).items() if key != "LOOP"}
    if packed and not gelu:  # fewer threads with more of the row each: they wait for one another in the rotation
        plan["num_warps"] = max(1, plan["num_warps"] // 2)
    elif not limited:
        return plan
    elif plan["num_warps"] == 16:
        plan["maxnreg"] = 64  # two programs on a multiprocessor
    elif quantized and plan["TILES"] * plan["BLOCKS"] * BLOCK <= 48 * 32 * plan["num_warps"]:
        plan["maxnreg"] = 72
    return plan


@functools.cache
def _tensor_cores(device: torch.device) -> bool:
    """Whether rotated rows take the kernel of rows_hopper.py."""
    return hopper_missing(device, ".rows_hopper") is None


def _run_rotated(
    x: Tensor, out: Tensor, out_scale: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> bool:
    """Runs the kernel of rows_hopper.py; False where it is not for these rows or this card."""
    if out_scale is None or not _tensor_cores(x.device):
        return False
    from . import rows_hopper

    plan = rows_hopper.plan_for(x, gelu=shift is None)
    if plan is None:
        return False
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    rows_hopper.launch(x, out, out_scale, shift, scale, eps, plan, processors)
    return True


def _run_rows(
    x: Tensor, out: Tensor, out_scale: Tensor | None, group: int, shift: Tensor | None, scale: Tensor | None,
    eps: float, plan: dict[str, int] | None = None,
) -> None:  # fmt: skip
    rows, channels = x.shape
    layout = _plan(channels, group)
    even = layout["TILES"] * layout["BLOCKS"] * BLOCK == channels
    packed = _on_card(x) and even and out.dtype == torch.int8 and group == 256
    if packed and plan is None and _run_rotated(x, out, out_scale, shift, scale, eps):
        return
    plan = plan or _row_plan(
        channels, group, shift is None, packed, out.dtype in QMAX, _registers_are_known(x)
    )  # fmt: skip
    words = even and _words(x)
    vectors = even and _words(shift) and _words(scale)
    _row_kernel[(rows,)](
        x.view(torch.int32) if words else x, out.view(torch.int32) if packed else out, out_scale,
        shift.view(torch.int32) if vectors else shift, scale.view(torch.int32) if vectors else scale,
        channels, x.stride(0), eps, BITS=group.bit_length() - 1, NORM=group**-0.5, QMAX=QMAX.get(out.dtype, 0.0),
        FLOOR=FLOOR, EVEN=even, WORDS=words, VECTOR_WORDS=vectors, ONE_PASS=x.element_size() == 2, GELU=shift is None,
        APPROXIMATE=_on_card(x), PACKED=packed, enable_fp_fusion=True, **plan,
    )  # fmt: skip


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None, group: int = 1
) -> Tensor | Quantized:
    """norm(x) (1 + scale) + shift for rows ``x [S, d]``; ``shift`` and ``scale [d]``.

    ``dtype`` int8 or float8_e4m3fn gives quantized rows and their scales, ``group`` channels rotated together; any
    other (default: that of x) gives one tensor.
    """
    _rows("x", x)
    _vector("shift", shift, x.shape[1])
    _vector("scale", scale, x.shape[1])
    dtype = x.dtype if dtype is None else dtype
    if e4m3_missing(x, dtype) or not _has_kernel(f"layer_norm_modulate {form(dtype)}", x):

        def plain(rows: Tensor) -> Tensor | Quantized:
            y = layer_norm_modulate_reference(rows, shift, scale, eps)
            return quantize_rows_reference(y, dtype, group) if dtype in QMAX else y.to(dtype)

        return by_rows(plain, x)
    return launch(x, dtype, group, shift, scale, eps)


def gelu(x: Tensor, *, dtype: torch.dtype | None = None, group: int = 1) -> Tensor | Quantized:
    """tanh-GELU of rows ``x [S, d]``: in place if ``dtype`` is None, or quantized as in layer_norm_modulate()."""
    _rows("x", x)
    if e4m3_missing(x, dtype) or not _has_kernel(f"gelu {form(dtype or x.dtype)}", x):
        if dtype is None:
            by_rows(lambda rows: rows.copy_(gelu_reference(rows)), x)
            return x
        return by_rows(lambda rows: quantize_rows_reference(gelu_reference(rows), dtype, group), x)
    return launch(x, dtype or x.dtype, group, None, None, 0.0, in_place=dtype is None and x.is_contiguous())


def launch(
    x: Tensor, dtype: torch.dtype, group: int, shift: Tensor | None, scale: Tensor | None, eps: float,
    in_place: bool = False, plan: dict[str, int] | None = None,
) -> Tensor | Quantized:  # fmt: skip
    """The row kernel on checked arguments (also under Triton's interpreter); GELU without ``shift``."""
    out = x if in_place else torch.empty(x.shape, dtype=dtype, device=x.device)
    out_scale = torch.empty(len(x), dtype=torch.float32, device=x.device) if dtype in QMAX else None
    if len(x):
        _run_rows(x, out, out_scale, group, shift, scale, eps, plan)
    return out if out_scale is None else (out, out_scale)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, written over ``x``: all of ``[S, d]``, ``gate [d]``; rounded once."""
    _rows("x", x)
    _vector("gate", gate, x.shape[1])
    if y.shape != x.shape or not x.is_contiguous() or not y.is_contiguous():
        raise ValueError(f"x and y must be contiguous and of one shape, not {list(x.shape)} and {list(y.shape)}")
    if not _has_kernel("gate_residual", x):
        for part, more in zip(x.split(ROWS), y.split(ROWS), strict=True):
            part.copy_(gate_residual_reference(part, more, gate))
        return x
    launch_gate(x, y, gate)
    return x


def launch_gate(x: Tensor, y: Tensor, gate: Tensor) -> None:
    if x.numel():
        _gate_residual_kernel[(triton.cdiv(x.numel(), 2048),)](
            x, y, gate, x.numel(), x.shape[1], BLOCK=2048, num_warps=8
        )

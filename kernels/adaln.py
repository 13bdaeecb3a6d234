"""What stands between the products of a block, in one pass over memory each: LayerNorm with modulation, the gated
residual, and tanh-GELU; the first and the last also straight to 8 bits, rotated where the next product wants it.

    layer_norm_modulate   y = norm(x) (1 + scale) + shift
    gate_residual         x = x + gate y, in place
    gelu                  y = gelu(x), in place, or to 8 bits

All of it is fp32 between the load and the store: one rounding where eager PyTorch has one for each operation. A row is
held in registers; 8-bit rows are those of quantize.py, but for the last bit of a tie, and rotated ones on a card for
the rounding of packed.py. Memory: the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import _store_packed
from .quantize import BLOCK, FLOOR, QMAX, _columns, _jit, _plan, _programs, _store_quantized, quantize_rows_reference

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


@_jit
def _gelu(x, APPROXIMATE: tl.constexpr):
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
def _row(
    row, x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr, GELU: tl.constexpr, APPROXIMATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A row in registers, in the layout of the quantization kernel; QMAX 0 is an output that is not quantized, and
    PACKED one of int8, four to a word."""
    column = _columns(BLOCKS)
    values = ()
    total = 0.0
    for i in tl.static_range(TILES):
        columns = i * (BLOCKS * 256) + column
        if EVEN:
            x = tl.load(x_ptr + row * stride + columns).to(tl.float32)
        else:
            x = tl.load(x_ptr + row * stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        values += (x,)
        if not GELU:
            total += tl.sum(tl.reshape(x, [x.numel]), 0)
    done = ()
    if GELU:
        for i in tl.static_range(TILES):
            done += (_gelu(values[i], APPROXIMATE),)
    else:
        mean = total / K
        squares = 0.0
        for i in tl.static_range(TILES):
            columns = i * (BLOCKS * 256) + column
            centred = values[i] - mean
            if not EVEN:
                centred = tl.where(columns < K, centred, 0.0)
            squares += tl.sum(tl.reshape(centred * centred, [centred.numel]), 0)
        inverse = tl.rsqrt(squares / K + eps)
        for i in tl.static_range(TILES):
            columns = i * (BLOCKS * 256) + column
            if EVEN:
                gain = inverse + inverse * tl.load(scale_ptr + columns).to(tl.float32)
                shift = tl.load(shift_ptr + columns).to(tl.float32)
                done += ((values[i] - mean) * gain + shift,)
            else:
                gain = inverse + inverse * tl.load(scale_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
                done += (tl.where(columns < K, (values[i] - mean) * gain + shift, 0.0),)
    if QMAX == 0.0:
        for i in tl.static_range(TILES):
            columns = i * (BLOCKS * 256) + column
            y = done[i].to(out_ptr.dtype.element_ty)
            if EVEN:
                tl.store(out_ptr + row * K + columns, y)
            else:
                tl.store(out_ptr + row * K + columns, y, mask=columns < K)
    elif PACKED:
        _store_packed(done, row, out_ptr, out_scale_ptr, K, TILES, BLOCKS)
    else:
        _store_quantized(done, row, out_ptr, out_scale_ptr, K, TILES, BLOCKS, BITS, NORM, QMAX, FLOOR, EVEN)


@_jit
def _row_kernel(
    x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, rows, K, stride, eps,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, EVEN: tl.constexpr, LOOP: tl.constexpr, GELU: tl.constexpr, APPROXIMATE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One row a program, or many, one after the other (LOOP)."""
    if not LOOP:
        _row(tl.program_id(0).to(tl.int64), x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps,
             TILES, BLOCKS, BITS, NORM, QMAX, FLOOR, EVEN, GELU, APPROXIMATE, PACKED)  # fmt: skip
    else:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            _row(tl.cast(index, tl.int64), x_ptr, out_ptr, out_scale_ptr, shift_ptr, scale_ptr, K, stride, eps,
                 TILES, BLOCKS, BITS, NORM, QMAX, FLOOR, EVEN, GELU, APPROXIMATE, PACKED)  # fmt: skip


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


def _run_rows(
    x: Tensor, out: Tensor, out_scale: Tensor | None, group: int, shift: Tensor | None, scale: Tensor | None, eps: float
) -> None:
    rows, channels = x.shape
    plan = _plan(channels, group)
    even = plan["TILES"] * plan["BLOCKS"] * BLOCK == channels
    packed = _on_card(x) and even and out.dtype == torch.int8 and group == 256
    if shift is not None or packed:  # fewer threads with more of the row each: 8 % faster at 6,144 on an H200
        plan |= {"num_warps": max(1, plan["num_warps"] // 2), "LOOP": 0}
    _row_kernel[(_programs(rows, plan["LOOP"], x),)](
        x, out.view(torch.int32) if packed else out, out_scale, shift, scale, rows, channels, x.stride(0), eps,
        BITS=group.bit_length() - 1, NORM=group**-0.5, QMAX=QMAX.get(out.dtype, 0.0), FLOOR=FLOOR,
        EVEN=even, GELU=shift is None, APPROXIMATE=_on_card(x), PACKED=packed,
        enable_fp_fusion=True, **plan,
    )  # fmt: skip


def _on_card(x: Tensor) -> bool:
    return x.is_cuda and triton is not None


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
    if not _on_card(x):
        y = layer_norm_modulate_reference(x, shift, scale, eps)
        return quantize_rows_reference(y, dtype, group) if dtype in QMAX else y.to(dtype)
    return launch(x, dtype, group, shift, scale, eps)


def gelu(x: Tensor, *, dtype: torch.dtype | None = None, group: int = 1) -> Tensor | Quantized:
    """tanh-GELU of rows ``x [S, d]``: in place if ``dtype`` is None, or quantized as in layer_norm_modulate()."""
    _rows("x", x)
    if not _on_card(x):
        y = gelu_reference(x)
        return x.copy_(y) if dtype is None else quantize_rows_reference(y, dtype, group)
    return launch(x, dtype or x.dtype, group, None, None, 0.0, in_place=dtype is None and x.is_contiguous())


def launch(
    x: Tensor, dtype: torch.dtype, group: int, shift: Tensor | None, scale: Tensor | None, eps: float,
    in_place: bool = False,
) -> Tensor | Quantized:  # fmt: skip
    """The row kernel on checked arguments (also under Triton's interpreter); GELU without ``shift``."""
    out = x if in_place else torch.empty(x.shape, dtype=dtype, device=x.device)
    out_scale = torch.empty(len(x), dtype=torch.float32, device=x.device) if dtype in QMAX else None
    if len(x):
        _run_rows(x, out, out_scale, group, shift, scale, eps)
    return out if out_scale is None else (out, out_scale)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, written over ``x``: all of ``[S, d]``, ``gate [d]``; rounded once."""
    _rows("x", x)
    _vector("gate", gate, x.shape[1])
    if y.shape != x.shape or not x.is_contiguous() or not y.is_contiguous():
        raise ValueError(f"x and y must be contiguous and of one shape, not {list(x.shape)} and {list(y.shape)}")
    if not _on_card(x):
        return x.copy_(x.float() + gate.float() * y.float())
    launch_gate(x, y, gate)
    return x


def launch_gate(x: Tensor, y: Tensor, gate: Tensor) -> None:
    if x.numel():
        _gate_residual_kernel[(triton.cdiv(x.numel(), 2048),)](
            x, y, gate, x.numel(), x.shape[1], BLOCK=2048, num_warps=8
        )

"""Group norm with SiLU on ``[T, B, H, W, C]``, forward and backward, as Triton kernels.

PyTorch's CUDA group norm works on channels-first memory: on channels-last tensors it copies its input and output, and
SiLU is one more pass. Here the forward reads the input twice and writes once, the backward reads twice and writes
once. Statistics are fp32 sums per channel; the few numbers per group are combined by PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..models.vae import GROUPS

ROWS = 64
"""Pixels of a frame that one program handles at once."""
CHUNK = 1024
"""Pixels of a frame whose sums one program takes."""


@triton.jit
def _sums_kernel(x_ptr, dy_ptr, a_ptr, b_ptr, out_ptr, pixels, chunks, C: tl.constexpr, ROWS: tl.constexpr,
                 CHUNK: tl.constexpr, BACKWARD: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Per frame, chunk and channel: sums of x and x^2, or in the backward of dz and dz x."""
    frame, chunk = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, C)
    first = tl.zeros([C], tl.float32)
    second = tl.zeros([C], tl.float32)
    if BACKWARD:
        a = tl.load(a_ptr + frame * C + column)
        b = tl.load(b_ptr + frame * C + column)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        place = (frame.to(tl.int64) * pixels + row[:, None]) * C + column[None, :]
        inside = (row < pixels)[:, None]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            dz = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if SILU:
                z = x * a[None, :] + b[None, :]
                s = 1.0 / (1.0 + tl.exp(-z))
                dz = dz * s * (1.0 + z * (1.0 - s))
            first += tl.sum(dz, axis=0)
            second += tl.sum(dz * x, axis=0)
        else:
            first += tl.sum(x, axis=0)
            second += tl.sum(x * x, axis=0)
    out = out_ptr + (frame * chunks + chunk) * 2 * C + column
    tl.store(out, first)
    tl.store(out + C, second)


@triton.jit
def _apply_kernel(x_ptr, dy_ptr, a_ptr, b_ptr, p_ptr, q_ptr, r_ptr, out_ptr, pixels, C: tl.constexpr,
                  ROWS: tl.constexpr, BACKWARD: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Forward: silu(a x + b). Backward: p dz + q x + r. All factors are per frame and channel."""
    frame, block = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, C)
    row = block * ROWS + tl.arange(0, ROWS)
    place = (frame.to(tl.int64) * pixels + row[:, None]) * C + column[None, :]
    inside = (row < pixels)[:, None]
    at = frame * C + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    z = x * tl.load(a_ptr + at)[None, :] + tl.load(b_ptr + at)[None, :]
    if BACKWARD:
        out = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            s = 1.0 / (1.0 + tl.exp(-z))
            out = out * s * (1.0 + z * (1.0 - s))
        out = out * tl.load(p_ptr + at)[None, :] + x * tl.load(q_ptr + at)[None, :] + tl.load(r_ptr + at)[None, :]
    else:
        out = z
        if SILU:
            out = z / (1.0 + tl.exp(-z))
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def _sums(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, backward: bool, silu: bool) -> tuple[Tensor, Tensor]:
    frames, channels = x.shape[0] * x.shape[1], x.shape[-1]
    pixels = x.shape[2] * x.shape[3]
    chunks = triton.cdiv(pixels, CHUNK)
    out = torch.empty(frames, chunks, 2, channels, device=x.device, dtype=torch.float32)
    _sums_kernel[(frames, chunks)](
        x, dy, a, b, out, pixels, chunks, C=channels, ROWS=ROWS, CHUNK=CHUNK, BACKWARD=backward, SILU=silu, num_warps=8
    )
    first, second = out.sum(dim=1).unbind(1)
    return first, second


def _apply(x: Tensor, dy: Tensor, factors: list[Tensor], backward: bool, silu: bool) -> Tensor:
    frames, channels = x.shape[0] * x.shape[1], x.shape[-1]
    pixels = x.shape[2] * x.shape[3]
    out = torch.empty_like(x)
    _apply_kernel[(frames, triton.cdiv(pixels, ROWS))](
        x, dy, *factors, out, pixels, C=channels, ROWS=ROWS, BACKWARD=backward, SILU=silu, num_warps=8
    )
    return out


def _spread(values: Tensor, channels: int) -> Tensor:
    """Per group ``[N, G]`` -> per channel ``[N, C]``."""
    return values.repeat_interleave(channels // GROUPS, dim=1)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        x = x.contiguous()
        channels = x.shape[-1]
        count = x.shape[2] * x.shape[3] * (channels // GROUPS)
        scale, shift = weight.float(), bias.float()
        first, second = _sums(x, x, scale, shift, False, silu)
        mean = first.unflatten(1, (GROUPS, -1)).sum(2) / count
        variance = (second.unflatten(1, (GROUPS, -1)).sum(2) / count - mean.square()).clamp(min=0)
        rstd = torch.rsqrt(variance + eps)
        wide_mean, wide_rstd = _spread(mean, channels), _spread(rstd, channels)
        a = wide_rstd * scale
        b = shift - wide_mean * a
        ctx.save_for_backward(x, a, b, wide_mean, wide_rstd, scale)
        ctx.silu, ctx.count, ctx.dtype = silu, count, weight.dtype
        return _apply(x, x, [a, b, a, a, a], False, silu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd, scale = ctx.saved_tensors
        dy = grads[0].contiguous()
        channels = x.shape[-1]
        first, second = _sums(x, dy, a, b, True, ctx.silu)
        normed = rstd * (second - mean * first)  # sum of dz times the normalised x
        by_group = torch.stack([first * scale, normed * scale]).unflatten(2, (GROUPS, -1)).sum(3) / ctx.count
        plain, along = _spread(by_group[0], channels), _spread(by_group[1], channels)
        q = -rstd * rstd * along
        r = -rstd * plain - q * mean
        dx = _apply(x, dy, [a, b, a, q, r], True, ctx.silu)
        return dx, normed.sum(0).to(ctx.dtype), first.sum(0).to(ctx.dtype), None, None


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Group norm (32 groups) of each frame of ``x [T, B, H, W, C]``, then SiLU if asked; C a power of two."""
    return _NormSilu.apply(x, weight, bias, eps, silu)

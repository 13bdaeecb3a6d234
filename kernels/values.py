"""V for attention with 8-bit P V: e4m3, transposed, its keys in the order that the tensor cores take P in.

    v8[h, c, place(s)] = e4m3((v[s, h, c] - mean[h, c]) / scale[h, c]),   scale = max over s of |v - mean| / 448

Softmax weights sum to one, so a mean may be taken out of V before it is rounded and added to the output. What is added
is not the mean itself but mean(v) - mean(scale x v8): bf16 V does not feel a shift below its own steps, and so a part
of the mean stays in the rounded values. With this a uniform attention gives V's mean exactly.

Two passes over V where the qkv product left it, the first for sums and ranges: 2 x 2 bytes a value in, 1 out, and a
few numbers for every 128 tokens. Sums are in a fixed order: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import FLOOR, QMAX

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
E4M3 = torch.float8_e4m3fn
TOKENS = 128
"""Tokens of one program of the second pass."""
CHUNK = 1024
"""Tokens of one program of the first."""


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

    @triton.jit(do_not_specialize=["S"])  # for one token, Triton 3.6 gave sums that were no numbers
    def _quantize_v_kernel(
        v_ptr, q_ptr, sums_ptr, mean_ptr, scale_ptr, S, S16, row_stride, head_stride, BLOCK: tl.constexpr,
    ):  # fmt: skip
        head, block = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, 128)
        place = tl.arange(0, BLOCK)
        # The key that comes to a place: bits h q1 q0 i of its number stand there as q1 q0 h i.
        key = (place & ~14) | ((place & 2) << 2) | ((place & 12) >> 1)
        rows = block * BLOCK + key
        keep = (rows < S)[:, None]
        at = v_ptr + rows.to(tl.int64)[:, None] * row_stride + head * head_stride + c[None, :]
        x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + head * 128 + c))
        y = (x - tl.load(mean_ptr + head * 128 + c)[None, :]) * inverse[None, :]
        q = tl.where(keep, tl.minimum(tl.maximum(y, -448.0), 448.0), 0.0).to(tl.float8e4nv)
        tl.store(sums_ptr + (head * tl.num_programs(1) + block) * 128 + c, tl.sum(q.to(tl.float32), 0))
        places = block * BLOCK + place
        to = q_ptr + (head * 128 + c).to(tl.int64)[:, None] * S16 + places[None, :]
        tl.store(to, tl.trans(q), mask=(places < S16)[None, :])


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


def launch(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, on a checked argument (also under Triton's interpreter)."""
    tokens, heads, _ = v.shape
    stats = torch.empty(heads, -(-tokens // CHUNK), 3, HEAD_DIM, device=v.device)
    _ranges_kernel[(heads, stats.shape[1])](
        v, stats, tokens, v.stride(0), v.stride(1), CHUNK=CHUNK, ROWS=32, num_warps=4
    )
    mean = stats[:, :, 0].sum(1) / tokens
    amax = torch.maximum(stats[:, :, 2].amax(1) - mean, mean - stats[:, :, 1].amin(1))
    scale = amax.clamp_min(FLOOR) / torch.full_like(amax, QMAX[E4M3])  # by a number, CUDA multiplies by its inverse
    padded, blocks = -(-tokens // 16) * 16, -(-tokens // TOKENS)
    q = torch.empty(heads, HEAD_DIM, padded, dtype=E4M3, device=v.device)
    sums = torch.empty(heads, blocks, HEAD_DIM, device=v.device)
    _quantize_v_kernel[(heads, blocks)](
        v, q, sums, mean, scale, tokens, padded, v.stride(0), v.stride(1), BLOCK=TOKENS, num_warps=4
    )
    return q, scale, mean - scale * (sums.sum(1) / tokens)

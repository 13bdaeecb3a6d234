"""Two causal attentions that never hold their S x S scores: Step-LLM's, biased by distance, and the VAE's wide head.

Both keep scores, bias, softmax and sums in fp32 with an exact running maximum, and round P, to the type of v, and the
result once each. Keys that no query of a tile sees are not read. Memory beside inputs and output: none.

Step-LLM: softmax(q k / sqrt(D) - slope_head sqrt(i - j)) over j <= i, the public form in stepfun-ai/Step-Audio. In bf16
that form rounds the bias to bf16 (by up to 0.03 where it is 8 to 15); so does the kernel. Scores are not rounded.

VAE: one head of 512 channels; a query sees the keys up to the end of its own run of `frame_tokens` tokens. The released
VAE is causal token by token (`frame_tokens` 1), inside frames as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention_triton import Tile, tile_for
from .refused import is_refused

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

TYPES = (torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 64, 128)
WIDE = 512
"""Channels of the VAE's head."""
BIASED, FRAMES = "biased causal attention", "512-wide causal attention"
"""Their names in refused.py."""


# Shared memory is what bounds them: 163 KiB on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on sm_90 and sm_100.
WIDE_TILES = {
    80: Tile(64, 32, 8, 2),
    86: Tile(32, 32, 8, 2),
    90: Tile(64, 32, 8, 2),
    120: Tile(32, 32, 8, 2),
}


def biased_causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """What :func:`biased_causal_attention` computes, in plain torch: fp32 ``[S, H, D]``, not rounded."""
    position = torch.arange(len(q), dtype=torch.float32, device=q.device)
    distance = position[:, None] - position
    bias = (-slopes[:, None, None] * distance.clamp(min=0).sqrt()).to(q.dtype).float()
    keys, values = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("shd,lhd->hsl", q.float(), keys) * q.shape[2] ** -0.5 + bias
    return torch.einsum("hsl,lhd->shd", scores.masked_fill(distance < 0, -torch.inf).softmax(-1), values)


def frame_causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, frame_tokens: int = 1, scale: float | None = None
) -> Tensor:
    """What :func:`frame_causal_attention` computes, in plain torch: fp32 ``[B, S, D]``, not rounded."""
    frame = torch.arange(q.shape[1], device=q.device) // frame_tokens
    scores = q.float() @ k.float().transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    return scores.masked_fill(frame[:, None] < frame, -torch.inf).softmax(-1) @ v.float()


if triton is not None:

    @triton.jit(do_not_specialize=["S"])
    def _biased_kernel(
        q_ptr, k_ptr, v_ptr, slopes_ptr, out_ptr, S, scale, heads_per_group,
        q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
        BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        log2e: tl.constexpr = 1.4426950408889634
        head = tl.program_id(1).to(tl.int64)
        # The last queries see the most keys: first.
        row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
        rows = row0 + tl.arange(0, BM)
        c = tl.arange(0, D)
        inside = rows[:, None] < S
        q_at = rows.to(tl.int64)[:, None] * q_row + c[None, :]
        q = tl.load(q_ptr + head * q_head + q_at, mask=inside, other=0.0)
        k_ptr += head // heads_per_group * k_head
        v_ptr += head // heads_per_group * v_head
        slope = tl.load(slopes_ptr + head)
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        o = tl.zeros([BM, D], tl.float32)
        for start in range(0, tl.minimum(row0 + BM, S), BN):
            keys = start + tl.arange(0, BN)
            at = keys.to(tl.int64)
            k = tl.load(k_ptr + at[None, :] * k_row + c[:, None], mask=keys[None, :] < S, other=0.0)
            v = tl.load(v_ptr + at[:, None] * v_row + c[None, :], mask=keys[:, None] < S, other=0.0)
            distance = rows[:, None] - keys[None, :]
            root = tl.sqrt_rn(tl.maximum(distance, 0).to(tl.float32))
            bias = (root * -slope).to(q.dtype).to(tl.float32)
            x = tl.dot(q, k) * scale + bias
            x = tl.where(distance >= 0, x * log2e, float("-inf"))
            # Key 0 is in the first tile and every query sees it: the maximum is finite from then on.
            m_new = tl.maximum(m_i, tl.max(x, 1))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(x - m_new[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, o * alpha[:, None])
            m_i = m_new
        o = o * (1.0 / l_i)[:, None]
        out_at = rows.to(tl.int64)[:, None] * out_row + c[None, :]
        tl.store(out_ptr + head * out_head + out_at, o.to(q.dtype), mask=inside)

    @triton.jit(do_not_specialize=["S", "frame_tokens"])
    def _wide_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, S, frame_tokens, scale,
        q_batch, q_row, k_batch, k_row, v_batch, v_row, out_batch, out_row,
        BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(1).to(tl.int64)
        # The last queries see the most keys: first.
        row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
        rows = row0 + tl.arange(0, BM)
        c = tl.arange(0, D)
        inside = rows[:, None] < S
        q_ptr += batch * q_batch + row0.to(tl.int64) * q_row
        q = tl.load(q_ptr + tl.arange(0, BM)[:, None] * q_row + c[None, :], mask=inside, other=0.0)
        # Offsets within a tile are kept in 32 bits.
        in_tile = tl.arange(0, BN)
        k_ptr += batch * k_batch
        v_ptr += batch * v_batch
        k_at = in_tile[None, :] * k_row + c[:, None]
        v_at = in_tile[:, None] * v_row + c[None, :]
        # A query sees the keys before this one; rows beyond S, which are not stored, see what row S - 1 does.
        limit = tl.minimum(S, (rows // frame_tokens + 1) * frame_tokens)
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        o = tl.zeros([BM, D], tl.float32)
        for start in range(0, tl.max(limit, 0), BN):
            at = tl.cast(start, tl.int64)
            keys = start + in_tile
            k = tl.load(k_ptr + at * k_row + k_at, mask=keys[None, :] < S, other=0.0)
            v = tl.load(v_ptr + at * v_row + v_at, mask=keys[:, None] < S, other=0.0)
            x = tl.where(keys[None, :] < limit[:, None], tl.dot(q, k) * scale, float("-inf"))
            # Key 0 is in the first tile and every query sees it: the maximum is finite from then on.
            m_new = tl.maximum(m_i, tl.max(x, 1))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(x - m_new[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, o * alpha[:, None])
            m_i = m_new
        o = o * (1.0 / l_i)[:, None]
        out_ptr += batch * out_batch + row0.to(tl.int64) * out_row
        tl.store(out_ptr + tl.arange(0, BM)[:, None] * out_row + c[None, :], o.to(q.dtype), mask=inside)


def has_biased_kernel(x: Tensor, width: int) -> bool:
    """Whether :func:`biased_causal_attention` has a kernel for activations like ``x`` and heads of this width."""
    return _has_kernel(x, BIASED) and width in WIDTHS


def has_wide_kernel(x: Tensor, channels: int) -> bool:
    """Whether :func:`frame_causal_attention` has a kernel for activations like ``x`` of so many channels."""
    return _has_kernel(x, FRAMES) and channels == WIDE


def _has_kernel(x: Tensor, name: str) -> bool:
    card = x.is_cuda and triton is not None and not is_refused(name, x.device)
    return card and x.dtype in TYPES and torch.cuda.get_device_capability(x.device) >= (8, 0)


def biased_causal_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, out: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(D) - slope sqrt(i - j)) v over j <= i: ``q [S, H, D]``, ``k, v [S, G, D]`` -> ``[S, H, D]``.

    Group g of k and v serves the query heads g H / G ... (g + 1) H / G - 1. The bias is rounded to the type of q before
    it is added, as in the official form. On the CPU it is :func:`biased_causal_attention_reference`, rounded.

    Args:
        q, k, v: bf16 or fp16, D one of 16, 32, 64 and 128. Tokens and heads may lie apart, channels lie side by side.
        slopes: fp32 ``[H]``.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check("[S, H, D] and [S, G, D]", q, k, v, out)
    if q.shape[2] not in WIDTHS or q.shape[1] % k.shape[1] or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"heads have to be {WIDTHS} wide and whole groups, not {list(q.shape)} and {list(k.shape)}")
    if slopes.shape != q.shape[1:2] or slopes.dtype != torch.float32 or slopes.device != q.device:
        raise ValueError(f"slopes has to be fp32 [{q.shape[1]}] on {q.device}, not {slopes.dtype} {list(slopes.shape)}")
    slopes = slopes.contiguous()
    if not q.is_cuda or triton is None:
        return out.copy_(biased_causal_attention_reference(q, k, v, slopes))
    with torch.cuda.device(q.device):
        return launch_biased(q, k, v, slopes, out)


def launch_biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, out: Tensor) -> Tensor:
    """The kernel, on checked arguments (also under Triton's interpreter)."""
    length, heads, width = q.shape
    _biased_kernel[(triton.cdiv(length, 64), heads)](
        q, k, v, slopes, out, length, width**-0.5, heads // k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        BM=64, BN=32, D=width, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def frame_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, frame_tokens: int = 1, scale: float | None = None, out: Tensor | None = None
) -> Tensor:
    """Attention of one 512-wide head, ``[B, S, 512]`` -> ``[B, S, 512]``: query i sees key j where
    j // frame_tokens <= i // frame_tokens.

    Args:
        q, k, v: bf16 or fp16. Rows may lie apart, channels lie side by side.
        frame_tokens: from 1 on; 1 is causal token by token, as the released VAE is.
        scale: not negative; 1 / sqrt(512) where None.

    On the CPU it is :func:`frame_causal_attention_reference`, rounded, with its S x S scores.

    Raises:
        ValueError: shapes, types or strides that do not fit; a card before sm_80.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check("[B, S, 512]", q, k, v, out)
    if q.shape[2] != WIDE or k.shape != q.shape or frame_tokens < 1:
        raise ValueError(
            f"q and k have to be [B, S, 512], not {list(q.shape)}; frame_tokens from 1, not {frame_tokens}"
        )
    factor = WIDE**-0.5 if scale is None else scale
    if not 0 <= factor < math.inf:
        raise ValueError(f"scale has to be a finite number from 0 on, not {scale}")
    if not q.is_cuda or triton is None:
        return out.copy_(frame_causal_attention_reference(q, k, v, frame_tokens=frame_tokens, scale=factor))
    major, minor = torch.cuda.get_device_capability(q.device)
    tile = tile_for(WIDE_TILES, 10 * major + minor, "frame_causal_attention")
    with torch.cuda.device(q.device):
        return launch_wide(q, k, v, frame_tokens, factor, out, tile)


def launch_wide(q: Tensor, k: Tensor, v: Tensor, frame_tokens: int, scale: float, out: Tensor, tile: Tile) -> Tensor:
    """The kernel, on checked arguments (also under Triton's interpreter)."""
    batch, length, width = q.shape
    _wide_kernel[(triton.cdiv(length, tile.queries), batch)](
        q, k, v, out, length, min(frame_tokens, length), scale * math.log2(math.e),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        BM=tile.queries, BN=tile.keys, D=width, num_warps=tile.num_warps, num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _check(shapes: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or not q.numel() or not k.numel() or v.shape != k.shape or out.shape != q.shape:
        raise ValueError(f"q, k, v and out have to be {shapes}, not {[list(x.shape) for x in (q, k, v, out)]}")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.dtype not in TYPES or x.dtype != q.dtype:
            raise ValueError(f"{name} has to be bf16 or fp16 as q is, not {x.dtype}")
        if x.stride(2) != 1:
            raise ValueError(f"{name}: its channels have to lie side by side; make it contiguous")
        if x.device != q.device:
            raise ValueError(f"{name} has to be on {q.device}, not on {x.device}")

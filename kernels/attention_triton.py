"""Attention in plain Triton for every card from sm_80 on: what `attention_hopper` computes, from the same operands.

Three modes, fp32 accumulators, an exact running maximum (relative L2 error on N(0,1), as `attention_hopper` has them):

| mode | q k^T | P V | error | cards |
|---|---|---|---|---|
| 16 bits | bf16 or fp16 | the same | 2.3e-3 (bf16) | sm_80 on |
| int8 | int8, a scale for each query and for 16 keys | bf16 or fp16 | 1.1e-2 | sm_80 on |
| int8 + fp8 | the same | e4m3 P, e4m3 V with a scale a channel | 3.6e-2 | sm_89 on |

A program owns a tile of queries of one head and walks over the keys. The last tile of keys, full or not, follows the
loop, which needs no mask then; in front of it, its buffers in shared memory would add to the loop's. Heads are the slow
axis of the grid: all multiprocessors read the keys of the same head together and find them in L2.

Memory beside inputs and output: none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import block_scaled
from .block_scaled import dot_e4m3
from .qk_norm_rope import key_groups, scale_of_keys

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
E4M3 = torch.float8_e4m3fn


class Tile(NamedTuple):
    """How a mode is laid out on a card."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# At most two registers spill (ptxas of Triton 3.6 and 3.9), and shared memory suffices: 163 KiB on sm_80, 99 on sm_86,
# sm_89 and sm_120, 227 on sm_90 and sm_100. 128 x 128 was the fastest plain Triton on an H200, there with
# tensor descriptors.
TILES = {
    "16 bits": {
        80: Tile(128, 64, 8, 3),
        90: Tile(128, 128, 8, 3),
        100: Tile(128, 64, 8, 3),
        120: Tile(128, 64, 8, 3),
    },
    "int8": {
        80: Tile(128, 64, 8, 3),
        90: Tile(128, 128, 8, 3),
        100: Tile(128, 64, 8, 3),
        120: Tile(128, 64, 8, 3),
    },
    "int8 + fp8": {
        89: Tile(128, 64, 8, 3),
        90: Tile(128, 128, 8, 3),
        100: Tile(128, 64, 8, 3),
        120: Tile(128, 64, 8, 3),
    },
}


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> Tensor:
    """What :func:`attention_triton` computes from the same operands, in plain torch: fp32 ``[S, H, 128]``, not rounded.

    Nothing is rounded between either, where the kernel rounds P to the type of V. One head's scores exist at a time:
    4 S L bytes.
    """
    length = k.shape[0]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for head in range(q.shape[1]):
        queries, keys = q[:, head].float(), k[:, head].float()
        if q_scale is not None and k_scale is not None:
            queries = queries * q_scale[head, :, None]
            keys = keys * scale_of_keys(k_scale, length)[head, :, None]
        values = _values(v[head], length) if v.dtype == E4M3 else v[:, head].float()
        scores = queries @ keys.t() * (HEAD_DIM**-0.5 if scale is None else scale)
        result = scores.softmax(-1) @ values
        if v_scale is not None:
            result = result * v_scale[head]
        out[:, head] = result if v_mean is None else result + v_mean[head]
    return out


def _values(v: Tensor, length: int) -> Tensor:
    """One head of 8-bit V ``[128, L16]`` as fp32 ``[L, 128]``, its keys in their own order again."""
    return v.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)[:, :length].t()


if triton is not None:
    # 1.5 x 2^23: an int32 accumulator that starts at these bits reads as the float 12582912 + dot, exactly, for
    # |dot| < 2^22 (128 x 127^2 = 2.06 million). It saves the conversion of every score.
    _MAGIC_BITS = tl.constexpr(0x4B400000)
    _MAGIC = tl.constexpr(12582912.0)

    @triton.jit
    def _scores(q, k, INT8: tl.constexpr):
        """q k^T as floats; those of int8 products are too large by the magic number."""
        if INT8:
            start = tl.full([q.shape[0], k.shape[1]], _MAGIC_BITS, tl.int32)
            return tl.dot(q, k, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        else:
            return tl.dot(q, k)

    @triton.jit
    def _accumulate(p, v, o, V8: tl.constexpr, SCALED: tl.constexpr):
        """o + p v. 8-bit V has its keys in the order in which the threads that hold P want them (`permute_keys`).

        The FP8 units of Hopper (and, as is reported, of sm_89) keep some 14 bits of a sum: the product of each tile
        begins at zero and is added in fp32. Without the last argument the compiler would merge the sum back into it.
        SCALED: by the product of block_scaled.py.
        """
        if V8:
            M: tl.constexpr = p.shape[0]
            N: tl.constexpr = p.shape[1]
            x = tl.reshape(p.to(tl.float8e4nv), [M, N // 16, 2, 4, 2])
            x = tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), [M, N])
            if SCALED:
                return o + dot_e4m3(x, v, tl.zeros(o.shape, tl.float32))
            else:
                return o + tl.dot(x, v, max_num_imprecise_acc=N)
        else:
            return tl.dot(p.to(v.dtype), v, o)

    @triton.jit
    def _grouped(x):
        """``[BM, BN]`` as ``[BM, W, 8, 4, 2]``: windows of 64 keys, in each four groups of 16 keys, those of a thread
        of a row (qk_norm_rope.group_of())."""
        return tl.reshape(x, [x.shape[0], x.shape[1] // 64, 8, 4, 2])

    @triton.jit
    def _factors(q_factor, k_scale_ptr, tile, BN: tl.constexpr):
        """What makes integer scores of a tile logits, ``[BM, W, 4]``: a few products for a thread, not one a score."""
        W: tl.constexpr = BN // 64
        window = tile * W + tl.arange(0, W)
        at = (window // 2 * 8 + window % 2)[:, None] + 2 * tl.arange(0, 4)[None, :]
        return q_factor[:, None, None] * tl.load(k_scale_ptr + at)[None, :, :]

    @triton.jit
    def _largest(x, f, INT8: tl.constexpr):
        """The largest logit of each row; factors are not negative, so that only the largest score of each is scaled."""
        if INT8:
            most = tl.max(tl.max(_grouped(x), 4), 2)
            return tl.max(tl.max((most - _MAGIC) * f, 2), 1)
        else:
            return tl.max(x, 1) * f

    @triton.jit
    def _powers(x, f, m, INT8: tl.constexpr):
        """2^(score f - m), one multiplication and addition a score."""
        if INT8:
            off = m[:, None, None] + _MAGIC * f
            p = tl.exp2(_grouped(x) * f[:, :, None, :, None] - off[:, :, None, :, None])
            return tl.reshape(p, x.shape)
        else:
            return tl.exp2(x * f[:, None] - m[:, None])

    @triton.jit(do_not_specialize=["n_q", "n_k"])  # lengths change from call to call, and nothing gains
    def _attention_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, n_q, n_k, scale,
        q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
        BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, INT8: tl.constexpr, V8: tl.constexpr,
        HAS_MEAN: tl.constexpr, SCALED: tl.constexpr,
    ):  # fmt: skip
        # Heads and rows times strides may exceed 2^31 elements; offsets within a tile do not.
        head = tl.program_id(1).to(tl.int64)
        row0 = tl.program_id(0) * BM
        rows = row0 + tl.arange(0, BM)
        keys = tl.arange(0, BN)
        c = tl.arange(0, D)
        inside = rows < n_q
        q_ptr += row0.to(tl.int64) * q_row + head * q_head
        q = tl.load(q_ptr + tl.arange(0, BM)[:, None] * q_row + c[None, :], mask=inside[:, None], other=0)
        k_ptr += head * k_head
        k_at = keys[None, :] * k_row + c[:, None]
        v_ptr += head * v_head
        # v_row is from a key to the next, or for 8-bit V from a channel to the next.
        if V8:
            v_at = c[None, :] * v_row + keys[:, None]
            v_step = 1
            v_keys = v_row
        else:
            v_at = keys[:, None] * v_row + c[None, :]
            v_step = v_row
            v_keys = n_k
        if INT8:
            q_factor = tl.load(q_scale_ptr + head * n_q + rows, mask=inside, other=0.0) * scale
            k_scale_ptr += head * ((n_k + 127) // 128 * 8)
        else:
            q_factor = tl.full([BM], scale, tl.float32)
        # P in e4m3 is 2^8 too large, to use its range; the row sums are too, and it cancels.
        shift: tl.constexpr = 8.0 if V8 else 0.0

        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        o = tl.zeros([BM, D], tl.float32)
        last = (n_k - 1) // BN
        if last > 0:  # with a way around the loop, ptxas serializes all products of wgmma (C7515)
            for t in range(0, last):
                start = tl.cast(t * BN, tl.int64)
                k = tl.load(k_ptr + start * k_row + k_at)
                v = tl.load(v_ptr + start * v_step + v_at)
                x = _scores(q, k, INT8)
                f = _factors(q_factor, k_scale_ptr, t, BN) if INT8 else q_factor
                m_new = tl.maximum(m_i, _largest(x, f, INT8))
                alpha = tl.exp2(m_i - m_new)
                p = _powers(x, f, m_new - shift, INT8)
                l_i = l_i * alpha + tl.sum(p, 1)
                o = _accumulate(p, v, o * alpha[:, None], V8, SCALED)
                m_i = m_new

        start = tl.cast(last * BN, tl.int64)
        left = n_k - last * BN
        k = tl.load(k_ptr + start * k_row + k_at, mask=(keys < left)[None, :], other=0)
        v = tl.load(v_ptr + start * v_step + v_at, mask=(keys < v_keys - last * BN)[:, None], other=0.0)
        x = _scores(q, k, INT8)
        if INT8:
            f = _factors(q_factor, k_scale_ptr, last, BN)
            x = tl.reshape((_grouped(x) - _MAGIC) * f[:, :, None, :, None], x.shape)
        else:
            x = x * q_factor[:, None]
        # Masked after the product: a factor may be zero, and zero times infinity is no number.
        x = tl.where((keys < left)[None, :], x, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, 1))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(x - (m_new - shift)[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        o = _accumulate(p, v, o * alpha[:, None], V8, SCALED)

        o = o * (1.0 / l_i)[:, None]
        if V8:
            o = o * tl.load(v_scale_ptr + head * D + c)[None, :]
        if HAS_MEAN:
            o = o + tl.load(v_mean_ptr + head * D + c)[None, :]
        out_ptr += row0.to(tl.int64) * out_row + head * out_head
        out_at = tl.arange(0, BM)[:, None] * out_row + c[None, :]
        tl.store(out_ptr + out_at, o.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_mean: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale) v, ``q [S, H, 128]``, ``k [L, H, 128]`` -> bf16 ``[S, H, 128]`` (or what ``out`` holds).

    Any S and L from 1 on. Tokens and heads may lie apart (views of a wider tensor), channels lie side by side; heads
    that start at multiples of 16 bytes are faster. On the CPU it is :func:`attention_reference`, rounded.

    Args:
        q, k: bf16 or fp16; or int8 with ``q_scale`` fp32 ``[H, S]`` and ``k_scale`` fp32
            ``[H, key_groups(L)]``.
        v: bf16 or fp16 ``[L, H, 128]``, of the type of q where that has 16 bits; or e4m3 ``[H, 128, L16]`` with
            ``v_scale`` fp32 ``[H, 128]``, L16 >= L a multiple of 16, what lies beyond L finite, and keys in the order
            of `values.permute_keys`; with int8 q and k, on cards from sm_89 on.
        scale: not negative; 1 / sqrt(128) where None.
        v_mean: fp32 ``[H, 128]``, added to the output: what was taken out of V before it was quantized.
        out: where the result goes, ``[S, H, 128]``; tokens and heads may lie apart.

    Raises:
        ValueError: shapes, types or strides that no mode takes; e4m3 on a card that has none; a card before sm_80.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    _check(q, k, v, q_scale, k_scale, v_scale, v_mean, out)
    factor = HEAD_DIM**-0.5 if scale is None else scale
    if not 0 <= factor < math.inf:
        raise ValueError(f"scale has to be a finite number from 0 on, not {scale}")
    if not q.is_cuda or triton is None:
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "v_mean": v_mean}
        return out.copy_(attention_reference(q, k, v, scale=factor, **scales))
    major, minor = torch.cuda.get_device_capability(q.device)
    tile = choose_tile(q.dtype, v.dtype, 10 * major + minor)
    with torch.cuda.device(q.device):
        scaled = block_scaled.is_taken(q.device)
        return launch(q, k, v, factor, q_scale, k_scale, v_scale, v_mean, out, tile, scaled)


def choose_tile(q_type: torch.dtype, v_type: torch.dtype, capability: int) -> Tile:
    """The tile for operands on a card, ``capability`` 89 for sm_89."""
    mode = "16 bits" if q_type != torch.int8 else "int8 + fp8" if v_type == E4M3 else "int8"
    return tile_for(TILES[mode], capability, f"attention in {mode}")


def tile_for(tiles: dict[int, Tile], capability: int, what: str) -> Tile:
    """A card that has no row takes that of the nearest one below it; below the first a ValueError names ``what``."""
    row = max((known for known in tiles if known <= capability), default=None)
    if row is None:
        raise ValueError(f"{what} needs a card from sm_{min(tiles)} on; this one is sm_{capability}")
    return tiles[row]


def launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, q_scale: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, v_mean: Tensor | None, out: Tensor, tile: Tile, scaled: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel, on checked arguments (also under Triton's interpreter)."""
    n_q, heads, _ = q.shape
    v8 = v.dtype == E4M3
    v_row, v_head = (v.stride(1), v.stride(0)) if v8 else (v.stride(0), v.stride(1))
    _attention_kernel[(triton.cdiv(n_q, tile.queries), heads)](
        q, k, v, out, q_scale, k_scale, v_scale, v_mean, n_q, k.shape[0], scale * math.log2(math.e),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v_row, v_head, out.stride(0), out.stride(1),
        BM=tile.queries, BN=tile.keys, D=HEAD_DIM, INT8=q.dtype == torch.int8, V8=v8, HAS_MEAN=v_mean is not None,
        SCALED=scaled and v8, num_warps=tile.num_warps, num_stages=tile.num_stages,
        enable_fp_fusion=True,  # x f - m is one instruction
    )  # fmt: skip
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    v_mean: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """What the kernel would read or write wrongly."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != HEAD_DIM or k.shape[1:] != q.shape[1:] or not (q.numel() and len(k)):
        raise ValueError(f"q and k have to be [S, H, 128] and [L, H, 128], not {list(q.shape)} and {list(k.shape)}")
    (n_q, heads, _), n_k = q.shape, k.shape[0]
    if q.dtype != k.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(f"q and k have to be both bf16, fp16 or int8, not {q.dtype} and {k.dtype}")
    if v.dtype == E4M3:
        good = v.ndim == 3 and v.shape[:2] == (heads, HEAD_DIM) and v.shape[2] >= n_k and v.shape[2] % 16 == 0
        if not good or not v.is_contiguous() or q.dtype != torch.int8:
            raise ValueError(f"8-bit v has to be [{heads}, 128, {-(-n_k // 16) * 16} or more], with int8 q and k")
        _check_scale("v_scale", v_scale, (heads, HEAD_DIM), q)
    elif v.dtype not in (torch.bfloat16, torch.float16) or v.shape != k.shape:
        raise ValueError(f"v has to be 16 bits {list(k.shape)}, or e4m3, not {v.dtype} {list(v.shape)}")
    elif q.dtype not in (v.dtype, torch.int8):
        raise ValueError(f"v has to be of the type of q and k, {q.dtype}, not {v.dtype}")
    if q.dtype == torch.int8:
        _check_scale("q_scale", q_scale, (heads, n_q), q)
        _check_scale("k_scale", k_scale, (heads, key_groups(n_k)), q)
    if v_mean is not None:
        _check_scale("v_mean", v_mean, (heads, HEAD_DIM), q)
    if out.shape != q.shape or not out.dtype.is_floating_point:
        raise ValueError(f"out has to be floating-point {list(q.shape)}, not {out.dtype} {list(out.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.stride(2) != 1:
            raise ValueError(f"{name}: its channels have to lie side by side; make it contiguous")
        if x.device != q.device:
            raise ValueError(f"{name} has to be on {q.device}, not on {x.device}")


def _check_scale(name: str, scale: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if scale is None or scale.shape != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} has to be contiguous fp32 {list(shape)}")
    if scale.device != like.device:
        raise ValueError(f"{name} has to be on {like.device}, not on {scale.device}")

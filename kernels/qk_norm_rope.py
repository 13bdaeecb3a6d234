"""From the qkv product to the operands of attention in one pass: QK-norm, 3D rotary embedding, and for 8-bit attention
also the rotation and quantization of q and k.

q and k are read where the product left them (``[S, H, 384]``: per head q, k, v of 128 each) and written once; v stays
where it is. Everything between is fp32: one rounding, where the official code has five.

8 bits: a constant vector taken out of every key changes no softmax, so the mean of k goes first, estimated from some
sampled tokens (a channel with a large mean would eat the range of int8). q and k are then rotated by an orthonormal
Hadamard transform over the 128 channels of a head, which leaves q k^T alone and spreads what sticks out. q gets a scale
for each token, k one for 16 tokens, as the attention kernels take them: of each window of 64 tokens, those that one
lane of a tensor core's product holds, so that it multiplies by one number where groups of neighbours would take many.

On Hopper, 8 bits have a form of their own (qk_hopper.py).

Moves 2 S H 128 values of 2 bytes in and as many out (of 1 byte in 8 bits): 3.7 GB at 75,888 tokens and 48 heads, 2.8 in
8 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .cards import hopper_missing
from .quantize import _has_kernel, _low_byte, hadamard

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
TOKENS = 64
"""Tokens of one program."""
WINDOW = 64
"""Keys in which four groups of 16 lie, each with a scale of its own: those of group b are 8 n + 2 b and the next."""
FLOOR = 2.0**-50
"""The least amax a scale is made of: the product of two such scales is no zero yet."""
LARGEST = 127.0
"""What the largest value of a row or group becomes. With 127.49, which is rounded to 127 as well, steps are finer by
0.4 %, but the largest values, of which few make a peak of attention, are always off by half a step: on clustered keys
the error is 2 % larger, in the mean of twelve draws."""
MANY = 16_384
"""Tokens from which on kernels take a form that is for many of them."""
SAMPLES = 256
"""Tokens that k's mean is estimated from."""


def plan_for(quantize: bool, capability: int, tokens: int) -> dict[str, int]:
    """Heads of a program, stages of its loop, and warps; on sm_90 the fastest of 30 on an H200. Three stages take
    113 KiB of shared memory on sm_90, more than sm_86, sm_89 and sm_120 have. Many heads of few tokens would leave some
    of the card without work."""
    if not quantize:
        return {"heads": 1, "stages": 1, "warps": 4}
    if 90 <= capability < 120:
        return {"heads": 24 if tokens >= MANY else 6, "stages": 3, "warps": 4}
    return {"heads": 1, "stages": 1, "warps": 8}


HOPPER = {"heads": 24, "registers": 168}
"""How the form for Hopper takes int8, the fastest of six on an H200: see launch_hopper()."""


def hopper_plan(qkv: Tensor, tokens: int) -> dict[str, int] | None:
    """The plan of int8's form for Hopper (qk_hopper.py); None where it cannot take this product."""
    aligned = qkv.data_ptr() % 16 == 0 and qkv.stride(0) % 8 == 0 and qkv.stride(1) % 8 == 0
    if tokens < MANY or qkv.dtype != torch.bfloat16 or not aligned or hopper_missing(qkv.device, ".qk_hopper"):
        return None
    return HOPPER


def qk_norm_rope_reference(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:  # fmt: skip
    """RMS-norm and rotary embedding of q or k ``[S, H, 128]`` with tables ``[S, 128]``; fp32, not rounded."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    turned = []
    for part in y.split((64, 32, 32), dim=-1):
        first, second = part.chunk(2, dim=-1)
        turned += [-second, first]
    return y * cos.float()[:, None] + torch.cat(turned, dim=-1) * sin.float()[:, None]


def quantize_qk_reference(q: Tensor, k: Tensor, k_mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 q and k ``[S, H, 128]`` of fp32 ones, rotated, k less ``k_mean [H, 128]``; scales ``[H, S]`` and
    ``[H, key_groups(S)]``."""
    q, k = hadamard(q, HEAD_DIM), hadamard(k - k_mean, HEAD_DIM)
    q_scale = q.abs().amax(-1).clamp_min(FLOOR) / LARGEST
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, -len(k) % 128)).abs().amax(-1)  # [tiles x 128, H]
    amax = padded.unflatten(0, (-1, 2, 8, 4, 2)).amax((2, 4))  # [tiles, windows, groups, H]
    k_scale = amax.transpose(1, 2).flatten(0, 2).clamp_min(FLOOR) / LARGEST
    q8 = (q / q_scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    k_scale = k_scale.t().contiguous()
    k8 = (k / scale_of_keys(k_scale, len(k)).t()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q8, k8, q_scale.t().contiguous(), k_scale


def key_groups(keys: int) -> int:
    """How many scales int8 keys have, in whole tiles of 128 keys; those of groups without keys are small, not zero."""
    return -(-keys // 128) * 8


def scale_of_keys(k_scale: Tensor, keys: int) -> Tensor:
    """The scale of each key, ``[H, keys]``, from those of groups."""
    return k_scale[:, group_of(torch.arange(keys, device=k_scale.device))]


def group_of(key: Tensor) -> Tensor:
    """The place of a key's scale: those of a group of one lane's, in the two windows of a tile, lie side by side."""
    return key // 128 * 8 + key % 8 // 2 * 2 + key // 64 % 2


def sampled_tokens(tokens: int) -> tuple[int, int]:
    """Step between sampled tokens, and how many there are."""
    step = max(1, tokens // SAMPLES)
    return step, -(-tokens // step)


def norm_heads_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS-norm over the last axis, fp32, not rounded."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()


def k_mean_reference(k: Tensor) -> Tensor:
    """The mean ``[H, 128]`` of the sampled tokens of normed and rotated keys, fp32 ``[S, H, 128]``."""
    return k[:: sampled_tokens(len(k))[0]].mean(0)


if triton is not None:

    @triton.jit
    def _pairs():
        """The channels of each of the 64 rotated pairs: 32 of the frame's part, 16 of the row's, 16 of the column's."""
        p = tl.arange(0, 64)
        first = p + tl.where(p >= 32, 32, 0) + tl.where(p >= 48, 16, 0)
        second = first + tl.where(p < 32, 32, 16)
        # Runs of 16: without being told, the compiler would load every value on its own.
        first = tl.max_contiguous(tl.multiple_of(first, 16), 16)
        return first, tl.max_contiguous(tl.multiple_of(second, 16), 16)

    @triton.jit
    def _norm_rope(at, mask, first, second, weight_first, weight_second, cos, sin, eps):
        """Rows of one head, normed and rotated: the first and the second channels of pairs, fp32 ``[rows, 64]``."""
        x = tl.load(at + first[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(at + second[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x + y * y, 1) / 128 + eps)
        x = x * (inverse[:, None] * weight_first)
        y = y * (inverse[:, None] * weight_second)
        return x * cos - y * sin, y * cos + x * sin

    @triton.jit
    def _gains(weight_ptr, first, second):
        return tl.load(weight_ptr + first).to(tl.float32)[None, :], tl.load(weight_ptr + second).to(tl.float32)[None, :]

    @triton.jit
    def _turned(x, y, h_first, h_second):
        """[x, y] H on tensor cores, 128^0.5 too large: H is exact in fp16, and x and y keep 11 bits, three more than
        int8 will."""
        return tl.dot(y.to(tl.float16), h_second, tl.dot(x.to(tl.float16), h_first))

    @triton.jit
    def _largest(x):
        """The largest size in each row; infinity where there is a NaN, which would get lost: a scale of infinity makes
        NaN of every score."""
        most = tl.max(tl.abs(x), 1)  # of NaN alone: the transform adds all of a row
        return tl.where(most >= 0.0, most, float("inf"))

    @triton.jit
    def _scale(amax):
        return tl.div_rn(tl.maximum(amax * 0.08838834764831845, 8.881784197001252e-16), 127.0)

    @triton.jit
    def _qk_norm_rope_kernel(
        qkv_ptr, q_ptr, k_ptr, q_scale_ptr, k_scale_ptr, k_mean_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
        h_ptr, S, row_stride, head_stride, out_row, out_head, eps,
        HEADS: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """BLOCK tokens of HEADS heads, one after the other: the tables and H are loaded once."""
        block = tl.program_id(1)
        rows = block * BLOCK + tl.arange(0, BLOCK)
        mask = (rows < S)[:, None]
        c = tl.arange(0, 128)
        first, second = _pairs()
        table = rows.to(tl.int64)[:, None] * 128 + first[None, :]
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
        q_first, q_second = _gains(q_weight_ptr, first, second)
        k_first, k_second = _gains(k_weight_ptr, first, second)
        at = qkv_ptr + rows.to(tl.int64)[:, None] * row_stride
        to = rows.to(tl.int64)[:, None] * out_row
        if QUANTIZE:
            row = tl.arange(0, 64)[:, None] * 128 + c[None, :]
            h_first, h_second = tl.load(h_ptr + row), tl.load(h_ptr + 64 * 128 + row)
        for i in tl.range(0, HEADS, num_stages=STAGES):
            head = tl.program_id(0) * HEADS + i
            here = at + head * head_stride
            x, y = _norm_rope(
                here, mask, first, second, q_first, q_second, cos.to(tl.float32), sin.to(tl.float32), eps
            )  # fmt: skip
            if QUANTIZE:
                q = _turned(x, y, h_first, h_second)
                scale = _scale(_largest(q))
                tl.store(q_scale_ptr + head * S + rows, scale, mask=rows < S)
                q = _low_byte(q * tl.div_rn(0.08838834764831845, scale)[:, None])
                tl.store(q_ptr + to + head * out_head + c[None, :], q, mask=mask)
            else:
                tl.store(q_ptr + to + head * out_head + first[None, :], x.to(q_ptr.dtype.element_ty), mask=mask)
                tl.store(q_ptr + to + head * out_head + second[None, :], y.to(q_ptr.dtype.element_ty), mask=mask)
            x, y = _norm_rope(
                here + 128, mask, first, second, k_first, k_second, cos.to(tl.float32), sin.to(tl.float32), eps
            )  # fmt: skip
            if QUANTIZE:
                x = tl.where(mask, x - tl.load(k_mean_ptr + head * 128 + first)[None, :], 0.0)
                y = tl.where(mask, y - tl.load(k_mean_ptr + head * 128 + second)[None, :], 0.0)
                k = _turned(x, y, h_first, h_second)
                scale = _scale(tl.max(tl.max(tl.reshape(_largest(k), [8, 4, 2]), 2), 0))
                at_scale = head * (tl.num_programs(1) * 4) + block // 2 * 8 + block % 2  # see group_of()
                tl.store(k_scale_ptr + at_scale + 2 * tl.arange(0, 4), scale)
                inverse = tl.div_rn(0.08838834764831845, scale)[None, :, None]
                factor = tl.reshape(tl.broadcast_to(inverse, [8, 4, 2]), [BLOCK])
                tl.store(k_ptr + to + head * out_head + c[None, :], _low_byte(k * factor[:, None]), mask=mask)
            else:
                tl.store(k_ptr + to + head * out_head + first[None, :], x.to(k_ptr.dtype.element_ty), mask=mask)
                tl.store(k_ptr + to + head * out_head + second[None, :], y.to(k_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _k_mean_kernel(
        qkv_ptr, mean_ptr, weight_ptr, cos_ptr, sin_ptr, step, count, row_stride, head_stride, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0)
        first, second = _pairs()
        weight_first, weight_second = _gains(weight_ptr, first, second)
        x_total = tl.zeros([64], tl.float32)
        y_total = tl.zeros([64], tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = (index < count)[:, None]
            rows = (index * step).to(tl.int64)[:, None]
            cos = tl.load(cos_ptr + rows * 128 + first[None, :], mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + rows * 128 + first[None, :], mask=mask, other=0.0).to(tl.float32)
            at = qkv_ptr + rows * row_stride + head * head_stride + 128
            x, y = _norm_rope(at, mask, first, second, weight_first, weight_second, cos, sin, eps)
            x_total += tl.sum(x, 0)
            y_total += tl.sum(y, 0)
        tl.store(mean_ptr + head * 128 + first, x_total / count)
        tl.store(mean_ptr + head * 128 + second, y_total / count)

    @triton.jit
    def _norm_heads_kernel(x_ptr, weight_ptr, count, eps, BLOCK: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        c = tl.arange(0, 128)
        at = x_ptr + rows[:, None] * 128 + c[None, :]
        x = tl.load(at, mask=(rows < count)[:, None], other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / 128 + eps)[:, None] * tl.load(weight_ptr + c).to(tl.float32)[None, :]
        tl.store(at, x.to(x_ptr.dtype.element_ty), mask=(rows < count)[:, None])


@functools.cache
def _walsh(device: torch.device) -> Tensor:
    """H of 128 in fp16, +1 and -1, its rows in the order of the kernel: first channels of pairs, then second ones."""
    p = torch.arange(64)
    first = p + 32 * (p >= 32) + 16 * (p >= 48)
    rows = torch.cat([first, first + torch.where(p < 32, 32, 16)])
    return (hadamard(torch.eye(128), 128) * 128**0.5).round()[rows].half().to(device).contiguous()


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    quantize: bool = False,
    overwrite: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q and k for attention from the qkv product ``[S, H, 384]``; v is ``qkv[..., 256:]``, where it is.

    Args:
        q_weight, k_weight: gains of the norms, ``[128]``.
        cos, sin: tables of the rotary embedding, contiguous ``[S, 128]``; both channels of a pair turn by one angle:
            the kernel reads the first one's.
        quantize: int8 q and k with their scales, rotated and k less its mean; else both in the type of ``qkv``.
        overwrite: puts q and k into the place of those in ``qkv``, if they are not quantized.

    Returns:
        q and k ``[S, H, 128]``, and with ``quantize`` their scales, fp32 ``[H, S]`` and
        ``[H, key_groups(S)]``.

    Raises:
        ValueError: a shape that does not fit.
    """
    if qkv.ndim != 3 or qkv.shape[2] != 3 * HEAD_DIM or qkv.stride(2) != 1:
        raise ValueError(f"qkv has to be [S, H, 384] with channels side by side, not {list(qkv.shape)}")
    tokens, heads, _ = qkv.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, HEAD_DIM) or not table.is_contiguous():
            raise ValueError(f"{name} has to be a contiguous [{tokens}, 128] table, not {list(table.shape)}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != (HEAD_DIM,):
            raise ValueError(f"{name} has to be [128], not {list(weight.shape)}")
    if not _has_kernel(f"qk_norm_rope {'int8' if quantize else '16 bits'}", qkv):
        q, k, *scales = _on_cpu(qkv, q_weight, k_weight, cos, sin, quantize, eps)
        if overwrite and not quantize:
            q, k = qkv[..., :HEAD_DIM].copy_(q), qkv[..., HEAD_DIM : 2 * HEAD_DIM].copy_(k)
        return q, k, *scales
    return launch(qkv, q_weight, k_weight, cos, sin, quantize, eps, overwrite)


def _on_cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, quantize: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    q = qk_norm_rope_reference(qkv[..., :HEAD_DIM], q_weight, cos, sin, eps)
    k = qk_norm_rope_reference(qkv[..., HEAD_DIM : 2 * HEAD_DIM], k_weight, cos, sin, eps)
    if not quantize:
        return q.to(qkv.dtype), k.to(qkv.dtype), None, None
    return quantize_qk_reference(q, k, k_mean_reference(k))


def launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, quantize: bool, eps: float,
    overwrite: bool = False, plan: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The kernels, on checked arguments (also under Triton's interpreter)."""
    tokens, heads, _ = qkv.shape
    if plan is None and quantize:
        plan = hopper_plan(qkv, tokens)
    if plan is None:
        major, minor = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)
        plan = plan_for(quantize, 10 * major + minor, tokens)
    like: dict[str, Any] = {"device": qkv.device, "dtype": torch.int8 if quantize else qkv.dtype}
    if overwrite and not quantize:
        q, k = qkv[..., :HEAD_DIM], qkv[..., HEAD_DIM : 2 * HEAD_DIM]
    else:
        q, k = (torch.empty(tokens, heads, HEAD_DIM, **like) for _ in range(2))
    blocks = -(-tokens // 128) * 2 if quantize else -(-tokens // TOKENS)
    q_scale = k_scale = mean = None
    if quantize:
        q_scale = torch.empty(heads, tokens, device=qkv.device)
        k_scale = torch.empty(heads, key_groups(tokens), device=qkv.device)
        few = "registers" not in plan  # tokens at a time; they come one after the other, and little else runs
        mean = torch.empty(heads, HEAD_DIM, device=qkv.device, dtype=torch.float32 if few else torch.float16)
        step, count = sampled_tokens(tokens)
        _k_mean_kernel[(heads,)](
            qkv, mean, k_weight, cos, sin, step, count, qkv.stride(0), qkv.stride(1), eps, BLOCK=32 if few else 128,
            num_warps=4 if few else 8,
        )  # fmt: skip
    together = next(n for n in (plan["heads"], 6, 4, 3, 2, 1) if heads % n == 0)
    if "registers" in plan:
        from .qk_hopper import launch_hopper

        launch_hopper(qkv, q, k, q_scale, k_scale, mean, q_weight, k_weight, cos, sin, eps, together, plan)
        return q, k, q_scale, k_scale
    _qk_norm_rope_kernel[(heads // together, blocks)](
        qkv, q, k, q_scale, k_scale, mean, q_weight, k_weight, cos, sin, _walsh(qkv.device) if quantize else None,
        tokens, qkv.stride(0), qkv.stride(1), q.stride(0), q.stride(1), eps, HEADS=together, QUANTIZE=quantize,
        BLOCK=TOKENS, STAGES=plan["stages"], num_warps=plan["warps"],
    )  # fmt: skip
    return q, k, q_scale, k_scale


def norm_heads(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS-norm of each head of ``x``, contiguous ``[S, H, 128]``, in place: the query of cross-attention."""
    if x.ndim != 3 or not x.is_contiguous() or weight.shape != x.shape[2:]:
        raise ValueError(f"x has to be a contiguous [S, H, {weight.shape[0]}], not {list(x.shape)}")
    if x.shape[2] != HEAD_DIM or not _has_kernel("norm_heads", x):
        return x.copy_(norm_heads_reference(x, weight, eps))
    return launch_norm(x, weight, eps)


def launch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.shape[0] * x.shape[1]
    if rows:
        _norm_heads_kernel[(triton.cdiv(rows, 64),)](x, weight, rows, eps, BLOCK=64, num_warps=4)
    return x

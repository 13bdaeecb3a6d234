"""From the qkv product to the operands of attention in one pass: QK-norm, 3D rotary embedding, and for 8-bit attention
also the rotation and quantization of q and k.

q and k are read where the product left them (``[S, H, 384]``: per head q, k, v of 128 each) and written once; v stays
where it is. Everything between is fp32: one rounding, where the official code has five.

8 bits: a constant vector taken out of every key changes no softmax, so the mean of k goes first, estimated from some
sampled tokens (a channel with a large mean would eat the range of int8). q and k are then rotated by an orthonormal
Hadamard transform over the 128 channels of a head, which leaves q k^T alone and spreads what sticks out. q gets a scale
for each token, k one for 128 tokens, as the kernels in attention_hopper.py take them.

Moves 4 S H 128 values of 2 bytes in and as many out (of 1 byte in 8 bits): 2.8 GB at 75,888 tokens and 48 heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantize import hadamard

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

HEAD_DIM = 128
TOKENS = 128
"""Tokens of one program; also the keys that share a scale."""
SAMPLES = 256
"""Tokens that k's mean is estimated from."""


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
    ``[H, ceil(S / 128)]``."""
    q, k = hadamard(q, HEAD_DIM), hadamard(k - k_mean, HEAD_DIM)
    blocks = -(-len(k) // TOKENS)
    q_scale = q.abs().amax(-1).clamp_min(2.0**-100) / 127
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, blocks * TOKENS - len(k)))
    k_scale = padded.unflatten(0, (blocks, TOKENS)).abs().amax((1, 3)).clamp_min(2.0**-100) / 127
    q8 = (q / q_scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    k8 = (k / k_scale.repeat_interleave(TOKENS, 0)[: len(k), :, None]).round().clamp(-127, 127).to(torch.int8)
    return q8, k8, q_scale.t().contiguous(), k_scale.t().contiguous()


def sampled_tokens(tokens: int) -> tuple[int, int]:
    """Step between sampled tokens, and how many there are."""
    step = max(1, tokens // SAMPLES)
    return step, -(-tokens // step)


def k_mean_reference(k: Tensor) -> Tensor:
    """The mean ``[H, 128]`` of the sampled tokens of normed and rotated keys, fp32 ``[S, H, 128]``."""
    return k[:: sampled_tokens(len(k))[0]].mean(0)


if triton is not None:

    @triton.jit
    def _norm_rope(base, row_stride, offset, rows, mask, weight_ptr, cos_ptr, sin_ptr, eps):
        """Rows of one head, normed and rotated, fp32 ``[rows, 128]``."""
        c = tl.arange(0, 128)
        # Channel i is paired with the one half a part away: 32 in the part of the frame, 16 in those of row and column.
        partner = tl.where(c < 64, c ^ 32, c ^ 16)
        sign = tl.where(tl.where(c < 64, c & 32, c & 16) == 0, -1.0, 1.0)
        at = base + rows.to(tl.int64)[:, None] * row_stride + offset
        keep = mask[:, None]
        x = tl.load(at + c[None, :], mask=keep, other=0.0).to(tl.float32)
        y = tl.load(at + partner[None, :], mask=keep, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / 128 + eps)
        x = x * inverse[:, None] * tl.load(weight_ptr + c).to(tl.float32)[None, :]
        y = y * inverse[:, None] * (tl.load(weight_ptr + partner).to(tl.float32) * sign)[None, :]
        table = rows.to(tl.int64)[:, None] * 128 + c[None, :]
        cos = tl.load(cos_ptr + table, mask=keep, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=keep, other=0.0).to(tl.float32)
        return x * cos + y * sin

    @triton.jit
    def _hadamard_128(x):
        """x H for rows of 128, on tensor cores: H is exact in tf32, and x keeps 11 bits, three more than int8 will."""
        c = tl.arange(0, 128)
        parity = c[:, None] & c[None, :]
        parity = parity ^ (parity >> 4)
        parity = parity ^ (parity >> 2)
        parity = parity ^ (parity >> 1)
        return tl.dot(x, tl.where((parity & 1) == 0, 1.0, -1.0), input_precision="tf32") * 0.08838834764831845

    @triton.jit
    def _round_int8(x):
        # Adding 1.5 x 2^23 rounds to the nearest whole number, halves to the even one.
        whole = (x + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)

    @triton.jit
    def _qk_norm_rope_kernel(
        qkv_ptr, q_ptr, k_ptr, q_scale_ptr, k_scale_ptr, k_mean_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
        S, row_stride, head_stride, eps, H: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0)
        block = tl.program_id(1)
        rows = block * BLOCK + tl.arange(0, BLOCK)
        mask = rows < S
        c = tl.arange(0, 128)
        out = (rows.to(tl.int64)[:, None] * H + head) * 128 + c[None, :]
        offset = head * head_stride
        q = _norm_rope(qkv_ptr, row_stride, offset, rows, mask, q_weight_ptr, cos_ptr, sin_ptr, eps)
        if QUANTIZE:
            q = _hadamard_128(q)
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(q), 1), 7.888609052210118e-31), 127.0)
            tl.store(q_scale_ptr + head * S + rows, scale, mask=mask)
            q = _round_int8(q * tl.div_rn(1.0, scale)[:, None])
        tl.store(q_ptr + out, q.to(q_ptr.dtype.element_ty), mask=mask[:, None])
        k = _norm_rope(qkv_ptr, row_stride, offset + 128, rows, mask, k_weight_ptr, cos_ptr, sin_ptr, eps)
        if QUANTIZE:
            k = tl.where(mask[:, None], k - tl.load(k_mean_ptr + head * 128 + c)[None, :], 0.0)
            k = _hadamard_128(k)
            scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), 7.888609052210118e-31), 127.0)
            tl.store(k_scale_ptr + head * tl.num_programs(1) + block, scale)
            k = _round_int8(k * tl.div_rn(1.0, scale))
        tl.store(k_ptr + out, k.to(k_ptr.dtype.element_ty), mask=mask[:, None])

    @triton.jit
    def _k_mean_kernel(
        qkv_ptr, mean_ptr, weight_ptr, cos_ptr, sin_ptr, step, count, row_stride, head_stride, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0)
        total = tl.zeros([128], tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            k = _norm_rope(
                qkv_ptr, row_stride, head * head_stride + 128, index * step, index < count, weight_ptr, cos_ptr,
                sin_ptr, eps,
            )  # fmt: skip
            total += tl.sum(k, 0)
        tl.store(mean_ptr + head * 128 + tl.arange(0, 128), total / count)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    quantize: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q and k for attention from the qkv product ``[S, H, 384]``; v is ``qkv[..., 256:]``, where it is.

    Args:
        q_weight, k_weight: gains of the norms, ``[128]``.
        cos, sin: tables of the rotary embedding, contiguous ``[S, 128]``.
        quantize: int8 q and k with their scales, rotated and k less its mean; else both in the type of ``qkv``.

    Returns:
        q and k ``[S, H, 128]``, and with ``quantize`` their scales, fp32 ``[H, S]`` and ``[H, ceil(S / 128)]``.

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
    if not qkv.is_cuda or triton is None:
        return _on_cpu(qkv, q_weight, k_weight, cos, sin, quantize, eps)
    return launch(qkv, q_weight, k_weight, cos, sin, quantize, eps)


def _on_cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, quantize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    q = qk_norm_rope_reference(qkv[..., :HEAD_DIM], q_weight, cos, sin, eps)
    k = qk_norm_rope_reference(qkv[..., HEAD_DIM : 2 * HEAD_DIM], k_weight, cos, sin, eps)
    if not quantize:
        return q.to(qkv.dtype), k.to(qkv.dtype), None, None
    return quantize_qk_reference(q, k, k_mean_reference(k))


def launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, quantize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The kernels, on checked arguments (also under Triton's interpreter)."""
    tokens, heads, _ = qkv.shape
    like: dict[str, Any] = {"device": qkv.device, "dtype": torch.int8 if quantize else qkv.dtype}
    q, k = (torch.empty(tokens, heads, HEAD_DIM, **like) for _ in range(2))
    blocks = -(-tokens // TOKENS)
    q_scale = k_scale = mean = None
    if quantize:
        q_scale = torch.empty(heads, tokens, device=qkv.device)
        k_scale = torch.empty(heads, blocks, device=qkv.device)
        mean = torch.empty(heads, HEAD_DIM, device=qkv.device)
        step, count = sampled_tokens(tokens)
        _k_mean_kernel[(heads,)](
            qkv, mean, k_weight, cos, sin, step, count, qkv.stride(0), qkv.stride(1), eps, BLOCK=32, num_warps=4
        )
    _qk_norm_rope_kernel[(heads, blocks)](
        qkv, q, k, q_scale, k_scale, mean, q_weight, k_weight, cos, sin, tokens, qkv.stride(0), qkv.stride(1), eps,
        H=heads, QUANTIZE=quantize, BLOCK=TOKENS, num_warps=8,
    )  # fmt: skip
    return q, k, q_scale, k_scale

"""4-bit weights to 16 bits or fp32, for products in the activation's type (formats: quant/four_bit.py).

    int4: w = (q - zero) scale, for groups of 128 input channels;    nf4: w = values[q] amax, for blocks of 64 values

Two values a byte, the first in the high half. Both in fp32, rounded once: the kernels give the references' bits. They
read half a byte a value and write it once, where plain torch makes some eight passes over 1 to 4 bytes each. Memory:
the output; in plain torch, fp32 copies of 32 million values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cards
from .quantize import _has_kernel, _jit
from .refused import is_refused

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

GROUP = 128
NF4_BLOCK = 64
BYTES = 1024
"""Bytes that a program expands."""
INT4, NF4 = "expand int4", "expand nf4"
"""Their names in refused.py."""


def unpack_nibbles(packed: Tensor) -> Tensor:
    """``[..., n]`` bytes -> ``[..., 2 n]`` values 0 ... 15."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)


def expand_int4_reference(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, columns]`` of bytes ``[N, G 64]`` with scales and zero points ``[N, G]``."""
    out = torch.empty(len(packed), columns, dtype=dtype, device=packed.device)
    start = 0
    for part in packed.split(max(1, (1 << 25) // columns)):
        rows = slice(start, start + len(part))
        q = unpack_nibbles(part).unflatten(1, (-1, GROUP)).float()
        q = (q - zero[rows, :, None].float()) * scale[rows, :, None].float()
        out[rows] = q.flatten(1)[:, :columns]
        start += len(part)
    return out


def expand_nf4_reference(
    packed: Tensor, amax: Tensor, values: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of ``shape`` of bytes ``[ceil(n / 2)]``, blocks' maxima ``[ceil(n / 64)]`` and the 16 values."""
    n = math.prod(shape)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    size = (1 << 19) * NF4_BLOCK  # values at a time
    for start in range(0, n, size):
        part = values[unpack_nibbles(packed[start // 2 :][: size // 2]).int()]
        part = F.pad(part, (0, -part.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        part *= amax[start // NF4_BLOCK :][: len(part), None]
        out[start : start + size] = part.flatten()[: n - start]
    return out.view(*shape)


@_jit
def _int4_kernel(packed_ptr, scale_ptr, zero_ptr, out_ptr, width, columns, BYTES: tl.constexpr, GROUP: tl.constexpr):
    """BYTES of a row; ``width`` is a row's bytes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = at < width
    byte = tl.load(packed_ptr + row * width + at, mask=inside, other=0)
    group = row * (width // (GROUP // 2)) + at // (GROUP // 2)
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=inside, other=0.0).to(tl.float32)
    first = ((byte >> 4).to(tl.float32) - zero) * scale
    second = ((byte & 15).to(tl.float32) - zero) * scale
    both = tl.interleave(first, second).to(out_ptr.dtype.element_ty)
    to = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + row * columns + to, both, mask=to < columns)


@_jit
def _nf4_kernel(packed_ptr, amax_ptr, values_ptr, out_ptr, n, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BYTES
    at = start + tl.arange(0, BYTES)
    inside = 2 * at < n
    byte = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    amax = tl.load(amax_ptr + at // (BLOCK // 2), mask=inside, other=0.0)
    first = tl.load(values_ptr + (byte >> 4)) * amax
    second = tl.load(values_ptr + (byte & 15)) * amax
    both = tl.interleave(first, second).to(out_ptr.dtype.element_ty)
    to = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + to, both, mask=to < n)


def launch_int4(packed: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
    """The kernel, on contiguous tensors; ``out [N, columns]``."""
    rows, width = packed.shape
    grid = rows, triton.cdiv(width, BYTES)
    _int4_kernel[grid](packed, scale, zero, out, width, out.shape[1], BYTES=BYTES, GROUP=GROUP, enable_fp_fusion=False)


def launch_nf4(packed: Tensor, amax: Tensor, values: Tensor, out: Tensor) -> None:
    """The kernel, on contiguous tensors; ``out`` of any shape."""
    n = out.numel()
    _nf4_kernel[(triton.cdiv(n, 2 * BYTES),)](
        packed, amax, values, out, n, BYTES=BYTES, BLOCK=NF4_BLOCK, enable_fp_fusion=False
    )


def has_nf4(device: torch.device) -> bool:
    """Whether there is a kernel for nf4 on a device, which was not found wrong."""
    return cards.triton_missing(device) is None and not is_refused(NF4, device)


def expand_int4(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """See :func:`expand_int4_reference`."""
    if not packed.numel() or not _has_kernel(INT4, packed):
        return expand_int4_reference(packed, scale, zero, columns, dtype)
    out = torch.empty(len(packed), columns, dtype=dtype, device=packed.device)
    with torch.cuda.device(packed.device):
        launch_int4(packed.contiguous(), scale.contiguous(), zero.contiguous(), out)
    return out


def expand_nf4(packed: Tensor, amax: Tensor, values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See :func:`expand_nf4_reference`."""
    if not packed.numel() or not _has_kernel(NF4, packed):
        return expand_nf4_reference(packed, amax, values, shape, dtype)
    out = torch.empty(*shape, dtype=dtype, device=packed.device)
    with torch.cuda.device(packed.device):
        launch_nf4(packed.contiguous(), amax.contiguous(), values, out)
    return out

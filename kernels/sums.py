"""What follows the sums of an 8-bit product that a library wrote, in one pass: see scaled_mm.py.

Plain torch makes six passes of it, each over 4 to 12 bytes a value; here a value is read once and written once, and the
bits are the same. Memory beside the output: none.
"""

from __future__ import annotations

from torch import Tensor

from .quantize import _jit

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None


@_jit
def _follow_kernel(
    sums_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, gate_ptr, out_ptr, N, stride,
    BN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """BN columns of a row, as the end of scaled_mm._scaled_mm_kernel()."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < N
    y = tl.load(sums_ptr + row * stride + columns, mask=inside, other=0).to(tl.float32) * tl.load(scale_a_ptr + row)
    y = y * tl.load(scale_b_ptr + columns, mask=inside, other=0.0)
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * N + columns
    if GATED:
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32) + gate * y
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch_follow(
    sums: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, gate: Tensor | None, out: Tensor
) -> None:
    """int32 or fp32 sums ``[M, N]``, whose rows may lie apart, into contiguous ``out``; with a gate, that holds the
    residual."""
    m, n = sums.shape
    _follow_kernel[(m, triton.cdiv(n, 1024))](
        sums, scale_a, scale_b, scale_b if bias is None else bias, out if gate is None else gate, out,
        n, sums.stride(0), BN=1024, BIAS=bias is not None, GATED=gate is not None, enable_fp_fusion=False,
    )  # fmt: skip

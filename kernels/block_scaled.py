"""The e4m3 product of cards of compute capability 12.0 at its full rate.

GeForce cards of that kind run their plain FP8 product into fp32 at half the rate of 8-bit products, and the one
with a scale for 32 values, MXFP8's, at the whole. With all scales one it computes the same; triton-lang/triton issue
11320 reports a matrix product 1.55 times as fast on an RTX 5090. It was not measured here, but compiled; and
operators_check.py examines it on the card before it is used.
"""

from __future__ import annotations

import torch

from . import cards
from .quantize import _jit
from .refused import is_refused

try:
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    pass

NAME = "block-scaled e4m3"
"""Its name in refused.py."""
FIRST_TRITON = (3, 6)
"""Compiled for 12.0 with this one and 3.9 it is one instruction; for 12.1 with 3.6 it is a product in bf16. Earlier
ones were not tried."""


def missing(device: torch.device) -> str | None:
    """None where a card has such products, else why not."""
    reason = cards.triton_missing(device)
    if reason is not None:
        return reason
    version = cards.triton_version()
    if version is None or version < FIRST_TRITON:
        return f"it needs Triton {cards.dotted(FIRST_TRITON)}"
    if cards.capability(device) != (12, 0):
        return f"it is for compute capability 12.0; this card has {cards.dotted(cards.capability(device))}"
    return None


def is_taken(device: torch.device) -> bool:
    """Whether kernels take it on a device."""
    return missing(device) is None and not is_refused(NAME, device)


@_jit
def dot_e4m3(a, b, total):
    """total + a b, the width of ``a`` a multiple of 32; a scale of one is 2^(127 - 127)."""
    K: tl.constexpr = a.shape[1] // 32
    scale_a = tl.full([a.shape[0], K], 127, tl.uint8)
    scale_b = tl.full([b.shape[1], K], 127, tl.uint8)
    return tl.dot_scaled(a, scale_a, "e4m3", b, scale_b, "e4m3", total)

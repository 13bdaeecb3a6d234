"""Linear layers with 4-bit weights, for text encoders and for cards with little memory. Products run in the type of
the activation, from a weight that is expanded for each call (2 N K bytes in bf16).

| format | values | scales | bits a weight | relative L2 error of a product, N(0,1) |
|---|---|---|---|---|
| nf4 | the 16 quantiles of NormalFloat4 | fp32, blocks of 64 | 4.5 | 9e-2 |
| int4-weight | 0 ... 15, with a zero point | bf16, groups of 128 input channels | 4.25 | 9e-2 |
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.expand import (
    GROUP,
    NF4_BLOCK,
    expand_int4,
    expand_nf4,
    expand_nf4_reference,
    has_nf4,
)
from .linear import Layout, QuantizedLinear, row_chunks

log = logging.getLogger("solostep")

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, with an exact zero, in [-1, 1] (Dettmers et al. 2023, QLoRA, appendix E)."""

SHRINK = tuple(1 - 0.03 * i for i in range(14))
"""Ranges that a group tries, as parts of its whole range: cutting its tails off costs less than coarser steps."""


def pack_nibbles(q: Tensor) -> Tensor:
    """Two 4-bit values a byte along the last axis, the first in the high half."""
    q = q.to(torch.uint8)
    return (q[..., 0::2] << 4) | q[..., 1::2]


# --- nf4 ----------------------------------------------------------------------------------------------------------


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    """The 16 values, once a device: copying them there makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(NF4_VALUES, device=device)


def quantize_nf4_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed values ``[ceil(n / 2)]`` and absolute maxima ``[ceil(n / 64)]`` of blocks of the flattened weight."""
    values = _nf4_values(weight.device)
    bounds = (values[1:] + values[:-1]) / 2
    packed, maxima = [], []
    flat = weight.flatten()
    for blocks in row_chunks(F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)):
        amax = blocks.float().abs().amax(1)
        # A block of zeros is all zero whatever it is divided by, and so, but for nothing, are numbers below 2^-120.
        q = torch.bucketize(blocks.float() / amax.clamp_min(2.0**-120)[:, None], bounds, out_int32=True)
        packed.append(pack_nibbles(q.flatten()))
        maxima.append(amax)
    return torch.cat(packed)[: -(-flat.numel() // 2)], torch.cat(maxima)


def dequantize_nf4_reference(packed: Tensor, amax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of ``shape`` that :func:`quantize_nf4_reference` packed; a product in fp32, rounded once."""
    return expand_nf4_reference(packed, amax, _nf4_values(packed.device), shape, dtype)


@functools.cache
def _bitsandbytes() -> Any:
    """bitsandbytes, if it is here: its kernels, where ours are not to be had."""
    if importlib.util.find_spec("bitsandbytes") is None:
        log.warning("bitsandbytes is not installed: nf4 weights are expanded by plain PyTorch, which is slower.")
        return None
    try:
        import bitsandbytes.functional as functional
    except Exception as error:  # a native library that does not load on this machine
        log.warning(f"bitsandbytes cannot be used here ({error}): nf4 weights are expanded by plain PyTorch.")
        return None
    return functional


def expanded_by_torch(formats: Iterable[str], device: torch.device) -> str | None:
    """A sentence for records if nf4 is among the formats and no kernels for it are to be had on this card: times are
    then plain PyTorch's. On a CPU nothing else is ever used."""
    if "nf4" not in formats or device.type != "cuda" or has_nf4(device) or _bitsandbytes() is not None:
        return None
    return "nf4 weights were expanded by plain PyTorch, which is slower: there is neither Triton nor bitsandbytes."


class Nf4Linear(QuantizedLinear):
    """NormalFloat4 weights in blocks of 64, in the byte layout of bitsandbytes."""

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        n = in_features * out_features
        return {
            "weight": ((-(-n // 2),), torch.uint8),
            "weight_scale": ((-(-n // NF4_BLOCK),), torch.float32),
        }

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        packed, amax = quantize_nf4_reference(weight)
        return {"weight": packed, "weight_scale": amax}

    def channels(self, start: int, stop: int) -> dict[str, Tensor]:
        ends = start * self.in_features, stop * self.in_features
        if any(end % NF4_BLOCK for end in ends) and (start, stop) != (0, self.out_features):
            raise ValueError(
                f"Channels {start} ... {stop} of {self.in_features} nf4 weights each share blocks of {NF4_BLOCK} with "
                "others: head groups are not possible with them."
            )
        packed, scales = (slice(*(-(-end // size) for end in ends)) for size in (2, NF4_BLOCK))
        return {"weight": self.weight[packed], "weight_scale": self.weight_scale[scales]}

    def dequantized(self) -> Tensor:
        return dequantize_nf4_reference(
            self.weight, self.weight_scale, (self.out_features, self.in_features), torch.float32
        )

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        other = self.weight.is_cuda and not has_nf4(self.weight.device)
        functional = _bitsandbytes() if other else None
        if functional is None:
            return expand_nf4(self.weight, self.weight_scale, _nf4_values(self.weight.device), shape, dtype)
        state = functional.QuantState(
            self.weight_scale, shape=torch.Size(shape), code=_nf4_values(self.weight.device), blocksize=NF4_BLOCK,
            quant_type="nf4", dtype=dtype,
        )  # fmt: skip
        return functional.dequantize_4bit(self.weight[:, None], state)


# --- int4 ---------------------------------------------------------------------------------------------------------


def _quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranges in SHRINK, each group takes the one with the least squared error."""
    w = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    # A range always holds zero, so that the zero point stays in 0 ... 15, where bf16 is fine enough. It need not be a
    # whole number: that would cost more than the exact zero gains. A group of zeros is exact.
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    middle, half = (low + high) / 2, (high - low) / 2
    best: list[Tensor] = []
    for part in SHRINK:
        # The stored bf16 numbers are what counts, so the search is done with them.
        scale = (2 * half * part / 15).clamp_min(2.0**-100).bfloat16().float()
        zero = torch.where(half == 0, 8.0, 7.5 - middle / scale).bfloat16().float()
        q = (w / scale + zero).round_().clamp_(0, 15)
        error = ((q - zero) * scale - w).square_().sum(-1, keepdim=True)
        if not best:
            best = [error, q, scale, zero]
            continue
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, q, scale, zero), best, strict=True)]
    _, q, scale, zero = best
    return pack_nibbles(q.flatten(1)), scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16()


class Int4WeightLinear(QuantizedLinear):
    """0 ... 15 with scale and zero point for groups of 128 input channels: w = (q - zero) * scale."""

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        groups = -(-in_features // GROUP)
        return {
            "weight": ((out_features, groups * GROUP // 2), torch.uint8),
            "weight_scale": ((out_features, groups), torch.bfloat16),
            "weight_zero": ((out_features, groups), torch.bfloat16),
        }

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        parts = [_quantize_int4(rows) for rows in row_chunks(weight)]
        tensors = (torch.cat(t) for t in zip(*parts, strict=True))
        return dict(zip(("weight", "weight_scale", "weight_zero"), tensors, strict=True))

    def dequantized(self) -> Tensor:
        return self.compute_weight(torch.float32)

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        return expand_int4(self.weight, self.weight_scale, self.weight_zero, self.in_features, dtype)

"""The DiT's blocks by fused kernels: what TransformerBlock.forward computes, in fewer passes and fewer roundings.

What differs from the official order of operations is only where numbers are rounded: norms, modulation, the rotary
embedding and gated residuals are fp32 between one load and one store. Nothing that feeds an 8-bit product exists in
bf16: norms, GELU and quantization hand over 8-bit rows. The text's keys and values are computed once a prompt and kept.

The residual stream is changed in place. Beside it, at S tokens and width d (S d = 0.93 GB in bf16 at 544x992x204): qkv
3 S d, attention's output S d, with 8-bit attention q and k in S d more bytes; the hidden layer of the feed-forward
exists for `chunk` tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.adaln import gate_residual, gelu, layer_norm_modulate
from ...kernels.attention import MODES, attention, self_attention
from ...kernels.qk_norm_rope import norm_heads
from ...kernels.quantize import quantize_rows
from ...kernels.scaled_mm import After
from ...quant.linear import QuantizedLinear
from .transformer import CrossAttention, RopeTable, TransformerBlock

CHUNK = 18_972
"""Tokens that go through the feed-forward at a time: a quarter of 204 frames at 544x992."""

Rows = Tensor | tuple[Tensor, Tensor]
"""An activation ``[S, d]``, or its 8-bit rows and their scales."""


def rows_type(linear: nn.Module) -> tuple[torch.dtype, int] | None:
    """The 8-bit type of the rows that a linear multiplies, and how many channels are rotated together; else None."""
    if isinstance(linear, QuantizedLinear) and linear.activation is not None:
        return linear.activation, linear.rotated_together
    return None


def rows_for(linear: nn.Module, x: Tensor) -> Rows:
    """``x [S, d]`` as a linear takes it."""
    kind = rows_type(linear)
    return x if kind is None else quantize_rows(x, *kind)


def modulated(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale ``[d]`` of a norm without gain and bias that give what those of ``norm`` and then the
    modulation do."""
    gain = 1 + scale.float()
    shift, scale = norm.bias.float() * gain + shift.float(), norm.weight.float() * gain - 1
    # Every row reads them, and twice the bytes would take half as long again; of 16 bits, fp16 has the finer steps.
    kind = torch.float32 if norm.weight.dtype == torch.float32 else torch.float16
    return shift.to(kind), scale.to(kind)


def normed_for(linear: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rows:
    """norm(x) (1 + scale) + shift as a linear takes it."""
    dtype, group = rows_type(linear) or (x.dtype, 1)
    return layer_norm_modulate(x, shift, scale, eps, dtype=dtype, group=group)


def gelu_for(linear: nn.Module, x: Tensor) -> Rows:
    """GELU of ``x``, which is overwritten or dropped, as a linear takes it."""
    kind = rows_type(linear)
    return gelu(x) if kind is None else gelu(x, dtype=kind[0], group=kind[1])


def product(linear: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
    if isinstance(rows, tuple):
        return cast(QuantizedLinear, linear).product(*rows, dtype)
    return cast(Tensor, linear(rows))


def add_product(linear: nn.Module, rows: Rows, x: Tensor, gate: Tensor) -> None:
    """x = x + gate linear(rows), in place."""
    if isinstance(rows, tuple):
        cast(QuantizedLinear, linear).product(*rows, x.dtype, After(x, gate))
    else:
        gate_residual(x, cast(Tensor, linear(rows)), gate)


@dataclass
class FusedBlocks:
    """Runs the blocks of one prompt: the same text in every step.

    Args:
        context: text of each row of the batch, ``[1, L, d]``.
        mode: attention's numerics, one of kernels.attention.MODES.
        backend: what computes it; None is the default of the device.
        chunk: tokens that go through the feed-forward at a time.
    """

    context: Sequence[Tensor]
    mode: str = "bf16"
    backend: str | None = None
    chunk: int = CHUNK
    text: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Keys and values of the text ``[1, L, H, D]``, by block and row."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode has to be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.chunk < 1:
            raise ValueError(f"chunk has to be at least 1, not {self.chunk}")

    def __call__(
        self, index: int, row: int, block: TransformerBlock, x: Tensor, modulation: Tensor, rope: RopeTable
    ) -> Tensor:
        """Block ``index`` on ``x [1, S, d]`` of a row of the batch, in place; ``modulation [1, 6 d]``."""
        tokens = x[0]
        table = block.scale_shift_table + modulation.view(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.to(x.dtype).unbind(0)
        self._self_attention(block, tokens, shift1, scale1, gate1, rope)
        self._cross_attention(block.attn2, tokens, *self._text(index, row, block.attn2))
        up, down = block.ff.net[0].proj, block.ff.net[2]
        shift2, scale2 = modulated(block.norm2, shift2, scale2)
        for part in tokens.split(self.chunk):
            hidden = product(up, normed_for(up, part, shift2, scale2, block.norm2.eps), x.dtype)
            rows = gelu_for(down, hidden)
            del hidden
            add_product(down, rows, part, gate2)
        return x

    def _self_attention(
        self, block: TransformerBlock, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rope: RopeTable
    ) -> None:
        attn = block.attn1
        rows = normed_for(attn.wqkv, x, *modulated(block.norm1, shift, scale), block.norm1.eps)
        qkv = product(attn.wqkv, rows, x.dtype)
        del rows
        out = self_attention(
            qkv.view(len(x), -1, 3 * attn.head_dim), attn.q_norm.weight, attn.k_norm.weight, rope[0][:, 0],
            rope[1][:, 0], mode=self.mode, backend=self.backend, overwrite=True,
        )  # fmt: skip
        del qkv
        add_product(attn.wo, rows_for(attn.wo, out), x, gate)

    def _text(self, index: int, row: int, attn: CrossAttention) -> tuple[Tensor, Tensor]:
        found = self.text.get((index, row))
        if found is None:
            k, v = attn.wkv(self.context[row]).unflatten(-1, (-1, 2 * attn.head_dim)).chunk(2, dim=-1)
            found = self.text[index, row] = attn.k_norm(k), v.contiguous()
        return found

    def _cross_attention(self, attn: CrossAttention, x: Tensor, k: Tensor, v: Tensor) -> None:
        q = product(attn.wq, rows_for(attn.wq, x), x.dtype).view(len(x), -1, attn.head_dim)
        norm_heads(q, attn.q_norm.weight, attn.q_norm.eps)
        out = attention(q[None], k, v, backend="sdpa")[0].flatten(1)  # cuDNN: few keys are not what ours is made for
        add_product(attn.wo, rows_for(attn.wo, out), x, torch.ones_like(x[0]))

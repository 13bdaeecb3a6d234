"""The DiT's blocks by fused kernels: what TransformerBlock.forward computes, in fewer passes and fewer roundings.

What differs from the official order of operations is only where numbers are rounded: norms, modulation, the rotary
embedding and gated residuals are fp32 between one load and one store. Nothing that feeds an 8-bit product exists in
bf16: norms, GELU and quantization hand over 8-bit rows. The text's keys and values are computed once a prompt and kept.

The residual stream is changed in place. Beside it, at S tokens and width d (S d = 0.93 GB in bf16 at 544x992x204): qkv
3 S d, attention's output S d, with 8-bit attention q and k in S d more bytes; the hidden layer of the feed-forward
exists for `chunk` tokens only.

Three ways to take less: attention for some heads at a time, where qkv and what is made of it exist for those only;
keys and values of the text that are not kept; and residual streams that wait in host memory (:class:`Parking`). None
changes a bit, but that 16-bit products of other libraries may round otherwise when they are of fewer channels.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.adaln import gate_residual, gelu, layer_norm_modulate
from ...kernels.attention import (
    BACKENDS,
    MODES,
    attention,
    cross_backend,
    default_backend,
    prepare,
    self_attention,
)
from ...kernels.qk_norm_rope import norm_heads
from ...kernels.quantize import quantize_rows
from ...kernels.scaled_mm import After, row_parts
from ...offload.pinned import HostSlab, PinError, lay_out
from ...offload.planner import CHUNK
from ...quant.linear import QuantizedLinear, narrowed
from .transformer import CrossAttention, RopeTable, SelfAttention, TransformerBlock

log = logging.getLogger("solostep")

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
        head_groups: attention runs in so many groups of heads, one after the other.
        keep_text: whether the text's keys and values are kept; else each visit of a block makes them anew.
        blocks: how many there are: memory for what is kept of the text is taken for all of them at once. Bit by bit
            between the large tensors of a pass, it would keep these from using each other's.

    Raises:
        ValueError: a number that is too small, an unknown mode; when called, groups that the heads do not divide into,
            or a qkv layer that cannot give some of its channels alone.
    """

    context: Sequence[Tensor]
    mode: str = "bf16"
    backend: str | None = None
    chunk: int = CHUNK
    head_groups: int = 1
    keep_text: bool = True
    blocks: int = 0
    text: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Keys and values of the text ``[1, L, H, D]``, by block and row."""
    _stores: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Their memory ``[blocks, 2, 1, L, H, D]``, by row."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode has to be one of {', '.join(MODES)}, not {self.mode!r}")
        known = [name for name, backend in BACKENDS.items() if self.mode in backend.modes]
        if self.backend is not None and self.backend not in known:
            raise ValueError(f"backend for {self.mode} has to be one of {', '.join(known)}, not {self.backend!r}")
        if self.chunk < 1:
            raise ValueError(f"chunk has to be at least 1, not {self.chunk}")
        if self.head_groups < 1:
            raise ValueError(f"head_groups has to be at least 1, not {self.head_groups}")

    def __call__(
        self, index: int, row: int, block: TransformerBlock, x: Tensor, modulation: Tensor, rope: RopeTable,
        final: Callable[[int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Block ``index`` on ``x [1, S, d]`` of a row of the batch, in place; ``modulation [1, 6 d]``.

        ``final`` is told up to which token ``x`` is as it will be, as soon as what makes it so is enqueued.
        """
        tokens = x[0]
        table = block.scale_shift_table + modulation.view(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.to(x.dtype).unbind(0)
        self._self_attention(block, tokens, shift1, scale1, gate1, rope)
        self._cross_attention(block.attn2, tokens, *self._text(index, row, block.attn2))
        up, down = block.ff.net[0].proj, block.ff.net[2]
        shift2, scale2 = modulated(block.norm2, shift2, scale2)
        for start, end in row_parts(len(tokens), self.chunk):
            part = tokens[start:end]
            hidden = product(up, normed_for(up, part, shift2, scale2, block.norm2.eps), x.dtype)
            rows = gelu_for(down, hidden)
            del hidden
            add_product(down, rows, part, gate2)
            del rows
            if final is not None:
                final(end)
        return x

    def _self_attention(
        self, block: TransformerBlock, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rope: RopeTable
    ) -> None:
        attn = block.attn1
        rows = normed_for(attn.wqkv, x, *modulated(block.norm1, shift, scale), block.norm1.eps)
        if self.head_groups > 1:
            out = self._in_groups(attn, rows, x, rope)
            del rows
        else:
            qkv = product(attn.wqkv, rows, x.dtype)
            del rows
            out = self_attention(
                qkv.view(len(x), -1, 3 * attn.head_dim), attn.q_norm.weight, attn.k_norm.weight, rope[0][:, 0],
                rope[1][:, 0], mode=self.mode, backend=self.backend, overwrite=True,
            )  # fmt: skip
            del qkv
        add_product(attn.wo, rows_for(attn.wo, out), x, gate)

    def _in_groups(self, attn: SelfAttention, rows: Rows, x: Tensor, rope: RopeTable) -> Tensor:
        """Attention's output ``[S, d]`` from the rows that make qkv, for one group of heads after the other: of qkv and
        what is made of it, only a group's part exists at a time."""
        heads, width = x.shape[1] // attn.head_dim, attn.head_dim
        if heads % self.head_groups:
            raise ValueError(f"head_groups has to divide the {heads} heads, and {self.head_groups} does not")
        dtype = x.dtype if self.mode == "bf16" else torch.bfloat16
        out = torch.empty(len(x), heads, width, dtype=dtype, device=x.device)
        group = heads // self.head_groups
        for first in range(0, heads, group):
            # q, k and v of a head are channels side by side, and so are heads.
            linear = narrowed(attn.wqkv, 3 * width * first, 3 * width * (first + group))
            qkv = product(linear, rows, x.dtype).view(len(x), group, 3 * width)
            self._attend_to(out[:, first : first + group], qkv, attn, rope)
            del qkv
        return out.flatten(1)

    def _attend_to(self, places: Tensor, qkv: Tensor, attn: SelfAttention, rope: RopeTable) -> None:
        """Self-attention of ``qkv [S, H, 384]``, which may be overwritten, to ``places [S, H, 128]``, between whose
        tokens other heads have theirs: self_attention() writes to no such thing, the back ends do."""
        backend = self.backend
        if backend is None:
            plain = self.mode == "bf16" and qkv.dtype != torch.bfloat16
            backend = "sdpa" if plain else default_backend(qkv.device, self.mode, len(qkv))
        chosen = BACKENDS[backend]
        with torch.cuda.device(qkv.device) if qkv.is_cuda else nullcontext():
            operands = prepare(
                qkv, attn.q_norm.weight, attn.k_norm.weight, rope[0][:, 0], rope[1][:, 0],
                chosen.operand_mode(self.mode), overwrite=True,
            )  # fmt: skip
            result = chosen.run(operands, self.mode, None, places)
        if result.data_ptr() != places.data_ptr():
            places.copy_(result)

    def _text(self, index: int, row: int, attn: CrossAttention) -> tuple[Tensor, Tensor]:
        found = self.text.get((index, row))
        if found is None:
            k, v = attn.wkv(self.context[row]).unflatten(-1, (-1, 2 * attn.head_dim)).chunk(2, dim=-1)
            found = attn.k_norm(k), v.contiguous()
            if self.keep_text:
                self.text[index, row] = found = self._kept(index, row, found)
        return found

    def _kept(self, index: int, row: int, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if index >= self.blocks:
            return found
        if row not in self._stores:
            self._stores[row] = found[0].new_empty(self.blocks, 2, *found[0].shape)
        k, v = self._stores[row][index]
        return k.copy_(found[0]), v.copy_(found[1])

    def _cross_attention(self, attn: CrossAttention, x: Tensor, k: Tensor, v: Tensor) -> None:
        q = product(attn.wq, rows_for(attn.wq, x), x.dtype).view(len(x), -1, attn.head_dim)
        norm_heads(q, attn.q_norm.weight, attn.q_norm.eps)
        out = attention(q[None], k, v, backend=cross_backend(q.device))[0].flatten(1)
        del q
        add_product(attn.wo, rows_for(attn.wo, out), x, torch.ones_like(x[0]))


class Parking:
    """Host memory where the residual streams of all rows but one wait, in one pass after the other.

    S d values for each row of the batch, pinned for a card; taken at the first pass and given back with the object.
    """

    def __init__(self) -> None:
        self._slab: HostSlab | None = None
        self._stream: torch.cuda.Stream | None = None
        self._free: weakref.finalize | None = None

    def park(self, rows: Iterable[Tensor], count: int) -> ParkedRows:
        """Takes ``count`` residual streams ``[1, S, d]``, made one after the other; the last stays on the device."""
        there = None
        if self._stream is not None:  # copies of a pass that was given up
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for i, row in enumerate(rows):
            host = self._places(row, count)
            if i + 1 == count:
                there = row.contiguous()
            else:
                host[i].copy_(row, non_blocking=True)
            del row
        if there is None:
            raise ValueError(f"there are fewer than {count} rows")
        if there.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(there.device)
        return ParkedRows(host, there, self._stream)

    def _places(self, row: Tensor, count: int) -> list[Tensor]:
        """Memory for each row, alike ``row``."""
        like = torch.empty(row.shape, dtype=row.dtype, device="meta")
        layout = lay_out({str(i): torch.empty_like(like) for i in range(count)})
        if self._slab is None or self._slab.layout != layout:
            if self._free is not None:
                self._free()
            with torch.inference_mode(False):  # it may be used where gradients are
                self._slab = HostSlab(layout)
            self._free = weakref.finalize(self, _give_back, self._slab, row.device)
            if row.is_cuda:
                try:
                    self._slab.pin()
                except PinError as error:
                    log.warning(f"Residual streams wait in memory that is slow to copy: {error}.")
        return list(self._slab.views().values())


def _give_back(slab: HostSlab, device: torch.device) -> None:
    if slab.pinned:
        torch.cuda.synchronize(device)  # the host may be ahead of copies
    slab.close()


class ParkedRows:
    """The residual streams of one pass: that of one row in a place on the device, the others in host memory.

    Where two rows change places, tokens that are final leave while later ones still compute, and those of the next row
    come into their places behind them. What is left to wait for is the last chunk of tokens.
    """

    def __init__(self, host: Sequence[Tensor], place: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.host, self.place, self._stream = host, place, stream
        self._there = len(host) - 1
        self._next: int | None = None
        self._left = 0
        if stream is not None:
            place.record_stream(stream)  # a pass may be given up while copies are under way

    def turns(self) -> Iterator[tuple[int, Tensor]]:
        """Each row and its stream ``[1, S, d]``, to be changed in place, from the row that is there already on."""
        order = [self._there, *(i for i in range(len(self.host)) if i != self._there)]
        for i, following in zip(order, [*order[1:], None], strict=True):
            self._there, self._next, self._left = i, following, 0
            yield i, self.place
            self.final(self.place.shape[1])
            if self._stream is not None:
                torch.cuda.current_stream(self.place.device).wait_stream(self._stream)

    def final(self, stop: int) -> None:
        """Tokens up to ``stop`` change no more in this turn: if another row follows, it takes their places."""
        if self._next is None or stop <= self._left:
            return
        tokens = slice(self._left, stop)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.place.device))
        with torch.cuda.stream(self._stream):  # None: as it is
            self.host[self._there][:, tokens].copy_(self.place[:, tokens], non_blocking=True)
            self.place[:, tokens].copy_(self.host[self._next][:, tokens], non_blocking=True)
        self._left = stop

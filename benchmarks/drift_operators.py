"""Errors of single operators of a DiT block: what a mode makes of the inputs that they have in the official block.

An error is a relative L2 distance to the official operator's own output. Operators go by the names of the linears
(``attn1.wqkv``, ``ff.net.2`` ...), and two more, ``attn1.attention`` and ``attn2.attention``: from the products q, k
and v to what ``wo`` reads, norms, rotary embedding and quantization of the operands among it. An operator that a mode
computes as the official block does is left out.

Of more than TOKENS tokens so many are compared, spread evenly: rows of a product and queries of attention are
independent of each other, and every query sees all keys. At 75,888 tokens that is a twentieth of the work of a block,
and attention's passes over all queries, keys and values. Memory: q and k of such a pass, up to 2 S d values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from solostep.benchmarks.drift_distances import relative
from solostep.benchmarks.floors import attended_by
from solostep.engine.errors import SolostepError
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import CrossAttention, RopeTable, SelfAttention, apply_rope, attend
from solostep.engine.probe import cast_floats
from solostep.kernels.attention import BACKENDS, attention, default_backend, prepare
from solostep.kernels.qk_norm_rope import norm_heads

TOKENS = 4096

Some = Tensor | slice
"""Which tokens are compared."""


@dataclass
class Other:
    """A mode's block beside the official one; ``fused`` runs it if its attention is not the official one.

    ``errors`` get a number for each row that goes through, by operator.
    """

    block: nn.Module
    fused: FusedBlocks | None = None
    name: str = "this mode"
    errors: dict[str, list[float]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of its activations."""
        return next(p.dtype for p in self.block.parameters() if p.dtype in (torch.bfloat16, torch.float32))

    def differs(self, name: str, official: nn.Module) -> bool:
        """Whether it computes a linear, or an attention, otherwise."""
        mine = self.block.get_submodule(name)
        if isinstance(official, nn.Linear):  # another package may keep the class, and put its own tensor into it
            other = type(getattr(mine, "weight", None)) is not type(official.weight)
        else:
            other = self.fused is not None
        return other or type(mine) is not type(official) or self.dtype != next(official.parameters()).dtype

    def note(self, name: str, made: Tensor, wanted: Tensor) -> None:
        try:
            self.errors.setdefault(name, []).append(relative(made, wanted))
        except SolostepError as error:
            raise SolostepError(f"{name} of {self.name}: {error}") from None


def sampled(tokens: int, device: torch.device) -> Some:
    """Up to TOKENS of the tokens, evenly spread."""
    if tokens <= TOKENS:
        return slice(None)
    return torch.linspace(0, tokens - 1, TOKENS, dtype=torch.float64).round().long().to(device)


@contextlib.contextmanager
def watched(official: nn.Module, others: Sequence[Other], rope: RopeTable) -> Iterator[None]:
    """While it is open, each row that goes through the official block is what operators of others are measured on."""
    hooks: list[Any] = []
    try:
        for name, module in official.named_modules():
            mine = [o for o in others if isinstance(module, _MEASURED) and o.differs(name, module)]
            if not mine:
                continue
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_hook(_product(name, mine)))
            else:
                hooks += _attention(name, cast("SelfAttention | CrossAttention", module), mine, rope)
        yield
    finally:
        for hook in hooks:
            hook.remove()


_MEASURED = (nn.Linear, SelfAttention, CrossAttention)


def _product(name: str, others: Sequence[Other]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(linear: nn.Module, given: Any, out: Tensor) -> None:
        some = sampled(out.shape[1], out.device)
        x, wanted = given[0][:, some], out[:, some]
        for other in others:
            other.note(name, other.block.get_submodule(name)(cast_floats(x, other.dtype)), wanted)

    return hook


def _attention(
    name: str, official: SelfAttention | CrossAttention, others: Sequence[Other], rope: RopeTable
) -> list[Any]:
    """Hooks on the linears around an attention: products are kept until ``wo`` is given what was made of them."""
    kept: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda linear, given, out: kept.update({key: out})

    def compare(linear: nn.Module, reads: Any) -> None:
        some = sampled(reads[0].shape[1], reads[0].device)
        wanted = reads[0][:, some]
        for other in others:
            attn = other.block.get_submodule(name)
            given, tables = cast_floats((tuple(kept.values()), rope), other.dtype)
            if isinstance(attn, SelfAttention):
                made = _self(other.fused, attn, *given, tables, some)
            else:
                made = _cross(other.fused, cast(CrossAttention, attn), given[0][:, some], given[1])
            other.note(f"{name}.attention", made, wanted)
        kept.clear()

    if isinstance(official, SelfAttention):
        hooks = [official.wqkv.register_forward_hook(keep("qkv"))]
    else:
        hooks = [official.wq.register_forward_hook(keep("q")), official.wkv.register_forward_hook(keep("kv"))]
    return [*hooks, official.wo.register_forward_pre_hook(compare)]


def _self(fused: FusedBlocks | None, attn: SelfAttention, qkv: Tensor, rope: RopeTable, some: Some) -> Tensor:
    """Self-attention ``[1, n, d]`` of some queries of ``qkv [1, S, 3 d]``."""
    width = attn.head_dim
    heads = qkv.unflatten(-1, (-1, 3 * width))
    if fused is None:
        q, k, v = heads.chunk(3, dim=-1)
        q = apply_rope(attn.q_norm(q[:, some]), (rope[0][some], rope[1][some]))
        with attended_by(getattr(attn, "attended_by", None)):
            return attend(q, apply_rope(attn.k_norm(k), rope), v)
    x = heads[0]
    name = fused.backend
    if name is None:
        plain = fused.mode == "bf16" and x.dtype != torch.bfloat16
        name = "sdpa" if plain else default_backend(x.device, fused.mode, len(x))
    backend = BACKENDS[name]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        operands = prepare(
            x, attn.q_norm.weight, attn.k_norm.weight, rope[0][:, 0], rope[1][:, 0], backend.operand_mode(fused.mode)
        )  # fmt: skip
        scale = None if operands.q_scale is None else operands.q_scale[:, some].contiguous()
        operands = replace(operands, q=operands.q[some].contiguous(), q_scale=scale)
        return backend.run(operands, fused.mode, None, None).flatten(1)[None]


def _cross(fused: FusedBlocks | None, attn: CrossAttention, q: Tensor, kv: Tensor) -> Tensor:
    """Cross-attention ``[1, n, d]`` of queries ``[1, n, d]``."""
    q = q.unflatten(-1, (-1, attn.head_dim))
    k, v = kv.unflatten(-1, (-1, 2 * attn.head_dim)).chunk(2, dim=-1)
    k = attn.k_norm(k)
    if fused is None:
        with attended_by(getattr(attn, "attended_by", None)):
            return attend(attn.q_norm(q), k, v)
    normed = norm_heads(q[0].clone(memory_format=torch.contiguous_format), attn.q_norm.weight, attn.q_norm.eps)
    return attention(normed[None], k, v.contiguous(), backend="sdpa").flatten(2)

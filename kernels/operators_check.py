"""Whether the kernels beside self-attention and 8-bit products are right on this card, against plain torch.

    the passes of a block     quantize_rows, layer_norm_modulate, gelu, gate_residual, qk_norm_rope, norm_heads,
                              quantize_v, each in the forms that the block uses; what follows a library's
                              sums, 4-bit weights in 16 bits, and the block-scaled e4m3 product of cards of 12.0
    causal attention          Step-LLM's, biased by distance, and the VAE's 512-wide head
    cross-attention           torch's kernels with few keys, at lengths that differ from row to row

Operands are fresh random numbers, some channels and rows of which stick out, at the DiT's widths and at odd counts of
rows; also rows that fp16 does not hold, and on a card as many tokens as kernels have a form of their own for. Memory
that is written to held NaN before. The error is that of the row that errs most, relative L2, against fp32
or fp64 without rounding. Allowed is what the plain form in torch errs by, of which a kernel's roundings may differ a
little, and a part more. A row with an infinity has to come out with a scale of NaN.

Some hundred rows each, where not more are needed; what takes the time, a few seconds in all, is compiling, of which a
run has the most part anyway. What is wrong here is not used (refused.py): the operators have a form in torch, and
cross-attention has more than one kernel there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import adaln, attention_causal, block_scaled, expand, qk_norm_rope, quantize, scaled_mm, values
from .attention import BACKENDS, CROSS, HEAD_DIM, Operands, cross_name
from .attention_check import Verdict, exact
from .cards import reason_of
from .scaled_mm_check import LIMITS, Case, activation_like, exact_product, make_operands, poison, row_error

DIM = 6144
ROWS = 517
LONG = 33_003
"""Tokens for which the passes before attention take their forms for many: qk_norm_rope.MANY, values.SAMPLED_FROM, and
more than 16 parts of each pass of values."""
MORE = 1.25
"""How much more than the plain form a kernel may err."""
FLOOR = 1.5e-3
"""And what any may err by besides: another order of sums, and bf16 rounded the other way in a tie."""
WEIGHTS = 3e-3
"""The same where softmax weights are rounded to bf16: by 2^-9, all of a row's alike where it sees one key or two."""
FORMS = {"16 bits": (torch.bfloat16, 1), "int8": (torch.int8, 256), "e4m3": (torch.float8_e4m3fn, 1)}


class Fault(Exception):
    """What is wrong with a result; ``error`` is its size."""

    def __init__(self, reason: str, error: float = float("nan")) -> None:
        super().__init__(reason)
        self.error = error


Check = Callable[[torch.Generator], dict[str, float]]
"""Runs one operator on new operands: errors by what was compared. Raises Fault where one is above its limit."""


def _judged(label: str, found: Tensor, plain: Tensor, true: Tensor, more: float = FLOOR) -> dict[str, float]:
    """The error of ``found``, held against that of the plain form; rows are compared along the last axis."""
    error, limit = row_error(found, true), MORE * row_error(plain, true) + more
    if not error <= limit:
        raise Fault(f"{label}: relative error {error:.1e}, allowed {limit:.1e}", error)
    return {label: error}


def _bf16(found: Tensor, true: Tensor, label: str = "rows", more: float = FLOOR) -> dict[str, float]:
    return _judged(label, found, true.bfloat16(), true, more)


def _values(found: tuple[Tensor, Tensor]) -> Tensor:
    return found[0].float() * found[1][..., None]


def _lengths(device: torch.device) -> tuple[int, ...]:
    """Tokens that the passes before attention are examined with."""
    return (ROWS, LONG) if device.type == "cuda" else (ROWS,)


def _of_length(label: str, tokens: int) -> str:
    return label if tokens == ROWS else f"{label} of {tokens:,} tokens"


def _row_operator(
    generator: torch.Generator, channels: int, form: str, run: Callable[[Tensor, torch.dtype, int], Any],
    reference: Callable[[Tensor], Tensor], label: str = "rows",
) -> dict[str, float]:  # fmt: skip
    """An operator on rows with an output in one of FORMS."""
    dtype, group = FORMS[form]
    x = activation_like(ROWS, channels, generator)
    x[1::50] *= 1e3  # beyond fp16 where they are added up in a rotation
    x[2::50] *= 1e-5
    true = reference(x)
    poison((ROWS, channels), dtype, x.device)
    found = run(x.clone(), dtype, group)
    if form == "16 bits":
        return _bf16(found, true, label)
    turned = quantize.rotate(true, group)
    errors = _judged(label, _values(found), _values(quantize.quantize_rows_reference(true, dtype, group)), turned)
    x[3, 5] = float("inf")
    _, scale = run(x, dtype, group)
    if not bool(scale[3].isnan()) or not bool(scale.isfinite().sum() == ROWS - 1):
        raise Fault("a row with an infinity does not come out as NaN alone")
    return errors


def _quantize_rows(form: str) -> Check:
    return lambda generator: _row_operator(generator, DIM, form, quantize.quantize_rows, lambda x: x.float())


def _layer_norm_modulate(form: str) -> Check:
    def check(generator: torch.Generator) -> dict[str, float]:
        errors: dict[str, float] = {}
        # Also with little left of each row: too little for the form that rotates in fp16.
        for label, size, middle in (("rows", 1.0, 0.0), ("small rows", 2.0**-11, -1.0)):
            shift, scale = torch.randn(2, DIM, device=generator.device, generator=generator) * size
            shift, scale = shift.half(), (scale + middle).half()
            errors |= _row_operator(
                generator, DIM, form,
                lambda x, dtype, group: adaln.layer_norm_modulate(x, shift, scale, dtype=dtype, group=group),  # noqa: B023
                lambda x: adaln.layer_norm_modulate_reference(x, shift, scale, 1e-5), label,  # noqa: B023
            )  # fmt: skip
        return errors

    return check


def _gelu(form: str) -> Check:
    def run(x: Tensor, dtype: torch.dtype, group: int) -> Any:
        return adaln.gelu(x) if form == "16 bits" else adaln.gelu(x, dtype=dtype, group=group)

    return lambda generator: _row_operator(generator, 4 * DIM, form, run, adaln.gelu_reference)


def _gate_residual(generator: torch.Generator) -> dict[str, float]:
    x, y = (activation_like(ROWS, DIM, generator) for _ in range(2))
    gate = activation_like(1, DIM, generator)[0]
    true = adaln.gate_residual_reference(x, y, gate)
    return _bf16(adaln.gate_residual(x, y, gate), true)


def _follow_sums(generator: torch.Generator) -> dict[str, float]:
    """Sums with rows that lie apart, as those of a padded product."""
    errors: dict[str, float] = {}
    for label, bias, gated in (("rows", False, False), ("bias, gated", True, True)):
        x = make_operands(Case("", ROWS, 1160, 64, bias=bias, gated=gated), "int8", generator)
        sums = torch.full((ROWS, 1168), 2**30, dtype=torch.int32, device=x.a.device)
        sums[:, :1160] = x.a.double() @ x.b.double().t()
        true = exact_product(replace(x, out_dtype=torch.float32))
        poison((ROWS, 1160), torch.bfloat16, x.a.device)
        errors |= _bf16(scaled_mm.follow_sums(x, sums[:, :1160]), true, label)
    return errors


def _expand_int4(generator: torch.Generator) -> dict[str, float]:
    """Rows that end within a group."""
    like: dict[str, Any] = {"device": generator.device, "generator": generator}
    groups, columns = -(-1160 // expand.GROUP), 1160
    packed = torch.randint(256, (ROWS, groups * expand.GROUP // 2), **like).to(torch.uint8)
    scale, zero = (0.1 + torch.rand(2, ROWS, groups, **like)).bfloat16() * 8
    true = expand.expand_int4_reference(packed, scale, zero, columns, torch.float32)
    poison((ROWS, columns), torch.bfloat16, packed.device)
    return _bf16(expand.expand_int4(packed, scale, zero, columns, torch.bfloat16), true)


def _expand_nf4(generator: torch.Generator) -> dict[str, float]:
    """A number of values that ends within a block, and within a byte."""
    like: dict[str, Any] = {"device": generator.device, "generator": generator}
    shape = (ROWS, 1161)
    n = shape[0] * shape[1]
    packed = torch.randint(256, (-(-n // 2),), **like).to(torch.uint8)
    amax, values = torch.rand(-(-n // expand.NF4_BLOCK), **like), torch.randn(16, **like)
    true = expand.expand_nf4_reference(packed, amax, values, shape, torch.float32)
    poison(shape, torch.bfloat16, packed.device)
    return _bf16(expand.expand_nf4(packed, amax, values, shape, torch.bfloat16), true)


def _block_scaled(generator: torch.Generator) -> dict[str, float]:
    """In a product; attention has its own examination, and takes this one's word."""
    x = make_operands(Case("", ROWS, 776, 1040), "fp8", generator)
    poison((ROWS, 776), torch.bfloat16, x.a.device)
    error = row_error(scaled_mm.by_triton(x), exact_product(x))
    if not error <= LIMITS["fp8"]:
        raise Fault(f"rows: relative error {error:.1e}, allowed {LIMITS['fp8']:.1e}", error)
    return {"rows": error}


def _norm_heads(generator: torch.Generator) -> dict[str, float]:
    x = activation_like(ROWS, DIM, generator).unflatten(-1, (-1, HEAD_DIM))
    weight = 1 + torch.rand(HEAD_DIM, device=generator.device, generator=generator)
    true = qk_norm_rope.norm_heads_reference(x, weight)
    return _bf16(qk_norm_rope.norm_heads(x, weight), true)


def _qk_norm_rope(form: str) -> Check:
    def check(generator: torch.Generator) -> dict[str, float]:
        errors: dict[str, float] = {}
        for tokens in _lengths(generator.device) if form == "int8" else (ROWS,):
            errors |= _qk_of_tokens(generator, form == "int8", tokens, 6 if tokens == ROWS else 2)
        return errors

    return check


def _qk_of_tokens(generator: torch.Generator, quantized: bool, tokens: int, heads: int) -> dict[str, float]:
    """Gains and means that stick out, as those of trained norms do."""
    like: dict[str, Any] = {"device": generator.device, "generator": generator}
    qkv = activation_like(tokens, heads * 3 * HEAD_DIM, generator).unflatten(-1, (heads, 3 * HEAD_DIM))
    qkv[..., HEAD_DIM : 2 * HEAD_DIM] += 3 * torch.randn(heads, HEAD_DIM, **like).bfloat16()
    gains = [1 + torch.rand(HEAD_DIM, **like) for _ in range(2)]
    for gain in gains:
        gain[torch.randperm(HEAD_DIM, **like)[:3]] *= 20
    frame, row, column = torch.randn(tokens, HEAD_DIM // 2, **like).split((32, 16, 16), dim=1)
    angles = torch.cat([frame, frame, row, row, column, column], dim=1)
    operands = qkv, *gains, angles.cos(), angles.sin()
    poison((tokens, heads, HEAD_DIM), torch.int8, qkv.device)
    found = qk_norm_rope.qk_norm_rope(qkv.clone(), *operands[1:], quantize=quantized, overwrite=True)
    plain = qk_norm_rope._on_cpu(*operands, quantized, 1e-6)
    parts = (qkv[..., :HEAD_DIM], qkv[..., HEAD_DIM : 2 * HEAD_DIM])
    true = [
        qk_norm_rope.qk_norm_rope_reference(part, gain, *operands[3:]) for part, gain in zip(parts, gains, strict=True)
    ]
    if not quantized:
        return _bf16(found[0], true[0], "q") | _bf16(found[1], true[1], "k")
    mean = qk_norm_rope.k_mean_reference(true[1])
    turned = [quantize.hadamard(t, HEAD_DIM) for t in (true[0], true[1] - mean)]
    errors: dict[str, float] = {}
    for i, name in enumerate(("q", "k")):
        wide, wanted = (_of_heads(x[i], x[2 + i], name) for x in (found, plain))
        errors |= _judged(_of_length(name, tokens), wide, wanted, turned[i])
    return errors


def _of_heads(x: Tensor, scale: Tensor | None, name: str) -> Tensor:
    """int8 q or k in fp32."""
    assert scale is not None
    scale = scale if name == "q" else qk_norm_rope.scale_of_keys(scale, len(x))
    return x.float() * scale.t()[..., None]


def _quantize_v(generator: torch.Generator) -> dict[str, float]:
    errors: dict[str, float] = {}
    for tokens in _lengths(generator.device):
        errors |= _v_of_tokens(generator, tokens, 6 if tokens == ROWS else 2)
    return errors


def _v_of_tokens(generator: torch.Generator, tokens: int, heads: int) -> dict[str, float]:
    v = activation_like(tokens, heads * HEAD_DIM, generator).unflatten(-1, (heads, HEAD_DIM))
    if tokens >= values.SAMPLED_FROM:  # outside the sample, and so far that the last head is gone over again
        v[values.FIRST, -1, 0] = 20 * v[:, -1, 0].abs().max()
    poison((heads, HEAD_DIM, -(-tokens // 16) * 16), torch.float8_e4m3fn, v.device)
    found, plain = values.quantize_v(v), values.quantize_v_reference(v)
    true = v.float().permute(1, 2, 0)

    def wide(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, scale, add = x
        q = q.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
        if bool(q[..., tokens:].ne(0).any()):  # a NaN too
            raise Fault("it is not zero beyond the last token")
        return q[..., :tokens] * scale[..., None] + add[..., None]

    return _judged(_of_length("channels", tokens), wide(found), wide(plain), true)


def _biased(generator: torch.Generator) -> dict[str, float]:
    """Of Step-LLM's shape, in its wqkv product."""
    heads, groups, width, length = 12, 2, HEAD_DIM, 333
    wide = torch.randn(length, (heads + 2 * groups) * width, device=generator.device, generator=generator).bfloat16()
    q, k, v = wide.unflatten(-1, (-1, width)).split([heads, groups, groups], dim=1)
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=wide.device)
    out = torch.full((length, heads, width), float("nan"), dtype=torch.bfloat16, device=wide.device)
    attention_causal.biased_causal_attention(q, k, v, slopes, out=out)
    return _bf16(out, attention_causal.biased_causal_attention_reference(q, k, v, slopes), more=WEIGHTS)


def _wide_causal(generator: torch.Generator) -> dict[str, float]:
    shape = (2, 1003, attention_causal.WIDE)
    q, k, v = (torch.randn(shape, device=generator.device, generator=generator).bfloat16() for _ in range(3))
    q = q * 3  # rows that look at few keys
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=q.device)
    attention_causal.frame_causal_attention(q, k, v, out=out)
    return _bf16(out, attention_causal.frame_causal_attention_reference(q, k, v), more=WEIGHTS)


def _cross(name: str) -> Check:
    def check(generator: torch.Generator) -> dict[str, float]:
        errors: dict[str, float] = {}
        for keys in (79, 397):
            q, k, v = (
                torch.randn(n, 4, HEAD_DIM, device=generator.device, generator=generator).bfloat16()
                for n in (ROWS, keys, keys)
            )
            poison(q.shape, torch.bfloat16, q.device)
            found = BACKENDS[name].run(Operands(q * 2, k, v), "bf16", None, None)
            true = exact(q * 2, k, v, torch.arange(ROWS, device=q.device), range(4))
            errors |= _bf16(found, true, f"{keys} keys", WEIGHTS)
        return errors

    return check


CHECKS: dict[str, Check] = {
    **{f"quantize_rows {form}": _quantize_rows(form) for form in ("int8", "e4m3")},
    **{f"layer_norm_modulate {form}": _layer_norm_modulate(form) for form in FORMS},
    **{f"gelu {form}": _gelu(form) for form in FORMS},
    "gate_residual": _gate_residual,
    "follow_sums": _follow_sums,
    expand.INT4: _expand_int4,
    expand.NF4: _expand_nf4,
    block_scaled.NAME: _block_scaled,
    **{f"qk_norm_rope {form}": _qk_norm_rope(form) for form in ("16 bits", "int8")},
    "norm_heads": _norm_heads,
    "quantize_v": _quantize_v,
    attention_causal.BIASED: _biased,
    attention_causal.FRAMES: _wide_causal,
    **{cross_name(name): _cross(name) for name in CROSS},
}
"""By the names under which refused.py has them."""


def examine_operators(device: torch.device, seed: int = 0, names: Iterable[str] | None = None) -> list[Verdict]:
    """Errors and a verdict of each operator (default: all of CHECKS) on a device; nothing is timed."""
    found = []
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for i, name in enumerate(CHECKS if names is None else names):
            found.append(_examined(name, torch.Generator(device).manual_seed(seed + i)))
    return found


def _examined(name: str, generator: torch.Generator) -> Verdict:
    backend, reason = name.removeprefix(cross_name("")), None
    if backend in CROSS:
        reason = BACKENDS[backend].available(generator.device, "bf16")
    elif name == block_scaled.NAME:
        reason = block_scaled.missing(generator.device)
    if reason is not None:
        return Verdict("", name, "unavailable", reason)
    try:
        return Verdict("", name, "ok", "", CHECKS[name](generator))
    except Fault as fault:
        return Verdict("", name, "wrong", str(fault), {"rows": fault.error})
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        text = reason_of(error)
        return Verdict("", name, "failed", text)

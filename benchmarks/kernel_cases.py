"""The operators that kernels.py times: inputs, what they compute, their errors and the work that counts."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.benchmarks.linear_speed import DIM, LINEARS, ROTATED
from solostep.kernels import adaln, attention
from solostep.kernels.attention import BACKENDS, HEAD_DIM, MODES, default_backend
from solostep.kernels.attention_check import exact, make_inputs, relative_error, sampled_rows
from solostep.kernels.qk_norm_rope import (
    key_groups,
    qk_norm_rope,
    qk_norm_rope_reference,
    quantize_qk_reference,
    sampled_tokens,
    scale_of_keys,
)
from solostep.kernels.quantize import quantize_rows, quantize_rows_reference
from solostep.kernels.scaled_mm import KINDS, NOTHING, PRODUCTS, Operands, scaled_mm_fp8, scaled_mm_int8
from solostep.kernels.scaled_mm_check import exact_product
from solostep.kernels.values import quantize_v

INT8, FP8 = torch.int8, torch.float8_e4m3fn
FORMATS = {"int8 rotated": (INT8, ROTATED), "int8 plain": (INT8, 1), "fp8": (FP8, 1)}
CHUNK = 18_972
"""Tokens that the feed-forward takes at a time."""


@dataclass(frozen=True)
class Case:
    """One line of the table before it is timed."""

    name: str
    run: Callable[[], Any]
    work: float
    """Bytes it has to move, or floating-point operations."""
    error: Callable[[], float] | None = None


@dataclass(frozen=True)
class Group:
    """What is timed in turns; ``baseline`` names the case that ratios refer to."""

    name: str
    shape: str
    unit: str
    """TB/s or TFLOP/s."""
    baseline: str
    cases: Sequence[Case]


# ---------------------------------------------------------------- passes


def _dequantized(found: tuple[Tensor, Tensor]) -> Tensor:
    return found[0].float() * found[1][..., None]


def _row_error(run: Callable[[], Any], want: Callable[[Tensor], Tensor], some: Tensor, form: str | None) -> float:
    """Of rows, quantized (``form``) or not; quantized ones are compared in their rotated form."""
    found, true = run(), want(some)
    if form is None:
        return relative_error(found[some], true.double())
    dtype, group = FORMATS[form]
    q, scale = found
    return relative_error(
        _dequantized((q[some], scale[some])), _dequantized(quantize_rows_reference(true, dtype, group))
    )


def _row_cases(
    x: Tensor, operator: Callable[..., Any], reference: Callable[[Tensor], Tensor], forms: Sequence[str]
) -> list[Case]:
    """Quantizing variants of a row operator ``operator(dtype=, group=)``."""
    some, cases = sampled_rows(len(x), x.device), []
    for form in forms:
        dtype, group = FORMATS[form]

        def run(dtype: torch.dtype = dtype, group: int = group) -> Any:
            return operator(dtype=dtype, group=group)

        def error(run: Callable[[], Any] = run, form: str = form) -> float:
            return _row_error(run, lambda rows: reference(x[rows]), some, form)

        cases.append(Case(form, run, 3 * x.numel(), error))
    return cases


def norm_group(tokens: int, device: torch.device) -> Group:
    x = torch.randn(tokens, DIM, device=device, dtype=torch.bfloat16)
    shift, scale = (torch.randn(DIM, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(**form: Any) -> Any:
        return adaln.layer_norm_modulate(x, shift, scale, **form)

    def reference(rows: Tensor) -> Tensor:
        return adaln.layer_norm_modulate_reference(rows, shift, scale, 1e-5)

    some = sampled_rows(tokens, device)
    cases = [
        Case("torch eager", lambda: F.layer_norm(x, (DIM,), eps=1e-5) * (1 + scale) + shift, 4 * x.numel()),
        Case("bf16", run, 4 * x.numel(), lambda: _row_error(run, lambda rows: reference(x[rows]), some, None)),
        *_row_cases(x, run, reference, ("int8 rotated", "fp8")),
    ]
    return Group("layer_norm_modulate", f"{tokens} x {DIM}", "TB/s", "torch eager", cases)


def gate_group(tokens: int, device: torch.device) -> Group:
    x, y = (torch.randn(tokens, DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    gate = torch.randn(DIM, device=device, dtype=torch.bfloat16) * 1e-3  # it is added many times over
    some = sampled_rows(tokens, device)

    def error() -> float:
        true = x[some].double() + gate.double() * y[some].double()
        return relative_error(adaln.gate_residual(x, y, gate)[some], true)

    cases = [
        Case("torch eager", lambda: x + gate * y, 6 * x.numel()),
        Case("in place", lambda: adaln.gate_residual(x, y, gate), 6 * x.numel(), error),
    ]
    return Group("gate_residual", f"{tokens} x {DIM}", "TB/s", "torch eager", cases)


def gelu_group(tokens: int, device: torch.device) -> Group:
    x = torch.randn(min(CHUNK, tokens), 4 * DIM, device=device, dtype=torch.bfloat16)
    work = torch.empty_like(x)  # in place, GELU over and over leaves nothing
    some = sampled_rows(len(x), device)

    def error() -> float:
        work.copy_(x)
        return relative_error(adaln.gelu(work)[some], adaln.gelu_reference(x[some]).double())

    cases = [
        Case("torch eager", lambda: F.gelu(x, approximate="tanh"), 4 * x.numel()),
        Case("in place", lambda: adaln.gelu(work), 4 * x.numel(), error),
        *_row_cases(x, lambda **form: adaln.gelu(x, **form), adaln.gelu_reference, ("int8 rotated", "fp8")),
    ]
    return Group("gelu", f"{len(x)} x {4 * DIM}", "TB/s", "torch eager", cases)


def quantize_group(tokens: int, device: torch.device) -> Group:
    x = torch.randn(tokens, DIM, device=device, dtype=torch.bfloat16)

    def eager() -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1).float() / 127
        return (x / scale[:, None]).round().to(INT8), scale

    cases = [
        Case("torch eager int8", eager, 3 * x.numel()),
        *_row_cases(x, lambda **form: quantize_rows(x, **form), lambda rows: rows.float(), tuple(FORMATS)),
    ]
    return Group("quantize_rows", f"{tokens} x {DIM}", "TB/s", "torch eager int8", cases)


def _eager_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In bf16, an operation at a time."""
    y = F.rms_norm(x, (HEAD_DIM,), weight.to(x.dtype), 1e-6)
    turned = []
    for part in y.split((64, 32, 32), dim=-1):
        first, second = part.chunk(2, dim=-1)
        turned += [-second, first]
    return y * cos.to(x.dtype)[:, None] + torch.cat(turned, dim=-1) * sin.to(x.dtype)[:, None]


def attention_passes(tokens: int, heads: int, device: torch.device) -> Iterator[Group]:
    """QK-norm with rotary embedding, and V's quantization."""
    x = make_inputs("normal", tokens, heads, device)
    some = sampled_rows(tokens, device)
    values, tables = tokens * heads * HEAD_DIM, 2 * 4 * tokens * HEAD_DIM
    q, k, v = x.qkv.split(HEAD_DIM, dim=-1)

    def eager() -> tuple[Tensor, Tensor]:
        return tuple(_eager_norm_rope(part, x.q_weight, x.cos, x.sin) for part in (q, k))  # type: ignore[return-value]

    def run(quantize: bool = False) -> Any:
        return qk_norm_rope(x.qkv, x.q_weight, x.k_weight, x.cos, x.sin, quantize=quantize)

    def true(part: Tensor, rows: Tensor | slice) -> Tensor:
        return qk_norm_rope_reference(part[rows], x.q_weight, x.cos[rows], x.sin[rows])

    def error_8() -> float:
        q8, k8, q_scale, k_scale = run(True)
        length = min(tokens, 1280)  # whole blocks of keys; but K's mean is of all tokens
        step, _ = sampled_tokens(tokens)
        mean = qk_norm_rope_reference(k[::step], x.k_weight, x.cos[::step], x.sin[::step]).mean(0)
        want = quantize_qk_reference(true(q, slice(length)), true(k, slice(length)), mean)

        def spread(scale: Tensor) -> Tensor:
            return scale_of_keys(scale, length).t()[..., None]

        pairs = (
            (q8[:length], q_scale[:, :length].t()[..., None], want[0], want[2].t()[..., None]),
            (k8[:length], spread(k_scale[:, : key_groups(length)]), want[1], spread(want[3])),
        )
        return max(relative_error(a.float() * s, b.double() * t) for a, s, b, t in pairs)

    shape = f"{tokens} x {heads} x {HEAD_DIM}"
    yield Group("qk_norm_rope", shape, "TB/s", "torch eager", [
        Case("torch eager", eager, 8 * values + tables),
        Case("bf16", run, 8 * values + tables, lambda: relative_error(run()[0][some], true(q, some).double())),
        Case("int8", lambda: run(True), 6 * values + tables, error_8),
    ])  # fmt: skip
    yield from _quantize_v(v, shape)


def _quantize_v(v: Tensor, shape: str) -> Iterator[Group]:
    some = sampled_rows(len(v), v.device)

    def eager() -> Tensor:
        y = v.float() - v.float().mean(0)
        return (y / (y.abs().amax(0) / 448)).permute(1, 2, 0).to(FP8).contiguous()

    def error() -> float:
        v8, scale, mean = quantize_v(v)
        place = some // 16 * 16 + (some % 8 // 2) * 4 + (some % 16 // 8) * 2 + some % 2  # see permute_keys()
        found = v8[..., place].float() * scale[..., None] + mean[..., None]
        return relative_error(found.permute(2, 0, 1), v[some].double())

    yield Group("quantize_v", shape, "TB/s", "torch eager", [
        Case("torch eager", eager, 3 * v.numel()), Case("e4m3", lambda: quantize_v(v), 3 * v.numel(), error),
    ])  # fmt: skip


# ---------------------------------------------------------------- attention and products


def _compared(device: torch.device, mode: str, tokens: int) -> set[str]:
    """What others are held against, and the usual back end of a mode, if there is one for the card."""
    with contextlib.suppress(ValueError):
        return {"cudnn", default_backend(device, mode, tokens)}
    return {"cudnn"}


def attention_group(tokens: int, heads: int, device: torch.device, kind: str = "normal") -> tuple[Group, list[str]]:
    """Every mode and back end that is here, with and without its passes; and the others, with the reason. On other
    than normal inputs, what is compared with and the usual back end of each mode."""
    x = make_inputs(kind, tokens, heads, device)
    some, sample = sampled_rows(tokens, device), sorted({0, heads // 2, heads - 1})
    plain = x.operands("bf16")
    true = exact(plain.q, plain.k, plain.v, some, sample)
    forms: dict[str, attention.Operands] = {"bf16": plain}
    out = torch.empty(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
    work, cases, notes = 4.0 * tokens * tokens * heads * HEAD_DIM, [], []
    for mode in MODES:
        shown = set(BACKENDS) if kind == "normal" else _compared(device, mode, tokens)
        for name, backend in BACKENDS.items():
            if mode not in backend.modes or backend.quadratic or name not in shown:
                continue
            reason = backend.available(device, mode)
            if reason is not None:
                notes.append(f"attention, {mode}, {name}: {reason}")
                continue
            form = backend.operand_mode(mode)
            if form not in forms:
                forms[form] = x.operands(form)

            def kernel(backend=backend, mode=mode, operands=forms[form]) -> Tensor:
                return backend.run(operands, mode, None, out)

            def whole(backend=backend, mode=mode, form=form) -> Tensor:
                return backend.run(x.operands(form), mode, None, out)

            def error(kernel=kernel) -> float:
                out.fill_(math.nan)
                found = kernel()
                low, high = torch.aminmax(found)
                if not bool(torch.isfinite(low + high)):
                    return math.nan
                return relative_error(found[some][:, sample], true)

            cases += [Case(f"{mode}, {name}", kernel, work, error), Case(f"{mode}, {name} + passes", whole, work)]
    there = [case.name for case in cases]
    baseline = "bf16, cudnn" if "bf16, cudnn" in there else "bf16, sdpa"
    name = "attention" if kind == "normal" else f"attention, {kind} scores"
    return Group(name, f"{tokens} x {heads} x {HEAD_DIM}", "TFLOP/s", baseline, cases), notes


def _products(name: str, x: Tensor, weight: Tensor, some: Tensor, work: float) -> tuple[list[Case], list[str]]:
    """Products of operands that are quantized already, by every back end; and why the others are left out."""

    def case(label: str, run: Callable[[], Tensor], true: Callable[[], Tensor]) -> Case:
        return Case(label, run, work, lambda: relative_error(run()[some], true().double()))

    cases = [case("bf16", lambda: F.linear(x, weight), lambda: x[some].double() @ weight.double().t())]
    notes = []
    for kind, dtype in KINDS.items():
        (a, a_scale), (b, b_scale) = quantize_rows(x, dtype), quantize_rows(weight, dtype)
        whole = Operands(a, b, a_scale, b_scale, None, torch.bfloat16, NOTHING)
        rows = Operands(a[some], b, a_scale[some], b_scale, None, torch.bfloat16, NOTHING)
        for backend in PRODUCTS.values():
            if kind not in backend.kinds or backend.slow:
                continue
            missing = backend.available(x.device, kind)
            if missing is None and not backend.fits(whole):
                missing = "it does not take this shape"
            if missing is not None:
                notes.append(f"{name}, {kind} {backend.name}: {missing}")
                continue
            run = functools.partial(backend.run, whole)
            cases.append(case(f"{kind} {backend.name}", run, functools.partial(exact_product, rows)))
    return cases, notes


def gemm_groups(tokens: int, device: torch.device) -> Iterator[tuple[Group, list[str]]]:
    """The four linears of a block; rows "quantized there" count the quantization of the activation."""
    some = sampled_rows(tokens, device)
    for linear in LINEARS:
        x = torch.randn(tokens, linear.in_features, device=device, dtype=torch.bfloat16)
        weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=torch.bfloat16)
        weight *= linear.in_features**-0.5
        work = 2.0 * tokens * weight.numel()
        cases, notes = _products(linear.name, x, weight, some, work)
        for name, dtype, group, product in (("fp8", FP8, 1, scaled_mm_fp8), ("int8", INT8, ROTATED, scaled_mm_int8)):
            w, w_scale = quantize_rows(weight, dtype, group)

            def whole(x=x, dtype=dtype, group=group, product=product, w=w, w_scale=w_scale) -> Tensor:
                q, scale = quantize_rows(x, dtype, group)
                return product(q, w, scale, w_scale)

            def error_16(whole=whole, x=x, weight=weight) -> float:
                return relative_error(whole()[some], x[some].double() @ weight.double().t())

            cases.append(Case(f"{name}, quantized there", whole, work, error_16))
        shape = f"{tokens} x {linear.out_features} x {linear.in_features}"
        yield Group(f"product, {linear.name}", shape, "TFLOP/s", "bf16", cases), notes

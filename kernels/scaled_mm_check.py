"""Whether the 8-bit matrix products are right on this card, and how fast they are.

Every back end gets fresh random operands, compared in every row with sums in fp64, and writes over NaN. Rows and
columns end within tiles, K within a step:

    normal      N(0, 1), the longer K
    outliers    activations as they are: 1 % of the channels 50 times larger, a mean in all, one row in 50 30 times
                larger; and a bias
    gated       the same operands, the gated residual; then with a bias besides
    few rows    five, and shapes that TMA cannot address: only for back ends that take them

The error is that of the row that errs most, relative L2: a wrong row, or a wrong tile at the end, does not hide behind
the others. int8 has to be exact to the bit, with whatever follows. fp8 may lose what fast accumulation loses. Then the
shapes asked for, on sampled rows, with outliers and without; and their times, without. Quantizing is not counted.
Memory: operands in 16 and 8 bits, outputs, and what they are added to.

A block adds three of its six products to the residual stream, and back ends that are alike without that are not with
it: torch's FP8 product is as fast as ours on the qkv layer, and another pass over fp32 follows it there. So shapes say
what follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_check import Verdict, fastest_first, median_ms, sampled_rows
from .cards import reason_of
from .quantize import quantize_rows, quantize_rows_reference
from .scaled_mm import KINDS, NOTHING, PRODUCTS, After, Operands, Product, followed


class Shape(NamedTuple):
    """A linear: its name, its out and its in features, and whether its product is added to a residual under a gate."""

    name: str
    n: int
    k: int
    gated: bool = False


LIMITS = {"int8": 0.0, "fp8": 1.2e-2}
"""Errors of a row above which a product is wrong. Of e4m3 with Hopper's fast accumulation, to bf16, the largest one
emulated (benchmarks/fp8_sums.py) is 6e-3, with K = 24,576."""

BF16_LIMIT = 4e-3


@dataclass(frozen=True)
class Case:
    """Operands to compare on."""

    name: str
    rows: int
    n: int
    k: int
    outliers: bool = True
    bias: bool = False
    gated: bool = False


CASES = (
    Case("normal", 1003, 776, 6144, outliers=False),
    Case("outliers, bias", 517, 776, 1040, bias=True),
    Case("outliers, gated", 517, 776, 1152, gated=True),
    Case("outliers, bias, gated", 261, 264, 1040, bias=True, gated=True),
    Case("few rows", 5, 77, 1000),
)


@dataclass
class Examined:
    """What is known of each back end of one kind, and lines for a table: one for each shape and back end."""

    kind: str
    seed: int
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def note(self, name: str, **what: Any) -> None:
        self.verdicts[name] = replace(self.verdicts[name], **what)

    def usable(self) -> list[Product]:
        return [PRODUCTS[name] for name, verdict in self.verdicts.items() if verdict.status == "ok"]

    def guarded(self, name: str, work: Callable[[], None]) -> None:
        """A broken kernel fails alone, unless it broke the whole context; then the others say so."""
        try:
            work()
        except Exception as error:  # whatever a compiler or a driver raises is the finding
            text = reason_of(error)
            self.note(name, status="failed", reason=text)


def activation_like(rows: int, k: int, generator: torch.Generator, outliers: bool = True) -> Tensor:
    """bf16 rows of N(0, 1), or with channels and rows that stick out, and a mean."""
    like: dict[str, Any] = {"device": generator.device, "generator": generator}
    x = torch.randn(rows, k, **like)
    if outliers:
        x += torch.randn(k, **like) / 2
        x[:, torch.randperm(k, **like)[: max(1, k // 100)]] *= 50
        x[torch.randperm(rows, **like)[: max(1, rows // 50)]] *= 30
    return x.bfloat16()


def _gate(rows: int, n: int, generator: torch.Generator) -> After:
    """A residual to add to, and a gate."""
    like: dict[str, Any] = {"device": generator.device, "dtype": torch.bfloat16, "generator": generator}
    return After(torch.randn(rows, n, **like), torch.randn(n, **like))


def make_operands(case: Case, kind: str, generator: torch.Generator) -> Operands:
    """Operands of a case, quantized in plain torch: a wrong pass before the product is not its fault."""
    like: dict[str, Any] = {"device": generator.device, "generator": generator}
    x = activation_like(case.rows, case.k, generator, case.outliers)
    weight = torch.randn(case.n, case.k, **like) * case.k**-0.5
    (a, scale_a), (b, scale_b) = (quantize_rows_reference(t, KINDS[kind]) for t in (x, weight))
    bias = torch.randn(case.n, **like).bfloat16() * 3 if case.bias else None
    after = _gate(case.rows, case.n, generator) if case.gated else NOTHING
    return Operands(a, b, scale_a, scale_b, bias, torch.bfloat16, after)


def exact_product(x: Operands) -> Tensor:
    """The product with sums in fp64. Of int8 the very numbers; of fp8 what they would be, in fp64."""
    if x.a.dtype == torch.int8:
        y = (x.a.double() @ x.b.double().t()).float() * x.scale_a[:, None] * x.scale_b
        y = y if x.bias is None else y + x.bias.float()
        if x.after.residual is not None and x.after.gate is not None:
            y = x.after.residual.float() + x.after.gate.float() * y
        return y.to(x.out_dtype)
    y = (x.a.double() @ x.b.double().t()) * x.scale_a.double()[:, None] * x.scale_b.double()
    y = y if x.bias is None else y + x.bias.double()
    if x.after.residual is not None and x.after.gate is not None:
        y = x.after.residual.double() + x.after.gate.double() * y
    return y


def row_error(found: Tensor, true: Tensor) -> float:
    """Relative L2 distance of the row that errs most; NaN if a number is not finite."""
    true = true.double()
    return float(((found.double() - true).norm(dim=-1) / true.norm(dim=-1).clamp_min(1e-30)).max())


def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Fills memory with NaN and gives it back: what is allocated next, of the same size, most likely holds it."""
    count = torch.Size(shape).numel() * dtype.itemsize
    torch.full((-(-count // 4),), float("nan"), device=device)


def _compare(product: Product, state: Examined, label: str, x: Operands, true: Tensor, rows: Tensor | None) -> None:
    """One call on operands, of which the residual is left as it was."""
    residual = x.after.residual
    if residual is not None:
        x = replace(x, after=After(residual.clone(), x.after.gate))
    poison((len(x.a), len(x.b)), x.out_dtype, x.a.device)
    found = product.run(x)
    if found is None:
        raise RuntimeError("it does not compile")
    low, high = torch.aminmax(found)
    error = row_error(found if rows is None else found[rows], true)
    limit = LIMITS[state.kind]
    errors = state.verdicts[product.name].errors | {label: error}
    state.note(product.name, errors=errors)
    if not bool(torch.isfinite(low + high)):
        state.note(product.name, status="wrong", reason=f"{label}: its output holds numbers that are not finite")
    elif not error <= limit:
        state.note(product.name, status="wrong", reason=f"{label}: relative error {error:.1e}, allowed {limit:.1e}")


def _cases(state: Examined, generator: torch.Generator) -> None:
    for case in CASES:
        x = make_operands(case, state.kind, generator)
        true = exact_product(x)
        for product in state.usable():
            if product.fits(x):
                work = functools.partial(_compare, product, state, case.name, x, true, None)
                state.guarded(product.name, work)


def _shape(state: Examined, shape: Shape, rows: int, budget_ms: float, generator: torch.Generator) -> None:
    """Errors on sampled rows, and time, of those that are right so far."""
    linear, n, k, gated = shape
    some = sampled_rows(rows, generator.device)
    try:
        weight = torch.randn(n, k, device=generator.device, dtype=torch.bfloat16, generator=generator) * k**-0.5
        b, scale_b = quantize_rows(weight, KINDS[state.kind])
        del weight
        after = _gate(rows, n, generator) if gated else NOTHING
        for label, outliers in ((f"{linear}, outliers", True), (linear, False)):
            a, scale_a = quantize_rows(activation_like(rows, k, generator, outliers), KINDS[state.kind])
            x = Operands(a, b, scale_a, scale_b, None, torch.bfloat16, after)
            residual = None if after.residual is None else after.residual[some]
            true = exact_product(replace(x, a=a[some], scale_a=scale_a[some], after=After(residual, after.gate)))
            for product in state.usable():
                if not product.slow and product.fits(x):
                    work = functools.partial(_compare, product, state, label, x, true, some)
                    state.guarded(product.name, work)
    except torch.OutOfMemoryError:
        return  # not timed, then: the order of PRODUCTS holds
    for name in state.verdicts:
        product = PRODUCTS[name]
        times: list[float] = []
        if state.verdicts[name].status == "ok" and not product.slow and product.fits(x):

            def work(product: Product = product, times: list[float] = times) -> None:
                times.append(median_ms(lambda: product.run(x), generator.device, budget_ms))

            state.guarded(name, work)
        verdict = state.verdicts[name]
        ms = times[0] if times else None
        tflops = None if ms is None else 2 * rows * n * k / ms / 1e9
        error = verdict.errors.get(linear, max(verdict.errors.values(), default=None))
        state.entries.append({
            "linear": linear, "shape": [rows, n, k], "backend": f"{state.kind} {name}", "status": verdict.status,
            "reason": verdict.reason, "error": error, "ms": ms, "tflops": tflops,
        })  # fmt: skip
        if ms is not None:
            whole = (verdict.ms or 0.0) + ms
            state.note(name, ms=whole, kernel_ms=whole, tflops=tflops)


def examine_products(
    device: torch.device,
    kind: str,
    *,
    shapes: Iterable[Shape],
    rows: int,
    budget_ms: float = 150.0,
    seed: int = 0,
) -> Examined:
    """Error, time and verdict of each back end of a kind of operands on a device, in the order of PRODUCTS.

    Args:
        shapes: linears that are timed, at so many ``rows``; a verdict's time is the sum.
        budget_ms: about how long each back end is timed, at each shape.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    state = Examined(kind, seed)
    for name, product in PRODUCTS.items():
        if kind in product.kinds:
            reason = product.available(device, kind)
            status = "ok" if reason is None else "unavailable"
            state.verdicts[name] = Verdict(kind, name, status, reason or "")
    generator = torch.Generator(device).manual_seed(seed)
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _cases(state, generator)
        for shape in shapes:
            _shape(state, shape, rows, budget_ms, generator)
    return state


def baseline(device: torch.device, shape: Shape, rows: int, budget_ms: float, seed: int = 0) -> dict[str, Any]:
    """A line for the table: torch's product in bf16, which nothing here takes the place of, and the gate's kernel where
    one follows."""
    linear, n, k, gated = shape
    entry: dict[str, Any] = {
        "linear": linear, "shape": [rows, n, k], "backend": "bf16", "status": "ok", "reason": "", "error": None,
        "ms": None, "tflops": None,
    }  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    with torch.inference_mode():
        x = activation_like(rows, k, generator, False)
        weight = (torch.randn(n, k, device=device, generator=generator) * k**-0.5).bfloat16()
        some = sampled_rows(rows, device)
        error = row_error(F.linear(x, weight)[some], x[some].double() @ weight.double().t())
        entry["error"] = error
        if not error <= BF16_LIMIT:
            return entry | {"status": "wrong", "reason": f"relative error {error:.1e}, allowed {BF16_LIMIT:.1e}"}
        after = _gate(rows, n, generator) if gated else NOTHING
        ms = median_ms(lambda: followed(F.linear(x, weight), after), device, budget_ms)
    return entry | {"ms": ms, "tflops": 2 * rows * n * k / ms / 1e9}


def rank(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """The back ends that are right, see :func:`.attention_check.fastest_first`.

    Raises:
        ValueError: none is right; says why.
    """
    right = [v for v in verdicts if v.status == "ok"]
    if not right:
        why = "; ".join(f"{v.backend} {v.status} ({v.reason})" for v in verdicts)
        raise ValueError(f"no matrix product is right: {why}")
    return tuple(v.backend for v in fastest_first(right))

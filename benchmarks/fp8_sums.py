"""What sums of e4m3 products lose on Hopper: emulated in plain torch, with no card; or what the attention kernel loses,
and what its folds cost, on a card.

The FP8 units of Hopper align the 32 products of a k-step and the accumulator to the largest exponent among them, and
cut each off, towards zero, 13 fractional bits below it. Once a sum has grown to thousands of its products, each of them
loses a part of itself, and a sum whose products have one sign shrinks: little shows with N(0, 1), whose sums stay small
beside what is added, and much with means. `fold` is how many k-steps pass before the accumulator is added to a true
fp32 sum and starts again at zero.

    python -m solostep.benchmarks.fp8_sums
    python -m solostep.benchmarks.fp8_sums --card -o folds.jsonl

The first prints relative L2 errors against sums without that loss, of attention over V (a tile of 128 keys is four
k-steps) and of scaled matrix products, in some ten minutes on two cores. Emulated, not measured; where an H200 was
measured, never folding, it gave 0.142 in all with local means at 75,888 keys, and 2e-3 and 4e-3 in products of N(0, 1)
with K = 6,144 and 24,576: this emulation's 0.14, 1.6e-3 and 4.1e-3.

The second times the kernel with each fold in turns, 48 heads, and takes its errors against fp64; a line is appended to
the file. Each fold is compiled in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.benchmarks.full_width import record
from solostep.benchmarks.linear_speed import milliseconds
from solostep.kernels.attention_check import Inputs, exact, make_inputs, relative_error, sampled_rows
from solostep.kernels.quantize import quantize_rows_reference
from solostep.kernels.values import quantize_v_reference

STEP = 32
FRACTION = 13
"""Fractional bits of the accumulator."""
TILE = 128 // STEP
"""k-steps a tile of keys."""
LENGTHS = (8_192, 32_768, 75_888)
FOLDS = (1, 2, 4, 8, 16, 32, 0)
"""Tiles of keys between two folds; 0: never."""


def imprecise_mm(a: Tensor, b: Tensor, fold: int) -> Tensor:
    """``a [M, K] @ b [K, N]`` as the FP8 units add it, folded every ``fold`` k-steps (0: never)."""
    total = torch.zeros(len(a), b.shape[1])
    part = torch.zeros_like(total)
    one = torch.ones_like(part)
    for i, (left, right) in enumerate(zip(a.float().split(STEP, 1), b.float().split(STEP, 0), strict=True), 1):
        products = left[:, :, None] * right
        largest = torch.maximum(products.abs().amax(1), part.abs())
        exponent = torch.frexp(largest).exponent - (1 + FRACTION)
        up, down = torch.ldexp(one, -exponent), torch.ldexp(one, exponent)
        part = ((products * up[:, None]).trunc().sum(1) + (part * up).trunc()) * down
        if fold and i % fold == 0:
            total, part = total + part, torch.zeros_like(part)
    return total + part


def attention_errors(kind: str, keys: int, rows: int = 4) -> dict[str, float]:
    """The loss of P V by FOLDS, and what e4m3 P and V cost by themselves (``formats``), relative L2."""
    operands = make_inputs(kind, keys, 1, torch.device("cpu")).operands("bf16")
    q, k, v = (x.float()[:, 0] for x in (operands.q, operands.k, operands.v))
    some = torch.linspace(0, keys - 1, rows).long()
    scores = q[some] @ k.t() / math.sqrt(q.shape[1])
    p = torch.exp(scores - scores.amax(1, keepdim=True)) * 8
    p8 = p.to(torch.float8_e4m3fn).float()
    v8, scale, add = quantize_v_reference(operands.v)
    values = v8[0].float().unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)[:, :keys].t()
    sums = p.sum(1, keepdim=True).double()
    true = (p.double() / sums) @ v.double()

    def output(product: Tensor) -> Tensor:
        return product.double() / sums * scale[0] + add[0]

    exact = output(p8.double() @ values.double())
    found = {"formats": relative_error(exact, true)}
    for fold in FOLDS:
        found[str(fold)] = relative_error(output(imprecise_mm(p8, values, fold * TILE)), exact)
    return found


def product_errors(kind: str, k: int, rows: int = 16) -> dict[str, float]:
    """The loss of a matrix product by k-steps between folds, and what e4m3 costs by itself, relative L2."""
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(rows, k, generator=generator), torch.randn(rows, k, generator=generator)
    if kind != "N(0, 1)":
        a = F.gelu(a, approximate="tanh")
    if kind == "GELU, weights with a mean":
        b = b + 0.1
    (a8, scale_a), (b8, scale_b) = (quantize_rows_reference(x, torch.float8_e4m3fn) for x in (a, b))
    scales = scale_a.double()[:, None] * scale_b.double()
    exact = (a8.double() @ b8.double().t()) * scales
    found = {"formats": relative_error(exact, a.double() @ b.double().t())}
    for fold in (4, 16, 64, 0):
        found[str(fold)] = relative_error(imprecise_mm(a8, b8.t(), fold).double() * scales, exact)
    return found


def table(name: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row} | {' | '.join(f'{found[c]:.1e}' for c in columns)} |" for row, found in rows.items()]
    return "\n".join(lines)


KERNEL_FOLDS = (0, 4, 8, 12, 16)
"""Tiles of keys between two folds of the kernel, as measured."""


def _runs(inputs: Inputs) -> dict[int, Callable[[], Tensor]]:
    """The kernel on the same operands, by fold."""
    from solostep.kernels.attention_hopper import SCHEDULES, Schedule, attention_hopper

    usual, x = SCHEDULES["int8-fp8"], inputs.operands("int8-fp8")
    scales = {"q_scale": x.q_scale, "k_scale": x.k_scale, "v_scale": x.v_scale, "v_mean": x.v_mean}

    def run(fold: int) -> Tensor:
        plan = Schedule(usual.consumers, usual.keys, usual.stages, usual.registers, refresh=usual.refresh, fold=fold)
        return attention_hopper(x.q, x.k, x.v, schedule=plan, **scales)

    return {fold: partial(run, fold) for fold in KERNEL_FOLDS}


def _compile(fold: int, tokens: int, device: torch.device) -> None:
    """Fills Triton's cache, in a process of its own."""
    _runs(make_inputs("normal", tokens, 1, device))[fold]()
    torch.cuda.synchronize()


@torch.inference_mode()
def on_card(tokens: int, device: torch.device) -> dict[str, Any]:
    """The kernel's milliseconds by fold, 48 heads of random normal numbers, in turns; its errors, of one head."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(_compile, fold, tokens, device) for fold in KERNEL_FOLDS]:
            job.result()
    rows = sampled_rows(tokens, device)
    errors: dict[str, dict[str, float]] = {}
    for kind in ("normal", "local means"):
        inputs = make_inputs(kind, tokens, 1, device)
        plain = inputs.operands("bf16")
        true = exact(plain.q, plain.k, plain.v, rows, [0])
        found = {str(fold): relative_error(run()[rows], true) for fold, run in _runs(inputs).items()}
        errors[kind] = {fold: float(f"{error:.2e}") for fold, error in found.items()}
    ms = milliseconds(
        {str(fold): run for fold, run in _runs(make_inputs("normal", tokens, 48, device)).items()}, 3, 300
    )
    return {"what": "folds", "tokens": tokens, "ms": {k: round(v, 2) for k, v in ms.items()}, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(prog="fp8_sums", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--card", action="store_true", help="measure the kernel on a Hopper card")
    parser.add_argument("--tokens", type=int, default=75_888, help="of --card")
    parser.add_argument("-o", "--output", type=Path, help="of --card: append the result as a JSON line")
    args = parser.parse_args()
    if args.card:
        device = torch.device("cuda", 0)
        record(on_card(args.tokens, device), device, args.output)
    else:
        emulated()


def emulated() -> None:
    kinds = ("normal", "local means")
    attention = {f"{kind}, {keys:,} keys": attention_errors(kind, keys) for kind in kinds for keys in LENGTHS}
    print("Attention in int8 and fp8, by tiles of keys between folds (0: never)\n")
    print(table("data", attention))
    products = {
        f"{kind}, K = {k:,}": product_errors(kind, k)
        for kind in ("N(0, 1)", "GELU", "GELU, weights with a mean")
        for k in (6_144, 24_576)
    }
    print("\nMatrix products, by k-steps between folds (0: never)\n")
    print(table("data", products))


if __name__ == "__main__":
    main()

"""Times the linears of a DiT block in bf16, FP8 and INT8 at full width: quantizing the activation, the product, both.

    python -m solostep.benchmarks.linear_speed
    python -m solostep.benchmarks.linear_speed --tokens 18972 -o linear_speed.jsonl

Every linear starts from a bf16 activation and ends in a bf16 output, allocated within the time as in real use. Inputs
are random normal numbers, never zeros (a GPU is faster on zeros). All formats of a shape are timed in turns, several
rounds of several runs with a warm-up in each turn, so that they share the card's clock and heat; a time is the median
of all runs. Before that, sampled rows are compared with fp64 products of the bf16 operands, and the INT8 product with
exact sums, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solostep.benchmarks.full_width import commit
from solostep.kernels.quantize import quantize_rows
from solostep.kernels.scaled_mm import scaled_mm_fp8, scaled_mm_int8, scaled_mm_int8_reference

DIM = 6144
ROTATED = 256
"""Channels that INT8 rotates together."""
LIMITS = {"bf16": 4e-3, "fp8": 6e-2, "int8": 2e-2}
"""Relative L2 errors on normal numbers above which a result is wrong, not just rounded."""


@dataclass(frozen=True)
class Linear:
    name: str
    out_features: int
    in_features: int
    count: int
    """In one block."""


LINEARS = (
    Linear("qkv", 3 * DIM, DIM, 1),
    Linear("wo, q, o", DIM, DIM, 3),
    Linear("ffn up", 4 * DIM, DIM, 1),
    Linear("ffn down", DIM, 4 * DIM, 1),
)


def run_times(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of `count` runs back to back, after a third as many that are not timed."""
    for _ in range(-(-count // 3)):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int, turn: float) -> dict[str, float]:
    """The median time of each function; `turn` is about how long it is timed at a stretch, in ms."""
    counts = {name: max(3, round(turn / min(run_times(run, 3)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += run_times(run, counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def check(
    x: Tensor, weight: Tensor, wholes: dict[str, Callable[[], Tensor]], int8: tuple[Tensor, ...]
) -> dict[str, float]:
    """Relative L2 errors on rows from the start, the end and between; raises RuntimeError for a wrong result."""
    rows = torch.cat([torch.arange(32), torch.randint(0, len(x), (64,)), torch.arange(len(x) - 32, len(x))]).cuda()
    want = x[rows].double() @ weight.double().t()
    errors = {}
    for name, whole in wholes.items():
        errors[name] = float((whole()[rows].double() - want).norm() / want.norm())
        if not errors[name] < LIMITS[name]:
            raise RuntimeError(f"{name}: relative error {errors[name]:.2e}, allowed {LIMITS[name]:.0e}")
    a, b, scale_a, scale_b = int8
    exact = scaled_mm_int8_reference(a[rows], b, scale_a[rows], scale_b)
    if not torch.equal(scaled_mm_int8(a, b, scale_a, scale_b)[rows], exact):
        raise RuntimeError("int8: the product differs from exact sums")
    return errors


def bench_linear(linear: Linear, tokens: int, rounds: int, turn: float) -> dict[str, Any]:
    """One shape in all formats: errors, and milliseconds of quantizing, product and both."""
    x = torch.randn(tokens, linear.in_features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(linear.out_features, linear.in_features, device="cuda", dtype=torch.bfloat16)
    weight *= linear.in_features**-0.5
    kinds = {"fp8": (torch.float8_e4m3fn, 1, scaled_mm_fp8), "int8": (torch.int8, ROTATED, scaled_mm_int8)}
    runs: dict[str, Callable[[], Any]] = {"bf16": lambda: F.linear(x, weight)}
    int8: tuple[Tensor, ...] = ()
    for name, (dtype, group, product) in kinds.items():
        (q, scale), (w, w_scale) = quantize_rows(x, dtype, group), quantize_rows(weight, dtype, group)
        int8 = (q, w, scale, w_scale)

        def quantize(dtype=dtype, group=group):
            return quantize_rows(x, dtype, group)

        def whole(quantize=quantize, product=product, w=w, w_scale=w_scale):
            q, scale = quantize()
            return product(q, w, scale, w_scale)

        runs |= {
            f"{name} quantize": quantize,
            f"{name} product": lambda product=product, q=q, w=w, s=scale, t=w_scale: product(q, w, s, t),
            name: whole,
        }
    errors = check(x, weight, {name: runs[name] for name in ("bf16", *kinds)}, int8)
    times = milliseconds(runs, rounds, turn)
    flop = 2 * tokens * linear.out_features * linear.in_features
    return {
        "linear": linear.name, "shape": [tokens, linear.out_features, linear.in_features], "count": linear.count,
        "ms": {name: round(ms, 4) for name, ms in times.items()},
        "tflops": {name: round(flop / ms / 1e9) for name, ms in times.items() if "quantize" not in name},
        "ratio": {name: round(times["bf16"] / times[name], 3) for name in kinds},
        "error": {name: float(f"{error:.2e}") for name, error in errors.items()},
    }  # fmt: skip


def block_sum(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All linears of one block, each as often as it occurs."""
    names = ("bf16", "fp8", "int8")
    total = {name: sum(result["count"] * result["ms"][name] for result in results) for name in names}
    ratio = {name: round(total["bf16"] / total[name], 3) for name in names[1:]}
    return {"linear": "block", "ms": {name: round(ms, 3) for name, ms in total.items()}, "ratio": ratio}


def table(results: list[dict[str, Any]], block: dict[str, Any]) -> str:
    """Markdown; products with TFLOP/s in brackets, the ratio is bf16's time over that of quantizing and product."""
    lines = [
        "| linear | N x K | bf16, ms | format | quantize, ms | product, ms | both, ms | ratio | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ms, tflops = result["ms"], result["tflops"]
        for name in ("fp8", "int8"):
            product = f"{name} product"
            cells = [
                result["linear"], " x ".join(map(str, result["shape"][1:])), f"{ms['bf16']:.2f} ({tflops['bf16']})",
                name, f"{ms[f'{name} quantize']:.3f}", f"{ms[product]:.2f} ({tflops[product]})", f"{ms[name]:.2f}",
                f"**{result['ratio'][name]:.2f}**", f"{result['error'][name]:.1e}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    for name in ("fp8", "int8"):
        both = f"{block['ms'][name]:.2f} | **{block['ratio'][name]:.2f}**"
        lines.append(f"| one block | | {block['ms']['bf16']:.2f} | {name} | | | {both} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=75_888, help="rows of the activation (default: 544x992x204)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=300, help="milliseconds that one function is timed at a stretch")
    parser.add_argument("-o", "--output", type=Path, help="append the results as JSON lines")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("linear_speed needs a CUDA card")
    torch.manual_seed(0)
    results = []
    for linear in LINEARS:
        results.append(bench_linear(linear, args.tokens, args.rounds, args.turn))
        torch.cuda.empty_cache()
    block = block_sum(results)
    about = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton"),
        "cuda": torch.version.cuda, "commit": commit(),
    }  # fmt: skip
    print(table(results, block), *(f"{key} {value}" for key, value in about.items()), sep="\n", flush=True)
    if args.output is not None:
        with args.output.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line | about) + "\n" for line in [*results, block])


if __name__ == "__main__":
    main()
